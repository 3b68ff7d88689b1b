import json
import math
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mcir.evaluation.metrics import PROTOCOLS, score
from tests.golden import find

GOLDEN_KEYS = {
    "sr": "basicsr_y_crop4",
    "rgb": "basicsr_rgb_crop0",
    "ffanet": "ffanet_float_rgb",
    "dehazeformer": "dehazeformer_float_rgb",
    "derain": "matlab_rounded_y",
    "nafnet": "nafnet_rgb_ssim3d",
}
every_protocol = pytest.mark.parametrize("protocol", get_args(PROTOCOLS))


def random_pair(batch=2, height=40, width=33, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(batch, 3, height, width, generator=generator)
    return (clean + 0.1 * torch.randn(clean.shape, generator=generator)).clamp(0, 1), clean


@every_protocol
def test_equals_the_official_code_on_set5(set5, protocol):
    images = json.loads(find("metrics_set5.json").read_text())["images"]
    assert len(images) == 5
    apart = {}
    for name, facts in images.items():
        clean = np.asarray(Image.open(set5 / "HR" / name).convert("RGB")).astype(np.float64)
        noise = np.random.default_rng(facts["seed"]).normal(0, facts["sigma"], clean.shape)
        restored = ((clean + noise).clip(0, 255) / 255).astype(np.float32)
        pair = [torch.from_numpy(x).permute(2, 0, 1)[None].float() for x in (restored, clean / 255)]
        psnr, ssim = facts["protocols"][GOLDEN_KEYS[protocol]]
        values = score(*pair, protocol=protocol, scale=4)
        apart[name] = abs(values["psnr"].item() - psnr), abs(values["ssim"].item() - ssim)
    decibels, ssims = zip(*apart.values(), strict=True)
    print(f"\n{protocol}: at most {max(decibels):.1e} dB and {max(ssims):.1e} SSIM apart")
    assert all(decibel <= 1e-3 and ssim <= 1e-5 for decibel, ssim in apart.values()), apart


@every_protocol
def test_one_value_per_image_independent_of_the_batch(protocol):
    restored, clean = random_pair(batch=3)
    together = score(restored, clean, protocol, scale=2)
    for i in range(3):
        alone = score(restored[i : i + 1], clean[i : i + 1], protocol, scale=2)
        for name in ("psnr", "ssim"):
            assert together[name].shape == (3,)
            assert together[name].dtype == torch.float64
            torch.testing.assert_close(together[name][i], alone[name][0], rtol=1e-12, atol=0)


@every_protocol
def test_identical_images(protocol):
    _, clean = random_pair()
    values = score(clean, clean, protocol, scale=2)
    assert values["psnr"].tolist() == [100.0 if protocol == "ffanet" else math.inf] * 2
    torch.testing.assert_close(values["ssim"], torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)


# Flat grey 100 against 110 of 255: the error is 10 levels everywhere, or 10 * 219 / 255 of Y; SSIM is its first term.
@pytest.mark.parametrize(
    ("protocol", "x", "y", "peak"),
    [
        ("rgb", 100, 110, 255),
        ("nafnet", 100, 110, 255),
        ("dehazeformer", 100 / 255, 110 / 255, 1),
        ("sr", 16 + 219 * 100 / 255, 16 + 219 * 110 / 255, 255),
        ("derain", 102, 110, 255),  # Y of 100 is 101.88, of 110 it is 110.47
    ],
)
def test_closed_form_of_flat_images(protocol, x, y, peak):
    restored, clean = (torch.full((1, 3, 20, 20), grey / 255) for grey in (100, 110))
    values = score(restored, clean, protocol, scale=2)
    c1 = (0.01 * peak) ** 2
    assert values["psnr"].item() == pytest.approx(20 * math.log10(peak / abs(x - y)), abs=1e-4)
    tolerance = 2e-3 if protocol == "nafnet" else 1e-6  # the official float32 window is off by 1e-3 on flat images
    assert values["ssim"].item() == pytest.approx((2 * x * y + c1) / (x * x + y * y + c1), abs=tolerance)


def full_window_ssim(x, y):
    """SSIM with one 11 x 11 window on [0, 255] images (1, C, H, W), by the textbook formula."""
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / 4.5)
    window = (window / window.sum()).expand(x.shape[1], 1, 11, 11)
    mean = [F.conv2d(z, window, groups=x.shape[1]) for z in (x, y, x * x, y * y, x * y)]
    variance_x, variance_y = mean[2] - mean[0] ** 2, mean[3] - mean[1] ** 2
    covariance = mean[4] - mean[0] * mean[1]
    numerator = (2 * mean[0] * mean[1] + 6.5025) * (2 * covariance + 58.5225)
    return (numerator / ((mean[0] ** 2 + mean[1] ** 2 + 6.5025) * (variance_x + variance_y + 58.5225))).mean().item()


def test_border_and_quantisation():
    restored, clean = random_pair(batch=1)
    x, y = (image.mul(255).round().double() for image in (restored, clean))
    assert score(restored, clean, "rgb")["ssim"].item() == pytest.approx(full_window_ssim(x, y), abs=1e-12)
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64).view(1, 3, 1, 1) / 255
    x, y = ((image * weights).sum(1, keepdim=True)[..., 3:-3, 3:-3] + 16 for image in (x, y))
    values = score(restored, clean, "sr", scale=3)
    assert values["ssim"].item() == pytest.approx(full_window_ssim(x, y), abs=1e-12)
    assert values["psnr"].item() == pytest.approx(10 * math.log10(255**2 / (x - y).square().mean().item()), abs=1e-9)


def test_float_protocols_do_not_quantise():
    clean = torch.full((1, 3, 16, 16), 0.5)
    restored = clean + 1e-4  # a fortieth of a level
    assert score(restored, clean, "rgb")["psnr"].item() == math.inf
    for protocol in ("ffanet", "dehazeformer"):
        assert score(restored, clean, protocol)["psnr"].item() == pytest.approx(80, abs=0.01)


@every_protocol
def test_restored_is_clamped_and_nan_stays_nan(protocol):
    restored, clean = random_pair()
    restored[0, :, 10:20, 10:20], clean[0, :, 10:20, 10:20] = 7.0, 1.0
    clamped = score(restored.clamp(0, 1), clean, protocol, scale=2)
    restored[1, 0, 15, 15] = math.nan
    values = score(restored, clean, protocol, scale=2)
    assert values["psnr"][0] == clamped["psnr"][0]
    assert values["ssim"][0] == clamped["ssim"][0]
    assert values["psnr"][1].isnan()
    assert values["ssim"][1].isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[0], y[0]), r"\(B, 3, H, W\)"),
        (lambda x, y: (x[:, :1], y[:, :1]), r"\(B, 3, H, W\)"),
        (lambda x, y: (x[:0], y[:0]), r"\(B, 3, H, W\)"),
        (lambda x, y: (x[..., 1:], y), "they must be equal"),
        (lambda x, y: (x.mul(255).byte(), y), "divide by 255"),
        (lambda x, y: (x, y * 255), r"must lie in \[0, 1\]"),
        (lambda x, y: (x, y * 2 - 1), r"must lie in \[0, 1\]"),
        (lambda x, y: (x, y / 0), r"must lie in \[0, 1\]"),
    ],
)
def test_wrong_input_is_a_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        score(*change(*random_pair()), "rgb")


def test_wrong_protocol_scale_and_size_are_clear_errors():
    with pytest.raises(ValueError, match="one of sr, rgb"):
        score(*random_pair(), "y")
    for scale in (None, 0):
        with pytest.raises(ValueError, match="needs scale"):
            score(*random_pair(), "sr", scale=scale)
    for size in (18, 5):  # 18 - 2 * 4 is one less than the window
        with pytest.raises(ValueError, match=f"Images of {size} x {size} are too small"):
            score(*random_pair(height=size, width=size), "sr", scale=4)


@pytest.mark.gpu
@every_protocol
def test_gpu_equals_cpu_at_several_images_a_second(protocol):
    restored, clean = random_pair(batch=4, height=720, width=1280)
    cpu = score(restored[:1], clean[:1], protocol, scale=4)
    pair = restored.cuda(), clean.cuda()
    score(*pair, protocol, scale=4)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    gpu = score(*pair, protocol, scale=4)
    end.record()
    torch.cuda.synchronize()
    assert 4 / (start.elapsed_time(end) / 1000) > 5
    torch.testing.assert_close(gpu["psnr"][:1].cpu(), cpu["psnr"], rtol=1e-10, atol=0)
    tolerance = 2e-5 if protocol == "nafnet" else 1e-10  # float32 sums in another order
    torch.testing.assert_close(gpu["ssim"][:1].cpu(), cpu["ssim"], rtol=tolerance, atol=0)
