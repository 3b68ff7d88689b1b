"""Recipes that others published with their networks: each number is that of its repository's option file, and each
trains."""

from pathlib import Path
from typing import Any

import pytest

from mcir.config import RunConfig, load
from mcir.data.chain import Chain
from mcir.train.engine import build_engine
from tests.runs import write_dataset

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path.stem for path in (CONFIGS / "published").glob("*.yaml"))

L1 = [("l1", 1)]
# Read off the files that each recipe names: steps, batch, clean crop (of the first step), flips, losses, optimizer
# (rate, betas, weight decay), evaluation EMA, gradient clip.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "hat_x4": (500_000, 32, 256, "dihedral", L1, ("adam", 2e-4, (0.9, 0.99), 0), 0.999, None),
    "dat_x4": (250_000, 32, 256, "dihedral", L1, ("adam", 1e-4, (0.9, 0.99), 0), None, None),
    "real_hat_mse_x4": (1_000_000, 32, 256, "hflip", L1, ("adam", 1e-4, (0.9, 0.99), 0), 0.999, None),
    "retinexformer_lol": (150_000, 8, 128, "dihedral", L1, ("adam", 2e-4, (0.9, 0.999), 0), None, 0.01),
    "fftformer_gopro": (
        *(300_000, 64, 128, "dihedral", [("l1", 1), ("fft", 0.1)], ("adamw", 1e-3, (0.9, 0.9), 1e-3), None, 0.01),
    ),
    "mimo_unet_gopro": (
        *(3000 * 526, 4, 256, "hflip", [("l1", 1), ("fft", 0.1)], ("adam", 1e-4, (0.9, 0.999), 0), None, None),
    ),
    "mprnet_deblur": (
        *(3000 * 132, 16, 256, "dihedral", [("charbonnier", 1), ("edge", 0.05)]),
        *(("adam", 2e-4, (0.9, 0.999), 0), None, None),
    ),
    "promptir": (120 * 4451, 32, 128, "dihedral", L1, ("adamw", 2e-4, (0.9, 0.999), 0.01), None, None),
    **{
        f"restormer_{task}": (300_000, 64, 128, "dihedral", L1, ("adamw", 3e-4, (0.9, 0.999), 1e-4), None, 0.01)
        for task in ("derain", "motion_deblur", "denoise_color")
    },
}
RESTORMER = {1: 3e-4, 92_000: 3e-4, 92_001: 3e-4, 196_001: 1.505e-4, 300_001: 1e-6}
# The rate at a step, counted from 1, as the repository's own scheduler gives it.
RATES: dict[str, dict[int, float]] = {
    "hat_x4": {1: 2e-4, 250_000: 2e-4, 250_001: 1e-4, 400_001: 5e-5, 450_001: 2.5e-5, 475_001: 1.25e-5},
    "dat_x4": {1: 1e-4, 125_001: 5e-5, 200_001: 2.5e-5, 225_001: 1.25e-5, 237_501: 6.25e-6, 250_000: 6.25e-6},
    "real_hat_mse_x4": {1: 1e-4, 1_000_000: 1e-4},
    # CosineAnnealingRestartCyclicLR, periods 46,000 and 104,000, floors 3e-4 and 1e-6: the first rises
    "retinexformer_lol": {1: 2e-4, 23_001: 2.5e-4, 46_001: 2e-4, 98_001: 1.005e-4, 150_001: 1e-6},
    "fftformer_gopro": {1: 1e-3, 150_001: 5.0005e-4, 300_001: 1e-7},
    "mimo_unet_gopro": {1: 1e-4, 500 * 526: 1e-4, 500 * 526 + 1: 5e-5, 1000 * 526 + 1: 2.5e-5, 3000 * 526: 3.125e-6},
    # GradualWarmupScheduler of 3 epochs before CosineAnnealingLR(2997, 1e-6), stepped once before the first epoch
    "mprnet_deblur": {
        1: 2e-4 / 3,
        132: 2e-4 / 3,
        133: 4e-4 / 3,
        265: 2e-4,
        3 * 132 + 1: 2e-4,
        (3 + 999) * 132 + 1: 1e-6 + 1.99e-4 * 0.75,
        (3 + 1998) * 132 + 5: 1e-6 + 1.99e-4 * 0.25,
    },
    # LinearWarmupCosineAnnealingLR(15, 150) in its closed form, an epoch of 4,451 steps
    "promptir": {
        1: 0,
        4451: 0,
        4452: 2e-4 / 14,
        7 * 4451 + 1: 1e-4,
        14 * 4451 + 1: 2e-4,
        15 * 4451 + 1: 2e-4,
        60 * 4451 + 1: 1.5e-4,
        105 * 4451 + 9: 0.5e-4,
    },
    "restormer_derain": RESTORMER,
    "restormer_motion_deblur": RESTORMER,
    "restormer_denoise_color": RESTORMER,
}
SMALL = {  # networks of the zoo, smaller
    "HAT": {"depths": [1], "num_heads": [2], "embed_dim": 12, "window_size": 8, "squeeze_factor": 3, "img_size": 16},
    "DAT": {"depth": [2], "num_heads": [2], "embed_dim": 32, "split_size": [4, 8], "img_size": 16},
    "RetinexFormer": {"n_feat": 8, "num_blocks": [1, 1, 1]},
    "FFTformer": {"dim": 8, "num_blocks": [1, 1, 1], "num_refinement_blocks": 1},
}
STAND_INS = {"mprnet_deblur": "Stages", "mimo_unet_gopro": "Scales"}


def recipe(name: str, overrides: list[str] | None = None) -> RunConfig:
    return load([CONFIGS / "published" / f"{name}.yaml"], overrides or [])


def test_every_recipe_is_checked_here():
    assert sorted(PUBLISHED) == sorted(RATES) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_the_numbers_are_the_published_ones(name):
    config = recipe(name)
    optimizer = config.optim.optimizer
    found = (
        config.steps,
        config.batch_size,
        config.data.crop_size,
        config.data.augment,
        [(term.name, term.weight) for term in config.objective.reconstruction],
        (optimizer.name, optimizer.lr, optimizer.betas, optimizer.weight_decay),
        config.ema_decay,
        config.optim.max_grad_norm,
    )
    assert found == PUBLISHED[name]
    assert config.objective.num_negatives == 0
    for step, rate in RATES[name].items():
        assert config.optim.lr(step, config.steps) == pytest.approx(rate, rel=1e-6, abs=1e-15), step


def test_the_all_in_one_recipe_is_promptirs_with_another_network_and_its_history():
    config = load([CONFIGS / "all_in_one" / "nafnet_w32_noise_rain_haze.yaml"])
    other = recipe("promptir")
    assert (config.data, config.optim, config.validation) == (other.data, other.optim, other.validation)
    assert (config.steps, config.batch_size) == (other.steps, other.batch_size)
    assert config.data.labels == ["noise15", "noise25", "noise50", "rain", "haze"]
    assert config.validation is not None
    assert config.validation.best == "mean/psnr"
    assert config.objective.num_negatives == 4


def test_real_hat_degrades_as_real_esrgan():
    (train,) = recipe("real_hat_mse_x4").data.train
    assert train.degradation == Chain(scale=4, steps="real_esrgan")
    assert train.degradation.window_size == 400


@pytest.mark.parametrize("task", ["derain", "motion_deblur", "denoise_color"])
def test_restormers_crops_grow_while_its_batches_shrink(task):
    """iters, gt_sizes and mini_batch_sizes (of each of 8 GPUs) of its option files."""
    phases = recipe(f"restormer_{task}").phases
    steps = [92_000, 64_000, 48_000, 36_000, 36_000, 24_000]
    assert [phase.step for phase in phases] == [sum(steps[:i]) for i in range(6)]
    assert [phase.crop_size for phase in phases] == [128, 160, 192, 256, 320, 384]
    assert [phase.batch_size for phase in phases] == [8 * n for n in (8, 5, 4, 2, 1, 1)]
    assert sum(steps) == 300_000
    mixup = recipe(f"restormer_{task}").data.mixup
    assert (mixup.beta, mixup.probability) == (1.2, 0.5) if task == "denoise_color" else mixup is None


@pytest.mark.parametrize("name", RECIPES)
def test_trains_two_steps_and_validates(name, tmp_path):
    text = (CONFIGS / "published" / f"{name}.yaml").read_text()
    pairs = {
        scale: write_dataset(tmp_path / f"pairs{scale}", num_rows=2, num_shards=1, scale=scale) for scale in (1, 4)
    }
    clean = write_dataset(tmp_path / "clean", num_rows=2, num_shards=1)
    arch = [f"arch.target=tests.standins:{STAND_INS.get(name, 'OneImage')}", "arch.blocks=[]"]
    for network, smaller in SMALL.items():
        if f"architecture: {network}" in text:
            arch = [f"arch.parameters.{key}={value}" for key, value in smaller.items()]
    small = [
        "steps=2",
        "batch_size=2",
        "optim.lr_every=1",
        "init_from=null",
        "stages=[]",
        "data.crop_size=32",
        "data.num_workers=0",
        *arch,
    ]
    config = recipe(name, small)
    places = [(f"data.train.{i}", source) for i, source in enumerate(config.data.train)]
    assert config.validation is not None
    places += [(f"validation.sets.{key}", data) for key, data in config.validation.sets.items()]
    scale = config.arch.descriptor.scale
    small += [f"{place}.source.path={clean if data.degradation else pairs[scale]}" for place, data in places]
    engine = build_engine(recipe(name, [*small, f"runs_dir={tmp_path / 'runs'}", "tracking.log_every=1"]))
    before = [p.detach().clone() for p in engine.model.parameters()]
    assert engine.fit() == 0
    assert engine.state.step == 2
    assert engine.most_skipped == 0
    assert any(not p.equal(old) for p, old in zip(engine.model.parameters(), before, strict=True))
    assert engine.state.best is not None
