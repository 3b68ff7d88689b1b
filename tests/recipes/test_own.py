"""`mcir init`: what it writes passes the check and trains as it is; what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import vgg16

from mcir.config import load
from mcir.errors import UserError
from mcir.recipes.own import init
from mcir.train.engine import build_engine


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pairs x2, pairs of one size with a test half, clean images alone: 4 images each."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)

    def save(name, side, width=None):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((width or side + 4, side), Image.Resampling.BICUBIC).save(root / name)

    for i in range(4):
        save(f"pairs/hr/{i}.png", 44)
        save(f"pairs/lr/{i}x2.png", 22, 24)
        for split in ("train", "test") if i < 2 else ("train",):
            for half in ("sharp", "blur"):
                save(f"blurred/{split}/{half}/{i}.png", 36)
        save(f"clean/{i}.png", 60)
    return root


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    """A torch home with VGG16's file in it, so that `imagenet` needs no network: random values."""
    root = tmp_path_factory.mktemp("torch")
    (root / "hub/checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    features = {k: v for k, v in vgg16(weights=None).state_dict().items() if k.startswith("features.")}
    torch.save(features, root / "hub/checkpoints/vgg16-397923af.pth")
    return root


@pytest.mark.parametrize(
    ("network", "data", "settings", "expected"),
    [
        ("edsr", "pairs", {}, {"crop_size": 44, "batch_size": 16, "lr": 1e-4, "share": 0.05}),
        ("nafnet", "blurred", {}, {"crop_size": 36, "batch_size": 32, "lr": 1e-3, "share": 5e-3}),
        ("edsr", "clean", {"scale": 2}, {"crop_size": 60, "batch_size": 16, "lr": 1e-4, "share": 0.05}),
    ],
)
def test_what_is_written_trains_as_it_is(photos, downloaded, tmp_path, monkeypatch, network, data, settings, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(downloaded))
    said = init(network, photos / data, **settings)
    file = tmp_path / f"{network}_{data}.yaml"
    assert said[-1] == f"mcir train {file.name}"
    assert (load([file]).validation is None) == (data != "blurred")
    shorter = ["steps=2", "batch_size=2"] + (["arch.num_encoder_blocks=[1,1,1,1]"] if network == "nafnet" else [])
    config = load([file])
    contrast, optimizer = config.objective.contrast, config.optim.optimizer
    found = {"crop_size": config.data.crop_size, "batch_size": config.batch_size, "lr": optimizer.lr}
    assert found | {"share": contrast.weight.target_ratio} == expected
    engine = build_engine(load([file], shorter))
    assert engine.fit() == 0
    assert (engine.run_dir / "checkpoints/step-00000002/model.safetensors").exists()
    if data == "blurred":
        assert engine.state.measured["held_out/psnr (target)"] > 0


def test_what_is_assumed_is_written_beside_it(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    init("swinir:light", photos / "clean", tmp_path / "a.yaml", scale=4)
    text = (tmp_path / "a.yaml").read_text()
    assert "degradation: {name: bicubic, scale: 4}  # assumed" in text
    assert "those of configs/sr/swinir_light_x2_div2k.yaml" in text
    assert "# No validation: " in text
    assert load([tmp_path / "a.yaml"]).arch.scale == 4
    init("nafnet", photos / "clean", tmp_path / "b.yaml", degradation="{name: noise, sigma: 25}")
    assert load([tmp_path / "b.yaml"]).data.train[0].degradation.sigma == 25


def test_a_network_of_the_zoo_with_and_without_a_recipe(photos, tmp_path):
    init("SPAN", photos / "pairs", tmp_path / "span.yaml")
    config = load([tmp_path / "span.yaml"])
    assert (config.arch.architecture, config.arch.descriptor.scale) == ("SPAN", 2)
    assert "No recipe of SPAN is shipped" in (tmp_path / "span.yaml").read_text()
    small = "{name: zoo, architecture: HAT, parameters: {depths: [1], num_heads: [2], embed_dim: 60, window_size: 4}}"
    init(small, photos / "pairs", tmp_path / "hat.yaml")
    config = load([tmp_path / "hat.yaml"])
    assert (config.arch.parameters["embed_dim"], config.arch.descriptor.scale) == (60, 2)
    assert config.optim.optimizer.lr == 2e-4
    assert "configs/published/hat_x4.yaml" in (tmp_path / "hat.yaml").read_text()


def test_a_network_of_which_there_is_no_memory_plan(photos, tmp_path, monkeypatch):
    """It looks at values, of which a plan has none."""
    (tmp_path / "looks.py").write_text(
        "from torch import nn\n\n\nclass Looks(nn.Conv2d):\n"
        "    def __init__(self):\n        super().__init__(3, 3, 1)\n\n"
        "    def forward(self, image):\n        return super().forward(image) if image.mean().item() > 0 else image\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    init("{name: import, target: 'looks:Looks'}", photos / "blurred", tmp_path / "a.yaml")
    assert load([tmp_path / "a.yaml"]).accumulate == 1
    assert "the memory plan cannot look into this network" in (tmp_path / "a.yaml").read_text()


@pytest.mark.parametrize(
    ("network", "data", "settings", "message"),
    [
        ("edrs", "pairs", {}, "there is no network edrs: did you mean edsr?"),
        ("Restorer", "pairs", {}, "spandrel has no 'Restorer'"),
        ("SAFMN", "pairs", {}, "SAFMN needs the arguments dim: give it as '{name: zoo, architecture: SAFMN"),
        ("swinir", "pairs", {}, "say which one, swinir:light, swinir:classical"),
        ("swinir:lite", "pairs", {}, "swinir: variant: Input should be 'light' or 'classical'"),
        ("edrs", "clean", {}, "there is no network edrs"),
        ("edsr:large", "pairs", {}, "edsr has no variants"),
        ("edsr", "blurred", {}, "the pairs are of one size, and edsr takes pairs x2 or x3 or x4"),
        ("nafnet", "pairs", {}, "the pairs are x2, and nafnet takes pairs of one size"),
        ("edsr", "clean", {}, "holds clean images alone: say --scale, 2, 3, 4"),
        ("edsr", "clean", {"scale": 5}, "--scale 5: edsr has 2 or 3 or 4"),
        ("nafnet", "clean", {}, "and nafnet keeps the size: say how they are degraded"),
        ("nafnet", "clean", {"degradation": "{name: nose}"}, "--degradation {name: nose}: "),
        ("nafnet", "clean", {"degradation": "{name: bicubic, scale: 2}"}, "its scale is 2, nafnet has 1"),
        ("SCUNet", "pairs", {}, "SCUNet as it is by default has scale 1, and the data have 2"),
        ("edsr", "nowhere", {}, "nowhere: is not a folder"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_writes_nothing(photos, tmp_path, network, data, settings, message):
    with pytest.raises(UserError) as caught:
        init(network, photos / data, tmp_path / "a.yaml", **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(photos, tmp_path):
    (tmp_path / "a.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"a\.yaml is there already"):
        init("edsr", photos / "pairs", tmp_path / "a.yaml")
    assert (tmp_path / "a.yaml").read_text() == "mine"
