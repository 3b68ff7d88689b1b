import io
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from mcir.data.chain import AnyDegradation, Chain, published
from mcir.data.degrade import MotionBlur, Rain
from mcir.data.kernels import blur_kernel, sinc_kernel
from mcir.data.resize import imresize
from mcir.data.rows import Row
from mcir.data.steps import (
    Apply,
    Blur,
    Compression,
    GaussianNoise,
    Group,
    OneOf,
    PoissonNoise,
    Resize,
    Sample,
    Sinc,
    arranged,
    choice,
    resized,
)
from mcir.data.transforms import training_pair

SIZE = (12, 16)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def photo(height: int, width: int) -> torch.Tensor:
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 7 + i) * np.cos(y / (5 + i)) for i in range(3)]
    return torch.from_numpy((np.stack(waves) * 110 + 128).astype(np.uint8))


def moments(kernel: torch.Tensor) -> np.ndarray:
    """Covariance of a kernel seen as a density, (x, y)."""
    along = np.arange(len(kernel)) - len(kernel) // 2
    k = kernel.double().numpy()
    xy = (k * along[None, :] * along[:, None]).sum()
    return np.array([[(k * along[None, :] ** 2).sum(), xy], [xy, (k * along[:, None] ** 2).sum()]])


def png(image: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(stream, "PNG")
    return stream.getvalue()


def test_isotropic_kernel_is_the_gaussian():
    for size, sigma in ((7, 0.2), (13, 1.7), (21, 3.0)):
        x = np.arange(size) - size // 2
        line = np.exp(-(x**2) / (2 * sigma**2))
        expected = np.outer(line, line) / np.outer(line, line).sum()
        assert np.allclose(blur_kernel(size, (sigma, sigma)), expected, atol=1e-7)
        assert np.allclose(blur_kernel(size, (sigma, sigma), profile="generalised", beta=1), expected, atol=1e-7)


def test_anisotropic_kernel_has_the_covariance_of_its_axes():
    angle = 0.6
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    expected = turn @ np.diag([4.0**2, 2.0**2]) @ turn.T
    assert np.allclose(moments(blur_kernel(61, (4.0, 2.0), angle)), expected, rtol=1e-4)


def test_shapes_along_an_axis():
    plateau = blur_kernel(21, (2.0, 3.0), profile="plateau", beta=1.5).double()
    generalised = blur_kernel(21, (2.0, 3.0), profile="generalised", beta=0.7).double()
    for step in (1, 2, 5):
        assert float(plateau[10, 10 + step] / plateau[10, 10]) == pytest.approx(1 / (1 + (step / 2) ** 3), rel=1e-5)
        assert float(plateau[10 + step, 10] / plateau[10, 10]) == pytest.approx(1 / (1 + (step / 3) ** 3), rel=1e-5)
        expected = np.exp(-0.5 * (step / 2) ** 1.4)
        assert float(generalised[10, 10 + step] / generalised[10, 10]) == pytest.approx(expected, rel=1e-5)


def test_sinc_passes_below_its_cutoff_alone():
    cutoff = np.pi / 2
    kernel = sinc_kernel(151, cutoff).double().numpy()
    along = np.arange(151) - 75
    for angle in (0.0, 0.5, np.pi / 4):
        for share, gain in ((0.0, 1.0), (0.5, 1.0), (0.8, 1.0), (1.2, 0.0), (1.6, 0.0)):
            wave = share * cutoff * (np.cos(angle) * along[None, :] + np.sin(angle) * along[:, None])
            assert (kernel * np.cos(wave)).sum() == pytest.approx(gain, abs=0.06)


def test_drawn_kernels_sum_to_1_and_are_odd():
    blur = published("real_esrgan", 4)[0].steps[2]
    for step in (blur, Sinc()):
        sides = Counter()
        for seed in range(400):
            kernel = step.kernel(rng(seed))
            sides[len(kernel)] += 1
            assert float(kernel.double().sum()) == pytest.approx(1, abs=1e-5)
        assert set(sides) == set(range(7, 22, 2))
        assert max(sides.values()) < 2 * min(sides.values())


def test_sigma_is_uniform_as_published():
    first = [moments(Blur(size=61, sigma=(1.0, 3.0)).kernel(rng(seed)))[0, 0] ** 0.5 for seed in range(400)]
    assert min(first) > 0.99
    assert max(first) < 3.01
    assert np.allclose(np.quantile(first, [0.25, 0.5, 0.75]), [1.5, 2.0, 2.5], atol=0.15)
    spread = Blur(size=61, sigma=(1.0, 3.0), uniform_in="variance")
    variances = [moments(spread.kernel(rng(seed)))[0, 0] for seed in range(400)]
    assert np.allclose(np.quantile(variances, [0.25, 0.5, 0.75]), [3.0, 5.0, 7.0], atol=0.5)


def test_resize_factors_as_published():
    first, second = published("real_esrgan", 4)[1], published("real_esrgan", 4)[5]
    for step, chances, low, high in (
        (first, (0.2, 0.7, 0.1), 0.15, 1.5),
        (second, (0.3, 0.4, 0.3), 0.3, 1.2),
    ):
        factors = np.array([step.factor(rng(seed)) for seed in range(4000)])
        shares = [(factors > 1).mean(), (factors < 1).mean(), (factors == 1).mean()]
        assert np.allclose(shares, chances, atol=0.03)
        down, up = factors[factors < 1], factors[factors > 1]
        assert low <= down.min() < low + 0.01
        assert high - 0.01 < up.max() <= high
        assert np.median(down) == pytest.approx((low + 1) / 2, abs=0.03)
        assert np.median(up) == pytest.approx((high + 1) / 2, abs=0.03)
    divided = Resize(chances={"down": 1}, down=(1 / 8, 1), uniform_in="divisor")
    assert np.median([1 / divided.factor(rng(seed)) for seed in range(2000)]) == pytest.approx(4.5, abs=0.2)


def test_resize_modes_and_sizes():
    image = photo(24, 36).float() / 255
    half = Resize(chances={"down": 1}, down=0.5, modes=("area",))(image, SIZE, rng())
    assert torch.allclose(half, F.avg_pool2d(image, 2), atol=1e-6)
    for mode in ("area", "bilinear", "bicubic", "antialiased"):
        assert Resize(of="result", modes=(mode,))(image, SIZE, rng()).shape == (3, *SIZE)
        assert Resize(chances={"down": 1}, down=0.4, modes=(mode,))(image, SIZE, rng()).shape == (3, 9, 14)
        assert Resize(chances={"up": 1}, up=1.3, modes=(mode,))(image, SIZE, rng()).shape == (3, 31, 46)
        assert Resize(chances={"down": 1}, down=0.01, modes=(mode,))(image, SIZE, rng()).shape == (3, 1, 1)
    matlab = imresize(image, 0.5)[:, 3:-3, 3:-3]
    assert torch.allclose(resized(image, (12, 18), "antialiased")[:, 3:-3, 3:-3], matlab, atol=1e-5)
    assert resized(image, (24, 36), "bicubic") is image


def test_sample_reads_the_centres_of_blocks():
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(60.0), indexing="ij")
    plane = (0.01 * x - 0.004 * y + 0.3).expand(3, -1, -1)
    taken = Sample(factor=4, sigma=1.5)(plane, SIZE, rng())
    assert taken.shape == (3, 12, 15)
    assert torch.allclose(taken[:, 3:-3, 3:-3], F.avg_pool2d(plane, 4)[:, 3:-3, 3:-3], atol=1e-5)


def test_gaussian_noise():
    flat = torch.full((3, 200, 200), 0.5)
    colour = GaussianNoise(sigma=20.0)(flat, SIZE, rng()) - 0.5
    assert torch.allclose(colour.std(dim=(1, 2)), torch.tensor(20 / 255), rtol=0.02)
    assert abs(float((colour[0] * colour[1]).mean())) < 1e-4
    grey = GaussianNoise(sigma=20.0, kinds={"grey": 1})(flat, SIZE, rng()) - 0.5
    assert torch.allclose(grey[0], grey[1])
    assert torch.allclose(grey[0], grey[2])
    assert float(grey.std()) == pytest.approx(20 / 255, rel=0.02)
    # U has orthonormal rows and D lies in [0, 1]: no direction varies by more than |L^2 U^T D U| can
    for seed in range(20):
        noise = GaussianNoise(sigma=(2.0, 25.0), kinds={"correlated": 1})(flat, SIZE, rng(seed)) - 0.5
        covariance = torch.cov(noise.flatten(1)) * (255 / 25) ** 2
        assert float(covariance.diagonal().max()) < 1.1
        assert (covariance > -0.05).all()
    edge = GaussianNoise(sigma=60.0)(torch.ones(3, 50, 50), SIZE, rng())
    assert edge.max() == 1


def test_poisson_noise_has_the_variance_of_counts():
    levels = (torch.arange(256.0) / 255).repeat(2000, 1).expand(3, -1, -1)
    for kind in ("colour", "grey"):
        noise = PoissonNoise(strength=0.5, kinds={kind: 1})(levels, SIZE, rng()) - levels
        middle = noise[:, :, 60:196]
        expected = 0.25 * torch.arange(60.0, 196.0) / 255 / 256
        assert torch.allclose(middle.var(dim=1).mean(0), expected, rtol=0.15)
        assert float(middle.mean()) == pytest.approx(0, abs=1e-4)
        assert torch.allclose(middle[0], middle[1], atol=1e-6) == (kind == "grey")


def test_jpeg_is_libjpeg():
    image = photo(24, 40)
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(stream, "JPEG", quality=37)
    expected = torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1)
    assert torch.equal(Chain(scale=1, steps=(Compression(quality=37),))(image, rng()), expected)


def test_probabilities():
    image = torch.full((3, 12, 16), 0.5)
    changed = [
        not torch.equal(Chain(scale=1, steps=(GaussianNoise(probability=p),))(image, rng(seed)), image)
        for p in (0.0, 1.0, 0.3)
        for seed in range(500)
    ]
    shares = np.array(changed).reshape(3, 500).mean(1)
    assert shares[0] == 0
    assert shares[1] == 1
    assert shares[2] == pytest.approx(0.3, abs=0.07)
    # of `one_of` exactly one: a probability is its share
    either = OneOf(steps=(Resize(probability=0.2, of="result"), Resize(probability=0.6, chances={"up": 1}, up=2.0)))
    sides = Counter(either(image, (6, 8), rng(seed)).shape[1] for seed in range(1000))
    assert set(sides) == {6, 24}
    assert sides[6] / 1000 == pytest.approx(0.25, abs=0.05)
    assert [choice(rng(seed), {"a": 0.0, "b": 1.0}) for seed in range(50)] == ["b"] * 50


def test_random_orders_keep_the_order_of_resizes():
    first, second = Resize(chances={"down": 1}, down=0.5), Group(steps=(Resize(of="result"), Sinc()))
    steps = (Compression(), first, GaussianNoise(), second)
    orders = Counter(tuple(steps.index(step) for step in arranged(steps, rng(seed))) for seed in range(2400))
    assert len(orders) == 12
    assert max(orders.values()) < 1.5 * min(orders.values())
    assert all(order.index(1) < order.index(3) for order in orders)


@pytest.mark.parametrize("preset", ["real_esrgan", "bsrgan"])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_presets_end_with_the_exact_size(preset, scale):
    chain = Chain(scale=scale, steps=preset)
    for seed, (height, width) in enumerate([(9, 13), (1, 1), (17, 2)] * 3):
        clean = photo(height * scale, width * scale)
        degraded = chain(clean, rng(seed))
        assert degraded.dtype == torch.uint8
        assert degraded.shape == (3, height, width)
    for image in (clean, clean.float() / 255, clean.double() / 255):
        degraded = chain(image, rng(7))
        assert degraded.dtype == image.dtype
        assert torch.equal(degraded, chain(image, rng(7)))
        assert not torch.equal(degraded, chain(image, rng(8)))
    assert degraded.min() >= 0
    assert degraded.max() <= 1
    assert torch.equal(clean, photo(17 * scale, 2 * scale))  # not written to


def test_real_esrgan_has_the_published_numbers():
    blur, _, noise, jpeg, blur2, _, noise2, last = published("real_esrgan", 4)
    for step, probability, sigma in ((blur, 1.0, (0.2, 3.0)), (blur2, 0.8, (0.2, 1.5))):
        small, large, shaped = step.steps
        assert step.probability == probability
        assert shaped.sigma == sigma
        assert shaped.size == (7, 21)
        assert small.probability + large.probability == pytest.approx(0.1)
        assert shaped.probability == 0.9
        assert list(shaped.shapes.values()) == [0.45, 0.25, 0.12, 0.03, 0.12, 0.03]
        assert (shaped.beta_generalised, shaped.beta_plateau) == ((0.5, 4), (1, 2))
        assert (small.size, small.cutoff, large.size, large.cutoff) == ((7, 11), (1 / 3, 1), (13, 21), (1 / 5, 1))
    for step, sigma, strength in ((noise, 30, 3), (noise2, 25, 2.5)):
        gaussian, poisson = step.steps
        assert gaussian.sigma == (1, sigma)
        assert poisson.strength == (0.05, strength)
        assert gaussian.probability == poisson.probability == 0.5
        assert gaussian.kinds == poisson.kinds == {"colour": 0.6, "grey": 0.4}
    finish, jpeg2 = last.steps
    assert last.shuffle
    assert jpeg.quality == jpeg2.quality == (30, 95)
    assert finish.steps[1].probability == 0.8
    assert finish.steps[1].cutoff == (1 / 3, 1)
    assert Chain(steps="real_esrgan").window_size == 400
    assert Chain(steps="bsrgan").window_size == 0


def test_bsrgan_has_the_published_numbers():
    halved, straight = published("bsrgan", 4)[0].steps
    assert (halved.probability, straight.probability) == (0.25, 0.75)
    for steps, factor in ((halved.steps[1:], 2), (straight.steps, 4), (published("bsrgan", 3), 3)):
        shuffled, last = steps
        blur, again, smaller, to_result, noise, jpeg = shuffled.steps
        assert shuffled.shuffle
        assert blur == again
        turned, isotropic = blur.steps
        assert turned.sigma[1] ** 2 == pytest.approx(4 + factor)
        assert turned.uniform_in == "variance"
        assert isotropic.sigma[1] == pytest.approx(2 + 0.2 * factor)
        assert turned.size == isotropic.size == (7, 25)
        assert smaller.steps[0].down == (0.5 / factor, 1)
        assert smaller.steps[0].probability == 0.75
        assert smaller.steps[1].sigma == (0.1, pytest.approx(0.6 * factor))
        assert smaller.steps[1].factor == factor
        assert to_result.of == "result"
        assert noise.sigma == (2, 25)
        assert noise.kinds == {"colour": 0.4, "grey": 0.4, "correlated": 0.2}
        assert (jpeg.probability, jpeg.quality, last.quality) == (0.9, (30, 95), (30, 95))


def test_crop_is_cut_from_the_window_where_it_lies():
    clean = photo(80, 96)
    row = Row(clean=png(clean), degraded=None, key="a", where="row 0")
    sized = (Resize(of="result", modes=("area",)),)
    whole = F.avg_pool2d(clean.float() / 255, 4)
    for window in (None, 48, 400):
        offsets = set()
        for seed in range(12):
            chain = Chain(scale=4, steps=sized, window=window)
            degraded, crop = training_pair(row, 32, 4, chain, "none", rng(seed))
            assert crop.shape == (3, 32, 32)
            assert degraded.shape == (3, 8, 8)
            mean = F.avg_pool2d(torch.from_numpy(np.ascontiguousarray(crop)).float() / 255, 4)
            assert np.allclose(degraded / 255.0, mean, atol=0.51 / 255)
            blurred, _ = training_pair(
                row, 32, 4, Chain(scale=4, steps=(Blur(size=9, sigma=3.0), *sized), window=window), "none", rng(seed)
            )
            near = [
                (top, left)
                for top in range(13)
                for left in range(17)
                if torch.allclose(whole[:, top : top + 8, left : left + 8], mean, atol=1e-6)
            ]
            offsets.add(near[0])
            if window == 400:  # the image's own borders apart, no border is felt
                reference = Chain(scale=4, steps=(Blur(size=9, sigma=3.0), *sized))(clean, rng())
                top, left = near[0]
                assert np.array_equal(blurred, reference[:, top : top + 8, left : left + 8])
        assert len(offsets) > 6


def test_any_degradation_of_the_image_s_size_is_a_step():
    image = photo(24, 36)
    blurred = MotionBlur(length=9.0, angle=20.0)(image.float() / 255, rng())
    step = Apply(degradation=MotionBlur(length=9.0, angle=20.0))
    assert torch.allclose(step(image.float() / 255, SIZE, rng()), blurred)
    assert Chain(scale=1, steps=(Apply(degradation=Rain()), Apply(degradation=MotionBlur())))(image, rng()).shape == (
        image.shape
    )


def test_config():
    adapter: TypeAdapter = TypeAdapter(AnyDegradation)
    chain = adapter.validate_python(
        {
            "name": "chain",
            "scale": 2,
            "shuffle": True,
            "steps": [
                {"name": "blur", "shapes": {"plateau_isotropic": 1}, "size": 9, "probability": 0.5},
                {"name": "one_of", "steps": [{"name": "noise", "sigma": 4}, {"name": "poisson"}]},
                {"name": "apply", "degradation": {"name": "rain"}},
            ],
        }
    )
    assert chain(photo(20, 30), rng()).shape == (3, 10, 15)
    assert adapter.validate_python(adapter.dump_python(chain)) == chain
    for steps in (
        "real",
        [],
        [{"name": "blur", "size": 8}],
        [{"name": "blur", "size": [9, 7]}],
        [{"name": "blur", "shapes": {"isotropic": 0}}],
        [{"name": "blur", "shapes": {"round": 1}}],
        [{"name": "resize", "down": [0.5, 1.5]}],
        [{"name": "resize", "up": 0.5}],
        [{"name": "sinc", "cutoff": [0.5, 1.5]}],
        [{"name": "noise", "probability": 1.1}],
        [{"name": "apply", "degradation": {"name": "bicubic"}}],
        [{"name": "apply", "degradation": {"name": "haze", "depth": "depth"}}],
        [{"name": "group", "steps": []}],
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python({"name": "chain", "steps": steps})
    with pytest.raises(ValueError, match="multiple of 4"):
        Chain(steps="bsrgan")(photo(21, 24), rng())
