"""From an undecoded row to a training crop or a whole validation pair; every random draw comes from the generator
given.

Images are (3, H, W), uint8 (or float32 in [0, 1] where the file holds 16 bits). Crops are taken before any conversion.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mcir.data.chain import AnyDegradation, Chain
from mcir.data.decode import decode, image_size
from mcir.data.degrade import Bicubic
from mcir.data.resize import imresize_crop, window
from mcir.data.rows import Row
from mcir.errors import UserError

Augment = Literal["dihedral", "hflip", "flips", "none"]
"""`dihedral`: the 8 flips and rotations; `hflip`: mirrored or not; `flips`: half of the images as they are, a quarter
mirrored each way (as IDT trains); `none`."""
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


@dataclass(frozen=True)
class Kept:
    """Decoded images of one source, so that a process decodes them once and not once an epoch: those of 8 bits and of
    at most `num_bytes`, whole."""

    num_bytes: int = 0
    images: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)

    def decoded(self, row: Row, column: str, bottom: int | None = None) -> Tensor:
        """As `decode` gives it, and not to be written to."""
        data = {**row.extra, "clean": row.clean, "degraded": row.degraded}[column]
        assert data is not None
        where = f"{row.where}, {column}"
        if not self.num_bytes:
            return decode(data, where, bottom)
        name = row.where, row.key, column  # by the former alone a clean image may have several degraded ones
        if name in self.images:
            return self.images[name]
        height, width = image_size(data, where)
        is_kept = 3 * height * width <= self.num_bytes
        image = decode(data, where, None if is_kept else bottom)
        if is_kept and image.dtype == torch.uint8:
            self.images[name] = image
        return image


def validation_pair(
    row: Row, scale: int, degradation: AnyDegradation | None, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """(degraded, clean), whole; clean is cropped at the bottom and right to a multiple of `scale`."""
    height, width = _degraded_size(row, scale, degradation)
    clean = decode(row.clean, f"{row.where}, clean")[:, : height * scale, : width * scale]
    if row.degraded is not None:
        return decode(row.degraded, f"{row.where}, degraded"), clean
    assert degradation is not None
    images = {name: _further(row, name)[:, : height * scale, : width * scale] for name in degradation.columns}
    return degradation.of(clean, rng, images), clean


def training_pair(
    row: Row,
    crop_size: int,
    scale: int,
    degradation: AnyDegradation | None,
    augment: Augment,
    rng: np.random.Generator,
    edge_decay: float = 0.0,
    reflect_small: bool = False,
    columns: Sequence[str] = (),
    undegraded: bool = False,
    kept: Kept | None = None,
) -> tuple[Pixels, ...]:
    """(degraded, clean, those of further `columns`): the same random window of all, `crop_size` pixels square, degraded
    crop_size / scale; views with any strides, which are copied once, into their batch. `undegraded`, for bicubic: in
    place of the pair the clean crop with what `shrink` reaches around it, 2 * scale pixels on each side, and, as an
    image of one pixel, whether both are still to be transposed, since rows are made smaller before columns.

    Images are decoded as far down as the window reaches, or taken from those `kept`.

    UserError where the pair's sizes do not fit each other, or the image is smaller than the crop and `reflect_small`,
    which mirrors it at its lower and right border, is not set, or `undegraded` has more than 8 bits.
    """
    kept = kept or Kept()
    height, width = _degraded_size(row, scale, degradation)
    size = crop_size // scale
    is_small = height < size or width < size
    if is_small and not reflect_small:
        clean_size = image_size(row.clean, f"{row.where}, clean")
        raise UserError(
            f"{row.where}: the clean image is {clean_size[0]} x {clean_size[1]}, smaller than the crop of "
            f"{crop_size}; lower data.crop_size, set data.small_images to reflect, or leave small images out"
        )
    num_rows, num_columns = max(height, size), max(width, size)
    top, left = (_start(side, size, edge_decay, rng) for side in (num_rows, num_columns))
    below = (top + size) * scale
    if isinstance(degradation, Bicubic):
        below += 2 * scale  # its kernel reaches beyond the crop
    elif isinstance(degradation, Chain):
        below += degradation.window_size
    clean = kept.decoded(row, "clean", below)
    if is_small:
        clean = _reflected(clean[:, : height * scale, : width * scale], crop_size)
    if isinstance(degradation, Bicubic):
        multiple = clean[:, : num_rows * scale, : num_columns * scale]
        if undegraded:
            if clean.dtype != torch.uint8:
                raise UserError(f"{row.where}: has 16 bits, and data.degrade_on_device needs 8: leave that out")
            around = window(multiple, scale, top, left, size, size)
        else:
            degraded = imresize_crop(multiple, 1 / scale, top, left, size, size)
    elif isinstance(degradation, Chain):
        wide = max(size, degradation.window_size // scale)
        v, u = (_around(*side, size, wide, rng) for side in ((num_rows, top), (num_columns, left)))
        seen = clean[:, v.start * scale : v.stop * scale, u.start * scale : u.stop * scale]
        degraded = degradation(seen, rng)[:, top - v.start :, left - u.start :][:, :size, :size]
    y, x = slice(top * scale, top * scale + crop_size), slice(left * scale, left * scale + crop_size)
    clean = clean[:, y, x]

    def further(name: str) -> Tensor:
        image = _further(row, name, y.stop, kept)
        if is_small:
            image = _reflected(image[:, : height * scale, : width * scale], crop_size)
        return image[:, y, x]

    if row.degraded is not None:
        degraded = kept.decoded(row, "degraded", top + size)
        if is_small:
            degraded = _reflected(degraded, size)
        degraded = degraded[:, top : top + size, left : left + size]
    elif not isinstance(degradation, Bicubic | Chain):
        assert degradation is not None
        degraded = degradation.of(clean, rng, {name: further(name) for name in degradation.columns})
    turn = _turn(augment, rng)
    others = [_turned(further(name), *turn) for name in columns]
    if undegraded:
        transposed = np.full((3, 1, 1), turn[2], np.uint8)
        return _turned(around, *turn[:2], False), transposed, *others
    return _turned(degraded, *turn), _turned(clean, *turn), *others


def _further(row: Row, column: str, bottom: int | None = None, kept: Kept | None = None) -> Tensor:
    """The image of a further column, (3, H, W) as clean. UserError where it has another size."""
    found, wanted = image_size(row.extra[column], f"{row.where}, {column}"), image_size(row.clean, row.where)
    if found != wanted:
        raise UserError(
            f"{row.where}: {column} is {found[0]} x {found[1]} and clean {wanted[0]} x {wanted[1]}: they should be of "
            "one size"
        )
    return (kept or Kept()).decoded(row, column, bottom)


def _reflected(image: Tensor, least: int) -> Tensor:
    """(3, H, W), sides of at least `least`: mirrored at the lower and right border, with the border pixel."""
    for dim in (-2, -1):
        side = image.shape[dim]
        index = torch.arange(max(side, least)) % (2 * side)
        image = image.index_select(dim, torch.where(index < side, index, 2 * side - 1 - index))
    return image


def _start(side: int, size: int, edge_decay: float, rng: np.random.Generator) -> int:
    """Where a crop of `size` pixels begins along a side: anywhere, or with a probability of edge_decay * size / side at
    one of the ends."""
    if edge_decay and rng.random() < edge_decay * size / side:
        return int(rng.integers(2)) * (side - size)
    return int(rng.integers(side - size + 1))


def _around(side: int, start: int, size: int, window: int, rng: np.random.Generator) -> slice:
    """`window` pixels of a side, or all of it where it is shorter, that hold the crop anywhere in them."""
    window = min(window, side)
    first = int(rng.integers(max(0, start + size - window), min(start, side - window) + 1))
    return slice(first, first + window)


def _degraded_size(row: Row, scale: int, degradation: AnyDegradation | None) -> tuple[int, int]:
    """(H, W) of the degraded image, there or to be made, from the headers."""
    height, width = image_size(row.clean, f"{row.where}, clean")
    expected = height // scale, width // scale
    if row.degraded is None:
        if degradation is None:
            raise UserError(f"{row.where} has no degraded image; pack pairs, or give the source a `degradation`")
        return expected
    if degradation is not None:
        raise UserError(f"{row.where} has a degraded image and the source a `degradation` too; remove one of them")
    size = image_size(row.degraded, f"{row.where}, degraded")
    if size != expected:
        raise UserError(
            f"{row.where}: degraded is {size[0]} x {size[1]} and clean {height} x {width}; "
            f"at scale {scale} degraded should be {expected[0]} x {expected[1]}"
        )
    return size


def _turn(augment: Augment, rng: np.random.Generator) -> tuple[bool, bool, bool]:
    """Whether to flip vertically and horizontally, and then to transpose."""
    vertical = horizontal = transpose = False
    if augment == "dihedral":
        vertical, horizontal, transpose = (bool(rng.integers(2)) for _ in range(3))
    elif augment == "hflip":
        horizontal = bool(rng.integers(2))
    elif augment == "flips":
        draw = int(rng.integers(4))
        vertical, horizontal = draw == 1, draw == 2
    return vertical, horizontal, transpose


def _turned(image: Tensor, vertical: bool, horizontal: bool, transpose: bool) -> Pixels:
    view = image.numpy()[:, :: -1 if vertical else 1, :: -1 if horizontal else 1]
    return view.swapaxes(1, 2) if transpose else view
