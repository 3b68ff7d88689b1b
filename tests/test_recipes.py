"""The published recipes hold the published numbers, read what they tell the user to pack, and train."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mcir.archs.swinir import Swinir
from mcir.cli import main
from mcir.config import RunConfig, load
from mcir.data.layouts import LAYOUTS
from mcir.data.sources import ParquetSource
from mcir.objective.spn import SPNConfig
from mcir.train.engine import build_engine
from mcir.train.memory import plan
from tests.runs import write_dataset

CONFIGS = Path(__file__).parents[1] / "configs"
CONTRASTS = sorted((CONFIGS / "contrasts").glob("*.yaml"))


def recipes_in(*folders: str) -> list[str]:
    return sorted(f"{path.parent.name}/{path.stem}" for folder in folders for path in (CONFIGS / folder).glob("*.yaml"))


RECIPES = recipes_in("sr", "dehaze", "derain", "deblur")
OTHERS = recipes_in("published", "all_in_one")
PREPARED = ("dcp", "aod", "gca", "gdn", "ffa", "ffanew")
"""Columns of ccr.yaml: CCR's images restored by other networks."""
CONTRASTIVE = [name for name in RECIPES if not name.endswith("_plain")]
SAME_NETWORK = re.compile(r"reside_6k|its_plain|idt_(did|ddn|spa|rain200l)")
NETWORKS = [name for name in RECIPES if not SAME_NETWORK.search(name)]
"""One row of each network: the others differ in data and length alone."""

# From the repositories named in each recipe: parameters, steps, batch, clean crop, flips, reconstruction loss,
# optimizer (betas, weight decay), evaluation EMA, gradient clip, evaluation protocol.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "sr/edsr_light_x2_div2k": (
        *(1_369_859, 300_000, 16, 96, "dihedral", "l1", "adam", (0.9, 0.99), 0, 0.999, None, "sr"),
    ),
    "sr/edsr_light_x4_div2k": (
        *(1_517_571, 300_000, 16, 192, "dihedral", "l1", "adam", (0.9, 0.99), 0, 0.999, None, "sr"),
    ),
    "sr/swinir_light_x2_div2k": (
        *(910_152, 500_000, 64, 128, "dihedral", "l1", "adam", (0.9, 0.999), 0, 0.999, None, "sr"),
    ),
    "sr/swinir_light_x4_div2k": (
        *(929_628, 250_000, 64, 256, "dihedral", "l1", "adam", (0.9, 0.999), 0, 0.999, None, "sr"),
    ),
    "sr/swinir_classical_x4_div2k": (
        *(11_900_199, 500_000, 32, 192, "dihedral", "l1", "adam", (0.9, 0.99), 0, 0.999, None, "sr"),
    ),
    "dehaze/ffanet_its": (
        *(4_455_913, 500_000, 4, 128, "dihedral", "l1", "adamw", (0.9, 0.9), 0, 0.999, None, "ffanet"),
    ),
    "dehaze/dehazeformer_t_reside_in": (
        *(687_404, 131_100, 32, 256, "dihedral", "l1", "adamw", (0.9, 0.999), 0.01, None, None, "dehazeformer"),
    ),
    "dehaze/dehazeformer_s_reside_in": (
        *(1_284_884, 262_200, 16, 256, "dihedral", "l1", "adamw", (0.9, 0.999), 0.01, None, None, "dehazeformer"),
    ),
    "dehaze/dehazeformer_b_reside_in": (
        *(2_517_612, 262_200, 16, 256, "dihedral", "l1", "adamw", (0.9, 0.999), 0.01, None, None, "dehazeformer"),
    ),
    "dehaze/ffanet_its_plain": (
        *(4_455_913, 500_000, 2, 240, "dihedral", "l1", "adam", (0.9, 0.999), 0, None, None, "ffanet"),
    ),
    "dehaze/ffanet_reside_6k": (
        *(4_455_913, 500_000, 4, 128, "dihedral", "l1", "adamw", (0.9, 0.9), 0, 0.999, None, "dehazeformer"),
    ),
    "dehaze/dehazeformer_t_reside_6k": (
        *(687_404, 187_000, 32, 256, "hflip", "l1", "adamw", (0.9, 0.999), 0.01, None, None, "dehazeformer"),
    ),
    "dehaze/dehazeformer_s_reside_6k": (
        *(1_284_884, 375_000, 16, 256, "hflip", "l1", "adamw", (0.9, 0.999), 0.01, None, None, "dehazeformer"),
    ),
    "dehaze/dehazeformer_b_reside_6k": (
        *(2_517_612, 375_000, 16, 256, "hflip", "l1", "adamw", (0.9, 0.999), 0.01, None, None, "dehazeformer"),
    ),
    **{
        f"derain/idt_{data}": (
            *(16_416_463, steps, 4, 128, "flips", "ssim", "adam", (0.9, 0.999), 0, None, None, "derain"),
        )
        for data, steps in (("rain200l", 180_000), ("did", 1_200_000), ("ddn", 1_260_000), ("spa", 638_464))
    },
    "derain/idt_rain200h": (
        *(16_416_463, 180_000, 4, 128, "flips", "ssim", "adam", (0.9, 0.999), 0, None, None, "derain"),
    ),
    "deblur/nafnet_w32_gopro": (
        *(17_111_907, 200_000, 32, 256, "dihedral", "psnr", "adamw", (0.9, 0.9), 1e-3, None, 0.01, "nafnet"),
    ),
}
# The rate at a step (counted from 1): the first, the ends of plateaus and periods, the last.
RATES = {
    "sr/edsr_light_x2_div2k": {1: 1e-4, 200_000: 1e-4, 200_001: 5e-5, 300_000: 5e-5},
    "sr/edsr_light_x4_div2k": {1: 1e-4, 200_001: 5e-5},
    "sr/swinir_light_x2_div2k": {1: 2e-4, 250_001: 1e-4, 400_001: 5e-5, 450_001: 2.5e-5, 475_001: 1.25e-5},
    "sr/swinir_light_x4_div2k": {1: 1e-4, 125_001: 5e-5, 200_001: 2.5e-5, 225_001: 1.25e-5, 237_501: 6.25e-6},
    "sr/swinir_classical_x4_div2k": {1: 2e-4, 250_001: 1e-4, 400_001: 5e-5, 450_001: 2.5e-5, 475_001: 1.25e-5},
    # released with a period of 100,000 in a run of 500,000: back at the base rate after 200,000 and 400,000
    "dehaze/ffanet_its": {1: 2e-4, 100_001: 1e-8, 200_001: 2e-4, 300_001: 1e-8, 400_001: 2e-4},
    "dehaze/dehazeformer_t_reside_in": {1: 4e-4, 437: 4e-4, 65_551: 2.02e-4, 65_987: 2.02e-4, 131_101: 4e-6},
    "dehaze/dehazeformer_s_reside_in": {1: 2e-4, 262_201: 2e-6},
    "dehaze/dehazeformer_b_reside_in": {1: 2e-4, 262_201: 2e-6},
    "dehaze/ffanet_its_plain": {1: 1e-4, 250_001: 5e-5, 375_001: 1.4644661e-5},
    "dehaze/ffanet_reside_6k": {1: 2e-4, 100_001: 1e-8, 200_001: 2e-4},
    # once an epoch, of 187 or 375 steps; half of 1,000 epochs is half the way from lr to lr / 100
    "dehaze/dehazeformer_t_reside_6k": {1: 2e-4, 187: 2e-4, 500 * 187 + 1: 1.01e-4, 501 * 187: 1.01e-4},
    "dehaze/dehazeformer_s_reside_6k": {1: 1e-4, 375: 1e-4, 500 * 375 + 375: 5.05e-5, 375_001: 1e-6},
    "dehaze/dehazeformer_b_reside_6k": {1: 1e-4, 375: 1e-4, 500 * 375 + 375: 5.05e-5, 375_001: 1e-6},
    "derain/idt_rain200l": {1: 1e-4, 45_000: 1e-4, 45_001: 1e-5, 112_501: 1e-6, 157_501: 1e-7},
    "derain/idt_did": {1: 1e-4, 300_000: 1e-4, 300_001: 1e-5, 750_001: 1e-6, 1_050_001: 1e-7},
    "derain/idt_ddn": {1: 1e-4, 315_000: 1e-4, 315_001: 1e-5, 787_501: 1e-6, 1_102_501: 1e-7},
    "derain/idt_spa": {1: 1e-4, 159_617: 1e-5, 399_041: 1e-6, 558_657: 1e-7},
    "derain/idt_rain200h": {1: 1e-4, 100 * 450: 1e-4, 100 * 450 + 1: 1e-5, 250 * 450 + 1: 1e-6, 350 * 450 + 1: 1e-7},
    "deblur/nafnet_w32_gopro": {1: 1e-3, 100_001: 5.0005e-4, 200_001: 1e-7},
}
SMALL = {  # what is kept of a network where the whole one is slow; small ones train whole
    "swinir": ["arch.depths=[2]", "arch.num_heads=[6]", "arch.image_size=16"],
    "ffanet": ["arch.num_blocks=2"],
    "dehazeformer": ["arch.depths=[2, 2, 2, 1, 1]"],
    "edsr": [],
    "idt": ["arch.embed_dim=16", "arch.mlp_ratio=0.25"],
    "nafnet": ["arch.width=8", "arch.num_encoder_blocks=[1, 1, 1, 2]"],
}
SIDES = {"idt": 128, "swinir": 64, "dehazeformer": 64}


def recipe(name: str, overrides: list[str] | None = None) -> RunConfig:
    return load([CONFIGS / f"{name}.yaml"], overrides or [])


def test_every_recipe_is_checked_here():
    assert sorted(PUBLISHED) == sorted(RATES) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_the_numbers_are_the_published_ones(name):
    config = recipe(name)
    optimizer = config.optim.optimizer
    assert config.validation is not None
    (protocol,) = {data.protocol for data in config.validation.sets.values()}
    found = (
        sum(p.numel() for p in config.arch.build().parameters()),
        config.steps,
        config.batch_size,
        config.data.crop_size,
        config.data.augment,
        config.objective.reconstruction[0].name,
        optimizer.name,
        optimizer.betas,
        optimizer.weight_decay,
        config.ema_decay,
        config.optim.max_grad_norm,
        protocol,
    )
    assert found == PUBLISHED[name]
    assert not (config.ema_decay and config.ema_warmup)
    for step, rate in RATES[name].items():
        assert config.optim.lr(step, config.steps) == pytest.approx(rate, rel=1e-6), step


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_the_negatives_are_the_released_ones(name):
    """Aitical/MCLIR, options/FFANet_RESIDE_IN_fromScratch.yml: the one option file of SPN."""
    spn = recipe(name).objective.contrast
    assert isinstance(spn, SPNConfig)
    assert [s.update_every for s in spn.negatives] == [100, 200, 500, 1000]
    assert {(s.decay, s.start) for s in spn.negatives} == {(0.1, 0.1)}
    assert (spn.features.network, spn.features.weights) == ("vgg16", "imagenet")
    assert spn.features.layers == {"relu1_2": 0.2, "relu2_2": 0.3, "relu3_3": 0.5}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_memory_is_planned_without_data_or_device(name):
    planned = plan(recipe(name), "ddp", 2)
    assert planned["negatives"] == 4 * planned["target"]
    assert planned["activations"] > planned["gradients"]


def test_the_released_recipe_of_spn():
    config = recipe("dehaze/ffanet_its")
    assert config.objective.contrast is not None
    assert (config.objective.contrast.weight, config.objective.reconstruction[0].weight, config.seed) == (1e-3, 1, 42)
    assert config.validation is not None
    assert config.validation.weights == "target"  # its tests take the target's weights, not the averaged ones


@pytest.mark.parametrize("name", [name for name in RECIPES if "swinir" in name])
def test_the_stored_masks_are_those_of_the_training_patch(name):
    config = recipe(name)
    assert isinstance(config.arch, Swinir)
    assert config.arch.image_size == config.data.crop_size // config.arch.scale


def test_dehazeformers_l1_counts_as_between_images_in_minus_one_to_one():
    for variant in "tsb":
        for data in ("in", "6k"):
            assert recipe(f"dehaze/dehazeformer_{variant}_reside_{data}").objective.reconstruction[0].weight == 2


def packed_by(text: str, scale: int, clean_alone: set[str]) -> set[str]:
    """Where the commands in the comments write; their layouts, splits and scales exist and fit the network.

    `clean_alone`: the sources that are degraded as they are read, and whose clean images have no scale.
    """
    written = set()
    loop = re.search(r"for set in ([^;]+);", text)
    for command in re.findall(r"^#\s+(mcir data pack [^;\n]+)", text, re.MULTILINE):
        for each in loop[1].split() if loop and "$" in command else [""]:
            words = shlex.split(re.sub(r"\$\{?set\}?", each, command.replace("${set,,}", each.lower())))
            options = dict(zip(words[5::2], words[6::2], strict=True))
            if words[4] in clean_alone:
                assert not {"--scale", "--degradation"} & options.keys()
            elif "--degradation" in options:
                assert yaml.safe_load(options["--degradation"]).get("scale", 1) == scale
            else:
                assert int(options.get("--scale", 1)) == scale
            if "--layout" in options:
                layout = LAYOUTS[options["--layout"]]
                assert options.get("--split") in (layout.splits or (None,))
                assert scale == 1 or scale in layout.scales
            written.add(words[4])
    return written


@pytest.mark.parametrize("name", [*RECIPES, *OTHERS])
def test_every_dataset_is_packed_by_a_command_of_the_header(name):
    config = recipe(name)
    assert config.validation is not None
    entries = [*config.data.train, *config.validation.sets.values()]
    expected = {entry.source.path for entry in entries if isinstance(entry.source, ParquetSource)}
    degraded = {entry.source.path for entry in entries if isinstance(entry.source, ParquetSource) and entry.degradation}
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert packed_by(text, config.arch.descriptor.scale, degraded) == expected


def test_the_table_of_the_readme_is_that_of_the_recipes():
    """A line a row of the paper; its numbers are those that `mcir evaluate --published` shows."""
    text = (CONFIGS / "README.md").read_text()
    rows = re.findall(r"^\| \[[^]]*\]\((\S+)\.yaml\) .*\| (.*) \| (.*) \|$", text, re.MULTILINE)
    found = {
        name: tuple([tuple(map(float, pair.split("/"))) for pair in cell.split()] for cell in cells)
        for name, *cells in rows
    }
    assert len(found) == len(rows) == 18
    for name in CONTRASTIVE:
        validation = recipe(name).validation
        assert validation is not None
        known = [data.published for data in validation.sets.values() if data.published]
        if known:
            assert found.pop(name) == ([v["plain"] for v in known], [v["+SPN"] for v in known]), name
    assert not found


def shrunken(name: str, folder: Path) -> list[str]:
    """The overrides under which two steps of a recipe take seconds, on images made here."""
    config = recipe(name)
    arch, scale = config.arch.name, config.arch.descriptor.scale
    side = SIDES.get(arch, 32)
    data = write_dataset(folder / "data", num_rows=2, num_shards=1, side=side, scale=scale, extra=PREPARED)
    assert config.validation is not None
    return [
        *SMALL[arch],
        "steps=2",
        f"batch_size={1 if arch == 'idt' else 2}",
        f"runs_dir={folder / 'runs'}",
        "init_from=null",
        f"data.crop_size={min(side, 16 * scale) if arch == 'swinir' else side}",
        "data.num_workers=0",
        f"data.train.0.source.path={data}",
        *(f"validation.sets.{key}.source.path={data}" for key in list(config.validation.sets)),
        "tracking.log_every=1",
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_trains_two_steps_and_validates(name, tmp_path):
    overrides = [
        *shrunken(name, tmp_path),
        "objective.contrast.features.weights=random",
        "objective.contrast.negatives=[{update_every: 1, decay: 0.1, start: 0.1}, {decay: 0.1, start: 0.1}]",
    ]
    engine = build_engine(recipe(name, overrides))
    before = [p.detach().clone() for p in engine.model.parameters()]
    assert engine.fit() == 0
    assert engine.state.step == 2
    assert engine.most_skipped == 0
    assert any(not p.equal(old) for p, old in zip(engine.model.parameters(), before, strict=True))
    assert (engine.run_dir / "checkpoints" / "step-00000002" / "model.safetensors").exists()
    assert engine.state.best is not None
    assert 0 < engine.state.best[0] < 100


@pytest.mark.parametrize("contrast", CONTRASTS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "name", [name if "edsr_light_x2" in name else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_every_contrast_goes_on_every_recipe(name, contrast, tmp_path):
    overrides = shrunken(name, tmp_path)
    if "edsr" in name:
        overrides.append("arch.num_blocks=2")
    if contrast.stem != "plain":
        overrides.append("objective.contrast.features.weights=random")
    config = load([CONFIGS / f"{name}.yaml", contrast], overrides)
    engine = build_engine(config)
    before = [p.detach().clone() for p in engine.model.parameters()]
    assert engine.fit() == 0
    assert engine.most_skipped == 0
    assert any(not p.equal(old) for p, old in zip(engine.model.parameters(), before, strict=True))
    assert (engine.objective.contrast is None) == (contrast.stem == "plain")


def test_ccr_trains_on_prepared_images_as_they_are_packed(tmp_path, monkeypatch):
    """The images that another network restored are at the place of the clean ones, after crop and flips."""
    rng = np.random.default_rng(0)
    for i in range(4):
        clean = rng.integers(0, 256, (48, 56, 3), dtype=np.uint8)
        images = {"hazy": clean // 2 + 100, "clean": clean} | dict.fromkeys(PREPARED, 255 - clean)
        for folder, pixels in images.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    columns = " ".join(f"--column {name}={name}" for name in PREPARED)
    packing = f"mcir data pack clean packed --degraded hazy --num-workers 0 {columns}"
    monkeypatch.setattr(sys, "argv", packing.split())
    with pytest.raises(SystemExit, match="0"):
        main()
    overrides = [*shrunken("dehaze/ffanet_its", tmp_path), "objective.contrast.features.weights=random"]
    overrides += ["data.train.0.source.path=packed", "data.crop_size=32"]
    engine = build_engine(load([CONFIGS / "dehaze/ffanet_its.yaml", CONFIGS / "contrasts/ccr.yaml"], overrides))
    seen, step = [], engine.step

    def noted(batches):
        seen.extend(batches)
        return step(batches)

    monkeypatch.setattr(engine, "step", noted)
    assert engine.fit() == 0
    assert (len(seen), engine.most_skipped) == (2, 0)
    for batch in seen:
        assert batch.clean.shape == (2, 3, 32, 32)
        assert len(batch.extra) == 6
        assert all(torch.allclose(image, 1 - batch.clean, atol=1e-6) for image in batch.extra)
        assert torch.allclose(batch.degraded, ((batch.clean * 255) // 2 + 100) / 255, atol=1e-2)
