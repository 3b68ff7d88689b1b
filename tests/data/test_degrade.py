import io

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from mcir.data.chain import AnyDegradation
from mcir.data.degrade import (
    Bicubic,
    GaussianBlur,
    Haze,
    Jpeg,
    LowResolution,
    MotionBlur,
    Noise,
    Rain,
    haze,
    line_kernel,
    synthetic_depth,
)
from mcir.data.resize import imresize

ALL = [Bicubic(scale=2), LowResolution(factor=3), Noise(), Jpeg(), GaussianBlur(), MotionBlur(), Haze(), Rain()]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def photo(height: int = 60, width: int = 84) -> torch.Tensor:
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 7 + i) * np.cos(y / (5 + i)) for i in range(3)]
    return torch.from_numpy((np.stack(waves) * 110 + 128).astype(np.uint8))


def flat(value: float, height: int = 60, width: int = 84) -> torch.Tensor:
    return torch.full((3, height, width), value)


@pytest.mark.parametrize("degradation", ALL, ids=lambda d: d.name)
def test_type_size_and_seed(degradation):
    clean = photo()
    before = clean.clone()
    for image in (clean, clean.float() / 255, clean.double() / 255):
        degraded = degradation(image, rng(1))
        assert degraded.dtype == image.dtype
        assert tuple(degraded.shape) == (3, 60 // degradation.scale, 84 // degradation.scale)
        assert torch.equal(degraded, degradation(image, rng(1)))
        if degradation.name not in ("bicubic", "low_resolution"):
            assert not torch.equal(degraded, degradation(image, rng(2)))
    assert torch.equal(clean, before)  # the clean image is not written to
    quantised = degradation(clean, rng(1)).float()
    unquantised = degradation(clean.float() / 255, rng(1)).clamp(0, 1) * 255
    assert (quantised - unquantised).abs().max() <= {"bicubic": 1.5, "low_resolution": 3}.get(degradation.name, 0.51)


def test_config_is_a_union_by_name():
    adapter: TypeAdapter = TypeAdapter(AnyDegradation)
    for degradation in ALL:
        assert adapter.validate_python(degradation.model_dump(mode="json")) == degradation
    assert adapter.validate_python({"name": "noise", "sigma": [0.5, 50]}).sigma == (0.5, 50)
    for wrong in [
        {"name": "fog"},
        {"name": "noise", "sigma": 0},
        {"name": "noise", "sigma": [50, 5]},
        {"name": "noise", "level": 5},
        {"name": "bicubic", "scale": 5},
        {"name": "jpeg", "quality": 101},
        {"name": "haze", "airlight": 1.5},
        {"name": "gaussian_blur", "sigma": float("inf")},
        {},
    ]:
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_is_imresize(scale):
    assert torch.equal(Bicubic(scale=scale)(photo(), rng()), imresize(photo(), 1 / scale))
    with pytest.raises(ValueError, match="multiple"):
        Bicubic(scale=scale)(photo(61, 85), rng())


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_low_resolution_is_imresize_there_and_back_at_the_same_size(factor):
    image = photo(60, 84)
    expected = imresize(imresize(image, 1 / factor), factor)
    assert torch.equal(LowResolution(factor=factor)(image, rng()), expected)
    odd = LowResolution(factor=factor)(photo(61, 85), rng())  # no multiple of the factor
    assert odd.shape == (3, 61, 85)
    assert (odd[:, :50, :70].float() - expected[:, :50, :70].float()).abs().max() <= 12  # the same but at borders


@pytest.mark.parametrize("sigma", [5, 25, 50])
def test_noise_has_its_sigma_and_is_white(sigma):
    clean = flat(0.5, 300, 300)
    noise = (Noise(sigma=sigma)(clean, rng()) - clean) * 255
    count = noise.numel()
    assert abs(noise.std() - sigma) < 5 * sigma / (2 * count) ** 0.5
    assert abs(noise.mean()) < 5 * sigma / count**0.5
    for shifted in (noise.roll(1, 0), noise.roll(1, 1), noise.roll(1, 2)):
        assert abs((noise * shifted).mean()) / sigma**2 < 5 / count**0.5


def test_a_pair_is_drawn_uniformly():
    sigmas = [(Noise(sigma=(10, 30))(flat(0.5, 40, 40), rng(i)) - 0.5).std() * 255 for i in range(200)]
    assert 9 < min(sigmas) < 11.5
    assert 28.5 < max(sigmas) < 31.5
    assert abs(np.mean(sigmas) - 20) < 5 * (20 / 12**0.5) / 200**0.5


def test_jpeg_is_libjpeg_at_that_quality():
    clean = photo(64, 80)
    stream = io.BytesIO()
    Image.fromarray(clean.permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=30)
    expected = torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1)
    assert torch.equal(Jpeg(quality=30)(clean, rng()), expected)
    error = [(Jpeg(quality=q)(clean, rng()).float() - clean).square().mean() for q in (10, 40, 90)]
    assert error[0] > error[1] > error[2]
    seen = {Jpeg(quality=(10, 12))(clean, rng(i)).sum().item() for i in range(40)}
    assert len(seen) == 3  # both ends of the range are drawn


def test_gaussian_blur_of_a_point_is_the_gaussian():
    clean = torch.zeros(3, 41, 41, dtype=torch.float64)
    clean[:, 20, 20] = 1
    y, x = np.mgrid[-20:21, -20:21]
    expected = np.exp(-(x**2 + y**2) / (2 * 1.7**2)) / (2 * np.pi * 1.7**2)
    np.testing.assert_allclose(GaussianBlur(sigma=1.7)(clean, rng())[0], expected, atol=2e-5)


@pytest.mark.parametrize("blur", [GaussianBlur(), MotionBlur()], ids=lambda d: d.name)
def test_blurs_keep_constants_and_mirror_borders(blur):
    np.testing.assert_allclose(blur(flat(0.3), rng()), 0.3, atol=1e-5)
    clean = photo().double() / 255
    mirrored = torch.cat([clean.flip(-1), clean, clean.flip(-1)], -1)
    mirrored = torch.cat([mirrored.flip(-2), mirrored, mirrored.flip(-2)], -2)
    inside = blur(mirrored, rng())[:, 60:120, 84:168]
    np.testing.assert_allclose(blur(clean, rng()), inside, atol=1e-6)


def test_motion_blur_averages_along_its_line():
    column = torch.zeros(3, 31, 31)
    column[:, :, 15] = 1
    np.testing.assert_allclose(MotionBlur(length=9, angle=90)(column, rng()), column, atol=1e-6)  # along itself
    across = MotionBlur(length=9, angle=0)(column, rng())[0, 15]
    expected = np.zeros(31)
    expected[11:20] = 1 / 8  # nine pixels from end to end: eight steps
    expected[[11, 19]] = 1 / 16
    np.testing.assert_allclose(across, expected, atol=5e-3)
    point = torch.zeros(3, 31, 31)
    point[:, 15, 15] = 1
    up_right = MotionBlur(length=9, angle=45)(point, rng())[0]
    assert up_right[13, 17] > 0.05  # counter-clockwise: up is a smaller row
    assert up_right[17, 17] < 1e-6


@pytest.mark.parametrize(("length", "angle"), [(1, 0), (7, 30), (7.4, 30), (20, -77), (15, 120)])
def test_line_kernel_has_the_moments_of_a_line(length, angle):
    kernel = line_kernel(length, angle).double()
    radius = kernel.shape[0] // 2
    y, x = torch.meshgrid(torch.arange(radius, -radius - 1.0, -1), torch.arange(-radius, radius + 1.0), indexing="ij")
    assert kernel.sum() == pytest.approx(1)
    assert (kernel * x).sum() == pytest.approx(0, abs=1e-6)
    along = x * np.cos(np.deg2rad(angle)) + y * np.sin(np.deg2rad(angle))
    variance = (length - 1) ** 2 / 12  # of a uniform line; sharing among pixels adds at most 1/4
    assert variance <= (kernel * along**2).sum() * 1.0001 + 1e-6
    assert (kernel * along**2).sum() <= variance + 0.5


def test_haze_is_atmospheric_scattering():
    clean = photo().double() / 255
    depth = torch.rand(60, 84, dtype=torch.float64)
    hazy = haze(clean, depth, beta=1.3, airlight=0.8)
    t = np.exp(-1.3 * depth.numpy())
    np.testing.assert_allclose(hazy, clean.numpy() * t + 0.8 * (1 - t), atol=1e-12)
    assert torch.equal(haze(clean, torch.zeros(60, 84), 1.3, 0.8), clean)
    np.testing.assert_allclose(haze(clean, torch.full((60, 84), 1e3), 1.3, 0.8), 0.8, atol=1e-6)
    black = Haze(beta=1.0, airlight=1.0)(flat(0.0), rng())  # black: I = 1 - exp(-d), so d can be read back
    depth_read = -torch.log(1 - black[0])
    assert depth_read.min() == pytest.approx(0, abs=1e-6)
    assert depth_read.max() == pytest.approx(1, abs=1e-5)


def test_synthetic_depth_is_smooth_and_farther_at_the_top():
    depths = torch.stack([synthetic_depth(120, 160, rng(i)) for i in range(30)])
    assert depths.amin((1, 2)).abs().max() == 0
    assert (depths.amax((1, 2)) == 1).all()
    assert depths.diff(dim=1).abs().max() < 0.05
    assert depths.diff(dim=2).abs().max() < 0.05
    assert depths[:, :40].mean() > depths[:, -40:].mean() + 0.2


def test_rain_adds_streaks_of_the_given_share_direction_and_brightness():
    clean = flat(0.2, 200, 200)
    rain = Rain(density=0.001, length=21, angle=90, strength=0.4)
    streaks = rain(clean, rng()) - clean
    assert streaks.min() > -1e-6
    assert torch.equal(streaks[0], streaks[2])  # white
    # expected mean: density * E[drop] * strength * (sum of the kernel with weight 1 at its centre)
    kernel = line_kernel(21, 90)
    mean = 0.001 * 0.75 * 0.4 * float(kernel.sum() / kernel.max())
    means = [float((rain(clean, rng(i)) - clean).mean()) for i in range(20)]
    assert np.mean(means) == pytest.approx(mean, rel=0.12)  # about 800 drops in all
    lit = streaks[0] > 0.15
    along, across = (lit[1:] & lit[:-1]).sum(), (lit[:, 1:] & lit[:, :-1]).sum()
    assert along > 5 * across  # 90 degrees: streaks run down the columns
    single = Rain(density=3e-5, length=11, angle=90, strength=0.4)(flat(0.2, 400, 400), rng(3)) - 0.2
    assert 0.2 <= single.max() <= 0.4001
    assert Rain(density=1, strength=1)(clean, rng()).max() == 1
    edges = torch.stack([(Rain(density=0.01, angle=90)(clean, rng(i)) - clean)[0] for i in range(20)])
    assert edges[:, 0].mean() == pytest.approx(float(edges[:, 100].mean()), rel=0.35)  # streaks enter from outside
