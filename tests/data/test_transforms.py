import io

import numpy as np
import pytest
import torch
from PIL import Image

from mcir.data.degrade import Bicubic, Haze
from mcir.data.resize import imresize
from mcir.data.rows import Row
from mcir.data.transforms import Kept, training_pair, validation_pair
from mcir.errors import UserError


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def picture(height: int, width: int) -> np.ndarray:
    """Red tells the row, green the column, blue is noise."""
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 256, (height, width))
    return np.stack([rows, columns, noise], axis=2).astype(np.uint8)


def windows(row: Row, crop_size: int, scale: int, degradation: Bicubic | Haze | None) -> set[int]:
    """Compares 60 training pairs with the same windows of the whole images, and with those of kept images; the tops
    that came."""
    degraded, clean = validation_pair(row, scale, degradation, np.random.default_rng(0))
    tops, kept = set(), Kept(10**6)
    for seed in range(60):
        low, high = training_pair(row, crop_size, scale, degradation, "none", np.random.default_rng(seed))
        again = training_pair(row, crop_size, scale, degradation, "none", np.random.default_rng(seed), kept=kept)
        for image, same in zip((low, high), again, strict=True):
            np.testing.assert_array_equal(image, same)
        top, left = int(high[0, 0, 0]), int(high[1, 0, 0])
        assert (top % scale, left % scale) == (0, 0)
        np.testing.assert_array_equal(high, clean[:, top : top + crop_size, left : left + crop_size])
        size, top, left = crop_size // scale, top // scale, left // scale
        np.testing.assert_array_equal(low, degraded[:, top : top + size, left : left + size])
        tops.add(top)
    return tops


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_a_training_pair_is_one_window_of_both_images(scale):
    clean = picture(100, 70)
    degraded = encode(clean[: 100 // scale * scale : scale, : 70 // scale * scale : scale])
    assert len(windows(Row("a", encode(clean), degraded, "here"), 60, scale, None)) > 8


def test_haze_over_a_column_of_depth():
    """I = J t + A (1 - t), t = exp(-beta d), with d of 16 bits; of a crop, the crop of the whole."""
    clean, depth = picture(90, 70), np.random.default_rng(1).integers(0, 2**16, (90, 70), dtype=np.uint16)
    row = Row("a", encode(clean), None, "here", {"d": encode(depth)})
    haze = Haze(beta=1.1, airlight=0.8, depth="d")
    assert len(windows(row, 60, 1, haze)) > 8
    hazy, _ = validation_pair(row, 1, haze, np.random.default_rng(0))
    t = np.exp(-1.1 * depth / 65535)[..., None]
    expected = np.floor(255 * (clean / 255 * t + 0.8 * (1 - t)) + 0.5)
    assert np.abs(hazy.permute(1, 2, 0).numpy() - expected).max() <= 1  # fp32 at a half
    assert (hazy.permute(1, 2, 0).numpy() == expected).mean() > 0.999
    small = Row("a", encode(clean), None, "here", {"d": encode(depth[:80])})
    for pair in (
        lambda: validation_pair(small, 1, haze, np.random.default_rng(0)),
        lambda: training_pair(small, 60, 1, haze, "none", np.random.default_rng(0)),
    ):
        with pytest.raises(UserError, match="here: d is 80 x 70 and clean 90 x 70: they should be of one size"):
            pair()


def test_kept_images_are_decoded_once():
    """They come though the file has no more than a header since; of one clean image each degraded one is kept."""
    clean, deep = picture(20, 30), np.random.default_rng(1).integers(0, 2**16, (20, 30), dtype=np.uint16)
    files = {name: encode(picture) for name, picture in (("a", clean), ("b", 255 - clean))}
    kept = Kept(3 * 20 * 30)
    for cut in (None, 45):
        for key, file in files.items():
            row = Row(key, files["a"][:cut], file[:cut], "here", {"d": encode(deep)[:cut]})
            degraded, same = training_pair(row, 20, 1, None, "none", np.random.default_rng(0), kept=kept)
            left = int(same[1, 0, 0])
            np.testing.assert_array_equal(same, clean[:, left : left + 20].transpose(2, 0, 1))
            np.testing.assert_array_equal(degraded, same if key == "a" else 255 - same)
    with pytest.raises(UserError, match="here, d: the PNG image is truncated"):  # 16 bits
        kept.decoded(row, "d")
    with pytest.raises(UserError, match="here, clean: the PNG image is truncated"):
        Kept(3 * 20 * 30 - 1).decoded(row, "clean")
    assert len(kept.images) == 4


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_of_a_window_is_the_window_of_the_whole_resized(scale):
    """Though the image is decoded no further than the kernel reaches."""
    clean = picture(101, 71)
    row = Row("a", encode(clean), None, "here")
    assert len(windows(row, 48, scale, Bicubic(scale=scale))) > 8
    whole = torch.from_numpy(clean[: 101 // scale * scale, : 71 // scale * scale]).permute(2, 0, 1)
    degraded, _ = validation_pair(row, scale, Bicubic(scale=scale), np.random.default_rng(0))
    assert torch.equal(degraded, imresize(whole, 1 / scale))


@pytest.mark.parametrize("edge_decay", [0.0, 0.5, 1.0])
def test_edge_decay_draws_crops_at_the_borders_as_often_as_published(edge_decay):
    """Per side: flush with either end by edge_decay * crop / image / 2, and by chance; within 5 standard deviations."""
    row = Row("a", encode(picture(60, 90)), encode(picture(60, 90)), "here")
    corners = []
    for seed in range(2000):
        _, clean = training_pair(row, 30, 1, None, "none", np.random.default_rng(seed), edge_decay)
        corners.append((int(clean[0, 0, 0]), int(clean[1, 0, 0])))
    for starts, side in zip(zip(*corners, strict=True), (60, 90), strict=True):
        chosen = edge_decay * 30 / side
        expected = chosen / 2 + (1 - chosen) / (side - 30 + 1)
        for end in (0, side - 30):
            share = np.mean(np.array(starts) == end)
            assert abs(share - expected) <= 5 * (expected * (1 - expected) / 2000) ** 0.5


@pytest.mark.parametrize(("height", "width"), [(20, 90), (90, 20), (20, 20), (14, 61)])
def test_small_images_are_mirrored_at_the_lower_and_right_border(height, width):
    """As numpy's symmetric padding of both halves; the crop may lie anywhere along a side that is long enough."""
    clean = picture(height + 1, width)  # not quite twice the degraded image
    degraded = clean[: height // 2 * 2 : 2, : width // 2 * 2 : 2]
    row = Row("a", encode(clean[: height // 2 * 2 + height % 2]), encode(degraded), "here")
    padded = [
        np.pad(image, [(0, max(0, least - side)) for side in image.shape[:2]] + [(0, 0)], mode="symmetric")
        for image, least in ((degraded, 30), (clean[: height // 2 * 2, : width // 2 * 2], 60))
    ]
    for seed in range(20):
        low, high = training_pair(row, 60, 2, None, "none", np.random.default_rng(seed), reflect_small=True)
        top, left = int(low[0, 0, 0]) // 2, int(low[1, 0, 0]) // 2
        np.testing.assert_array_equal(low, padded[0][top : top + 30, left : left + 30].transpose(2, 0, 1))
        np.testing.assert_array_equal(
            high, padded[1][2 * top : 2 * top + 60, 2 * left : 2 * left + 60].transpose(2, 0, 1)
        )
    with pytest.raises(UserError, match=r"set data\.small_images to reflect"):
        training_pair(row, 60, 2, None, "none", np.random.default_rng(0))


def test_unequal_sizes_are_named_before_anything_is_decoded():
    row = Row("a", encode(picture(40, 40))[:99], encode(picture(19, 20))[:99], "here")
    for pair in (
        lambda: training_pair(row, 8, 2, None, "none", np.random.default_rng(0)),
        lambda: validation_pair(row, 2, None, np.random.default_rng(0)),
    ):
        with pytest.raises(UserError, match=r"^here: degraded is 19 x 20 and clean 40 x 40; at scale 2 .* 20 x 20$"):
            pair()
