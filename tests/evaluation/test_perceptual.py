"""Further metrics: against closed forms, the lpips package and torchmetrics' own network; and what is refused."""

import math
import sys
import warnings

import pytest
import torch
from torchvision import models

from mcir.config import validate
from mcir.data.decode import decode
from mcir.data.sources import ParquetSource
from mcir.errors import UserError
from mcir.evaluation.config import ValidationConfig
from mcir.evaluation.perceptual import DISTS, LPIPS, MSSSIM, NIQE, ImportedMetric, measure, parse
from mcir.section import to_yaml
from mcir.train.engine import build_engine
from mcir.train.scores import load
from tests.runs import tiny_config, write_dataset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair():
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(1, 3, 176, 192, generator=generator)
    return (clean + 0.1 * torch.randn(clean.shape, generator=generator)).clamp(0, 1), clean


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Random weights of a torchvision network, as a file: what is tested is where they go."""
    pytest.importorskip("torchmetrics")

    def write(name):
        torch.manual_seed(0)
        file = tmp_path_factory.getbasetemp() / f"{name}.pth"
        if not file.exists():
            torch.save(models.get_model(name, weights=None).state_dict(), file)
        return file

    return write


def test_ms_ssim_of_flat_images():
    """Contrast and structure are 1 at every scale; luminance enters once, to the power 0.1333 of the coarsest."""
    of = MSSSIM().build(CPU)
    value = float(of(*(torch.full((1, 3, 176, 176), level, dtype=torch.float64) for level in (0.4, 0.6))))
    assert value == pytest.approx(((2 * 0.4 * 0.6 + 1e-4) / (0.4**2 + 0.6**2 + 1e-4)) ** 0.1333, abs=1e-9)
    with pytest.raises(ValueError, match="160"):
        of(torch.rand(1, 3, 160, 200), torch.rand(1, 3, 160, 200))


@pytest.mark.parametrize("size", [(176, 192), (171, 165)])
def test_ms_ssim_is_that_of_the_package(size):
    package = pytest.importorskip("pytorch_msssim")
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(1, 3, *size, generator=generator).double()
    restored = (clean + 0.2 * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
    expected = float(package.ms_ssim(restored, clean, data_range=1.0))
    assert float(MSSSIM().build(CPU)(restored, clean)) == pytest.approx(expected, abs=1e-6)  # its window is float32


@pytest.mark.parametrize(("network", "model"), [("alex", "alexnet"), ("squeeze", "squeezenet1_1")])
def test_lpips_is_its_authors(network, model, backbone, pair):
    lpips = pytest.importorskip("lpips")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    layers = models.get_model(model, weights=None)
    layers.load_state_dict(torch.load(backbone(model)))
    for own, theirs in zip(reference.net.parameters(), layers.features.parameters(), strict=True):
        own.data.copy_(theirs)
    expected = float(reference(*pair, normalize=True).detach())
    assert float(LPIPS(network=network, weights=str(backbone(model))).build(CPU)(*pair)) == pytest.approx(expected)


def test_distances_are_zero_for_equal_images_and_grow(backbone, pair):
    restored, clean = pair
    alex = LPIPS(weights=str(backbone("alexnet"))).build(CPU)
    worse = (clean + 0.3 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    assert float(alex(clean, clean)) == 0
    assert 0 < float(alex(restored, clean)) < float(alex(worse, clean))
    dists = DISTS(weights=str(backbone("vgg16"))).build(CPU)
    assert float(dists(clean, clean)) == pytest.approx(0, abs=1e-5)
    assert float(dists(restored, clean)) < float(dists(worse, clean))


def test_dists_is_torchmetrics_network(backbone, pair, monkeypatch):
    """Theirs downloads VGG16: here its constructor is handed the file."""
    from torchmetrics.functional.image import dists

    def from_file(weights):
        net = models.vgg16(weights=None)
        net.load_state_dict(torch.load(backbone("vgg16")))
        return net

    monkeypatch.setattr(dists, "vgg16", from_file)
    expected = float(dists.DISTSNetwork()(*pair))
    assert float(DISTS(weights=str(backbone("vgg16"))).build(CPU)(*pair)) == pytest.approx(expected, rel=1e-6)


def test_niqe_of_photographs_rises_with_blur_and_noise_and_needs_two_blocks():
    """Photographs score 2 to 5, as published tables have of ground truth; the clean image plays no part."""
    pytest.importorskip("iqa")
    of, generator = NIQE().build(CPU), torch.Generator().manual_seed(0)
    photographs = [decode(row.clean, row.key) for row in ParquetSource(path="configs/quickstart/heldout").open()]
    for photograph in photographs[1:3]:
        image = photograph[None].float() / 255
        noisy = (image + 0.1 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
        clean, blurred, worst = (float(of(x, noisy)) for x in (image, torch.nn.AvgPool2d(5, 1, 2)(image), noisy))
        assert 2 < clean < 5 < blurred < worst
    with pytest.raises(ValueError, match="an image of 191 x 191 does not hold two blocks of 96 pixels"):
        of(torch.rand(1, 3, 191, 191), torch.rand(1, 3, 191, 191))


def test_metrics_see_what_a_file_would_hold(pair):
    seen = []
    measure({"spy": lambda restored, clean: seen.append(restored) or 1.0}, pair[0] * 1.5 - 0.2, pair[1])
    assert seen[0].min() == 0
    assert seen[0].max() == 1
    assert torch.equal(seen[0] * 255, (seen[0] * 255).round())


def test_weights_have_two_ways_out(tmp_path, monkeypatch, backbone):
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "little.pth")
    with pytest.raises(UserError, match=r"metric lpips: .*little\.pth has no features\.0\.bias: set its weights to a"):
        LPIPS(weights=str(tmp_path / "little.pth")).build(CPU)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="metric dists: the ImageNet weights of vgg16 could not be downloaded"):
        DISTS().build(CPU)


def test_what_is_no_metric(tmp_path):
    assert parse(["ms_ssim", "{name: lpips, network: vgg}"]) == (MSSSIM(), LPIPS(network="vgg"))
    assert (parse([]), parse(["none"])) == (None, ())
    with pytest.raises(UserError, match=r"--metrics lpsip: .*'ms_ssim', 'lpips', 'dists', 'niqe', 'import'"):
        parse(["lpsip"])
    with pytest.raises(UserError, match="no_such_module:f cannot be imported"):
        ImportedMetric(target="no_such_module:f", direction="lower").build(CPU)
    sets = {"held": {"source": {"format": "parquet", "path": "x"}, "protocol": "rgb"}}
    values = tiny_config(tmp_path, validation={"every": 2, "sets": sets, "metrics": ["lpsip"]})
    with pytest.raises(UserError, match=r"validation\.metrics\.0\.name: lpsip is none of .*do you mean lpips\?"):
        validate(values, "test")
    with pytest.raises(ValueError, match="two metrics are called lpips"):
        ValidationConfig(every=1, sets=sets, metrics=["lpips", {"name": "lpips", "weights": "x"}])
    values["validation"] |= {"metrics": ["dists"], "best": "held/lpips"}
    with pytest.raises(UserError, match=r"validation\.best: no held/lpips; there are .*held/dists"):
        validate(values, "test")


def test_a_run_is_best_where_its_own_metric_is_lowest(tmp_path, monkeypatch, capsys):
    """The user's function joins the scores, the checkpoint's metrics, and decides, by its direction."""
    (tmp_path / "own_metrics.py").write_text(
        "calls = []\n\ndef oddness(restored, clean):\n"
        "    assert restored.shape == clean.shape\n    calls.append(1)\n    return (len(calls) - 4) ** 2\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    source = {"format": "parquet", "path": str(write_dataset(tmp_path / "held", num_rows=1, num_shards=1))}
    sets = {"held": {"source": source, "degradation": {"name": "bicubic", "scale": 2}, "protocol": "sr"}}
    metric = {"name": "import", "target": "own_metrics:oddness", "direction": "lower"}
    validation = {"every": 1, "sets": sets, "metrics": [metric], "best": "held/oddness"}
    config = validate(tiny_config(tmp_path, validation=validation), "test")
    (tmp_path / "resolved.yaml").write_text(to_yaml(config.model_dump(mode="json")))
    engine = build_engine(config)
    assert engine.fit() == 0
    found = load(engine.run_dir, 6)
    assert [found[step]["held"].values["oddness"] for step in found] == [[9.0], [4.0], [1.0], [0.0], [1.0], [4.0]]
    assert engine.state.best == (0.0, "step-00000004")
    assert not math.isnan(found[6]["held"].mean()["psnr"])
    table = capsys.readouterr().out.splitlines()[-6:]
    assert "ODDNESS" in table[1]
    assert "9.0000 -> 4.0000" in table[3]  # of bicubic, which is asked last, and of the network
    sys.modules.pop("own_metrics")
