import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mcir.objective.features import FeaturesConfig
from mcir.objective.reconstruction import (
    FFT,
    L1,
    MSE,
    PSNR,
    Charbonnier,
    Edge,
    MultiScaleSSIM,
    NegativeSSIM,
    Perceptual,
    Reconstruction,
)
from tests.golden import at_places, find, read


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 16, 20, generator=generator), torch.rand(2, 3, 16, 20, generator=generator)


def test_closed_forms(pair):
    restored, clean = pair
    error = (restored - clean).flatten(1)
    assert torch.allclose(L1()(restored, clean), error.abs().mean(1))
    assert torch.allclose(MSE(weight=3)(restored, clean), 3 * error.square().mean(1))
    assert torch.allclose(Charbonnier(eps=0.01)(restored, clean), (error**2 + 0.01).sqrt().mean(1))
    decibel = [10 * math.log10(float(e.square().mean()) + 1e-8) for e in error]
    assert PSNR()(restored, clean).tolist() == pytest.approx(decibel, rel=1e-5)


def test_edge_is_the_published_value():
    _, case = read("contrast_edge.safetensors")
    restored, clean = case["J"].float().requires_grad_(), case["y"].float()
    edge = Edge()(restored, clean).mean()
    edge.backward()
    assert float(edge.detach()) == pytest.approx(float(case["loss"]), rel=1e-6)
    assert torch.allclose(at_places(restored.grad, "grad", case).double(), case["grad"], rtol=1e-3, atol=1e-8)
    both = Reconstruction([Charbonnier(eps=1e-6), Edge(weight=0.05)])(restored.detach(), clean)
    assert list(both) == ["charbonnier", "edge"]
    assert float(both["charbonnier"].mean()) == pytest.approx(float(case["loss.charbonnier"]), rel=1e-6)
    assert float(sum(both.values()).mean()) == pytest.approx(float(case["loss.total"]), rel=1e-6)


def test_fft_is_the_published_value():
    _, case = read("contrast_fft.safetensors")
    restored, clean = case["J"].float().requires_grad_(), case["y"].float()
    fft = FFT()(restored, clean).mean()
    fft.backward()
    assert float(fft.detach()) == pytest.approx(float(case["loss"]), rel=1e-6)
    assert torch.allclose(at_places(restored.grad, "grad", case).double(), case["grad"], rtol=1e-4, atol=1e-8)
    assert float(FFT(weight=0.1)(case["J"].float(), clean).mean()) == pytest.approx(
        float(case["loss.weighted"]), rel=1e-6
    )
    odd = FFT()(case["odd.J"].float(), case["odd.y"].float()).mean()
    assert float(odd) == pytest.approx(float(case["loss.odd"]), rel=1e-6)


def waves(side):
    """Two restored images of one clean one, of side x (side + 7)."""
    t = torch.arange(3 * side * (side + 7), dtype=torch.float64).view(1, 3, side, side + 7)
    y = (torch.sin(t * 0.013) * torch.cos(t * 0.0007) + 1) / 2
    x = y * 0.9 + 0.05 * torch.cos(t * 0.11) + 0.03
    return torch.cat([x, y.flip(-1) * 0.5 + x * 0.5]).float(), torch.cat([y, y]).float()


def test_ssim_inside_the_image_and_of_five_scales_are_pytorch_msssims():
    """Values of pytorch-msssim 1.0.0 (ssim, ms_ssim with data_range=1) in float64."""
    small, large = waves(40), waves(181)
    ssim = -NegativeSSIM(padding="none")(*small)
    assert ssim.tolist() == pytest.approx([0.9278681176702953, 0.9659799304993903], abs=1e-5)
    ms_ssim = 1 - MultiScaleSSIM()(*large)
    assert ms_ssim.tolist() == pytest.approx([0.97788870438142, 0.8468493847751898], abs=1e-5)


def test_negative_ssim_of_equal_and_of_changed_images(pair):
    _, clean = pair
    assert NegativeSSIM()(clean, clean).tolist() == pytest.approx([-1, -1], abs=1e-6)
    assert float(NegativeSSIM()(clean * 0.5 + 0.2, clean).max()) > -0.95


def test_negative_ssim_is_the_official_value_on_set5(set5):
    case = json.loads(find("metrics_set5.json").read_text())["images"]["bird.png"]
    clean = np.asarray(Image.open(set5 / "HR/bird.png").convert("RGB")).astype(np.float64)
    noisy = np.clip(clean + np.random.default_rng(case["seed"]).normal(0, case["sigma"], clean.shape), 0, 255)
    images = [torch.from_numpy(x / 255).float().permute(2, 0, 1)[None] for x in (noisy, clean)]
    expected = case["protocols"]["ffanet_float_rgb"][1]
    assert -float(NegativeSSIM()(*images)) == pytest.approx(expected, abs=1e-5)


def test_structure_is_measured_in_fp32_under_autocast():
    images = waves(40)
    for loss in (NegativeSSIM(), Edge()):
        expected = loss(*images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(*images), expected)


@pytest.mark.parametrize(("distance", "apart"), [("l1", F.l1_loss), ("mse", F.mse_loss)])
def test_perceptual_pulls_the_features_to_the_clean_images(pair, distance, apart):
    restored, clean = pair
    features = FeaturesConfig(layers={"relu1_2": 0.25, "conv2_2": 0.75}, weights="random", normalise="none")
    perceptual = Perceptual(weight=2, distance=distance, features=features).build()
    restored.requires_grad_()
    value = perceptual(restored, clean)
    with torch.no_grad():
        found, wanted = perceptual.features(restored), perceptual.features(clean)
    expected = [
        2 * sum(w * apart(a[i], b[i]) for w, a, b in zip((0.25, 0.75), found, wanted, strict=True)) for i in range(2)
    ]
    assert torch.allclose(value, torch.stack(expected), rtol=1e-5)
    value.sum().backward()
    assert restored.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in perceptual.parameters())


def test_two_terms_of_one_name_are_told_apart(pair):
    terms = Reconstruction([NegativeSSIM(weight=0.5), L1(), NegativeSSIM(padding="none")])(*pair)
    assert list(terms) == ["ssim", "l1", "ssim_2"]
