from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mcir.data.resize import _shrink_rows, imresize, imresize_crop, resized_side, shrink, window

SCALES = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 4), Fraction(2), Fraction(3), Fraction(4), Fraction(3, 7)]


def defined_matrix(side: int, scale: float) -> np.ndarray:
    """The definition, one dense float64 matrix: a sum over every integer position of the infinitely mirrored signal."""
    num_out = int(np.ceil(round(side * scale, 9)))
    matrix = np.zeros((num_out, side))
    shrink = min(scale, 1.0)
    for x in range(num_out):
        centre = (x + 0.5) / scale - 0.5
        for tap in range(int(centre - 3 / shrink) - 3, int(centre + 3 / shrink) + 4):
            d = abs(tap - centre) * shrink
            if d <= 1:
                weight = 1.5 * d**3 - 2.5 * d**2 + 1
            elif d <= 2:
                weight = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
            else:
                continue
            source = tap
            while not 0 <= source < side:  # half-sample symmetric: -1 -> 0, side -> side - 1
                source = -1 - source if source < 0 else 2 * side - 1 - source
            matrix[x, source] += weight
    return matrix / matrix.sum(axis=1, keepdims=True)


def defined(image: np.ndarray, scale: float) -> np.ndarray:
    rows, columns = (defined_matrix(side, scale) for side in image.shape[-2:])
    return rows @ image @ columns.T


def read(path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_equals_the_published_low_resolution_set5(set5, factor):
    num_differing = {}
    for path in sorted((set5 / "HR").glob("*.png")):
        clean = read(path)
        height, width = (side // factor * factor for side in clean.shape[-2:])
        published = read(set5 / f"LR_bicubic/X{factor}/{path.stem}x{factor}.png")
        made = imresize(clean[:, :height, :width], 1 / factor)
        assert made.shape == published.shape
        num_differing[path.name] = int((made != published).sum())
    print(f"\nx{factor}: {sum(num_differing.values())} differing values of {len(num_differing)} images")
    assert not any(num_differing.values()), num_differing


@pytest.mark.parametrize("scale", [*SCALES, 0.731])
@pytest.mark.parametrize("shape", [(2, 3, 36, 60), (37, 23), (1, 3, 5)])
def test_float_equals_the_float64_definition(scale, shape):
    image = np.random.default_rng(0).normal(size=shape) * 3 - 1  # any range: no clipping
    expected = defined(image, float(scale))
    double = imresize(torch.from_numpy(image), scale)
    assert double.shape == expected.shape
    np.testing.assert_allclose(double.numpy(), expected, atol=1e-12 if scale in SCALES else 1e-9)
    unit = (image - image.min()) / np.ptp(image)
    single = imresize(torch.from_numpy(unit).float(), scale)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), defined(unit, float(scale)), atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_uint8_is_rounded_half_up_and_clipped_after_each_pass(scale):
    image = np.random.default_rng(1).choice([0, 1, 2, 128, 254, 255], size=(3, 48, 60)).astype(np.uint8)
    rows, columns = (defined_matrix(side, float(scale)) for side in image.shape[-2:])

    def quantise(x):  # + 1e-9: a tie that float64 missed by its last bit is still a tie
        return np.clip(np.floor(x + 0.5 + 1e-9), 0, 255)

    expected = quantise(quantise(rows @ image.astype(np.float64)) @ columns.T)
    result = imresize(torch.from_numpy(image), scale)
    assert result.dtype == torch.uint8
    assert (result.numpy() != expected).sum() == 0


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_a_crop_of_the_resized_whole_is_the_resized_crop_bit_for_bit(data):
    scale = data.draw(st.sampled_from(SCALES))
    sides = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    kind = data.draw(st.sampled_from([torch.uint8, torch.float32, torch.float64]))
    seed = data.draw(st.integers(0, 1000))
    image = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, *sides), dtype=np.uint8)).to(kind)
    whole = imresize(image, scale)
    top = data.draw(st.integers(0, whole.shape[-2]))
    left = data.draw(st.integers(0, whole.shape[-1]))
    height = data.draw(st.integers(0, whole.shape[-2] - top))
    width = data.draw(st.integers(0, whole.shape[-1] - left))
    crop = imresize_crop(image, scale, top, left, height, width)
    assert torch.equal(crop, whole[:, top : top + height, left : left + width])


def test_crop_holds_far_from_the_origin_too():
    image = torch.from_numpy(np.random.default_rng(2).random((3, 9, 6000), dtype=np.float32))
    whole = imresize(image, 1 / 3)
    assert torch.equal(imresize_crop(image, 1 / 3, 1, 1980, 2, 20), whole[:, 1:3, 1980:2000])


def test_gradients_flow_through_the_float_path():
    image = torch.rand(1, 12, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: imresize(x, 1 / 3), (image,))


def test_sizes_and_wrong_input():
    assert resized_side(99, 1 / 3) == 33
    assert resized_side(30, 1.1) == 33
    assert resized_side(10, 1 / 3) == 4
    with pytest.raises(ValueError, match=r"columns 3\.\.6 are outside"):
        imresize_crop(torch.zeros(8, 8), 1 / 2, 0, 3, 4, 3)
    with pytest.raises(ValueError, match=r"rows -1\.\.3 are outside"):
        imresize_crop(torch.zeros(8, 8), 1 / 2, -1, 0, 4, 3)
    with pytest.raises(ValueError, match="scale must be positive"):
        imresize(torch.zeros(8, 8), 0)
    with pytest.raises(ValueError, match="int64"):
        imresize(torch.zeros(8, 8, dtype=torch.int64), 2)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_batch_is_shrunken_to_the_same_bytes_on_every_path(factor):
    """Whole numbers in fp32, as a GPU takes them, against float64 and against torch's kernel for bytes: noise, and
    black and white, where most sums end in .5 or are clipped."""
    rng = np.random.default_rng(factor)
    for pixels in (rng.integers(0, 256, (2, 3, 60, 84)), 255 * rng.integers(0, 2, (2, 3, 60, 84))):
        rows, columns = (torch.from_numpy(defined_matrix(side, 1 / factor)) for side in (60, 84))
        expected = (rows @ torch.from_numpy(pixels).double() + 0.5 + 1e-9).floor().clamp(0, 255)
        expected = (expected @ columns.T + 0.5 + 1e-9).floor().clamp(0, 255).byte()
        around = window(torch.from_numpy(pixels.astype(np.uint8)), factor, 0, 0, 60 // factor, 84 // factor)
        assert torch.equal(shrink(around, factor), expected)
        exact = _shrink_rows(around.float(), factor)
        assert torch.equal(_shrink_rows(exact.mT, factor).mT.byte(), expected)
