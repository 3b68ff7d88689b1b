"""From an undecoded row to a training crop or a whole validation pair; every random draw comes from the generator
given.

Images are (3, H, W), uint8 (or float32 in [0, 1] where the file holds 16 bits). Crops are taken before any conversion.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mcir.data.decode import decode
from mcir.data.degrade import AnyDegradation, Bicubic
from mcir.data.resize import imresize_crop
from mcir.data.sources import Row
from mcir.errors import UserError

Augment = Literal["dihedral", "hflip", "flips", "none"]
"""`dihedral`: the 8 flips and rotations; `hflip`: mirrored or not; `flips`: half of the images as they are, a quarter
mirrored each way (as IDT trains); `none`."""
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


def validation_pair(
    row: Row, scale: int, degradation: AnyDegradation | None, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """(degraded, clean), whole; clean is cropped at the bottom and right to a multiple of `scale`."""
    clean, degraded = _decode(row, scale, degradation)
    if degraded is None:
        assert degradation is not None
        clean = clean[:, : clean.shape[1] // scale * scale, : clean.shape[2] // scale * scale]
        degraded = degradation(clean, rng)
    return degraded, clean


def training_pair(
    row: Row, crop_size: int, scale: int, degradation: AnyDegradation | None, augment: Augment, rng: np.random.Generator
) -> tuple[Pixels, Pixels]:
    """(degraded, clean): the same random window of both, clean `crop_size` pixels square, degraded crop_size / scale.

    Flipped and turned by their strides: the caller's copy of them is the only one.

    UserError where the pair's sizes do not fit each other or the image is smaller than the crop.
    """
    clean, degraded = _decode(row, scale, degradation)
    height, width = clean.shape[-2] // scale, clean.shape[-1] // scale
    size = crop_size // scale
    if height < size or width < size:
        raise UserError(
            f"{row.where}: the clean image is {clean.shape[-2]} x {clean.shape[-1]}, smaller than the crop of "
            f"{crop_size}; lower data.crop_size or leave small images out"
        )
    top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
    if degraded is not None:
        degraded = degraded[:, top : top + size, left : left + size]
    elif isinstance(degradation, Bicubic):  # its window reaches beyond the crop
        multiple = clean[:, : height * scale, : width * scale]
        degraded = imresize_crop(multiple, 1 / scale, top, left, size, size)
    clean = clean[:, top * scale : (top + size) * scale, left * scale : (left + size) * scale]
    if degraded is None:
        assert degradation is not None
        degraded = degradation(clean, rng)
    return _augment(augment, rng, degraded, clean)


def _decode(row: Row, scale: int, degradation: AnyDegradation | None) -> tuple[Tensor, Tensor | None]:
    clean = decode(row.clean, f"{row.where}, clean")
    if row.degraded is None:
        if degradation is None:
            raise UserError(f"{row.where} has no degraded image; pack pairs, or give the source a `degradation`")
        return clean, None
    if degradation is not None:
        raise UserError(f"{row.where} has a degraded image and the source a `degradation` too; remove one of them")
    degraded = decode(row.degraded, f"{row.where}, degraded")
    expected = [side // scale for side in clean.shape[-2:]]
    if list(degraded.shape[-2:]) != expected:
        raise UserError(
            f"{row.where}: degraded is {degraded.shape[-2]} x {degraded.shape[-1]} and clean "
            f"{clean.shape[-2]} x {clean.shape[-1]}; at scale {scale} degraded should be {expected[0]} x {expected[1]}"
        )
    return clean[:, : expected[0] * scale, : expected[1] * scale], degraded


def _augment(augment: Augment, rng: np.random.Generator, *images: Tensor) -> tuple[Pixels, Pixels]:
    vertical = horizontal = transpose = False
    if augment == "dihedral":
        vertical, horizontal, transpose = (bool(bit) for bit in rng.integers(2, size=3))
    elif augment == "hflip":
        horizontal = bool(rng.integers(2))
    elif augment == "flips":
        draw = int(rng.integers(4))
        vertical, horizontal = draw == 1, draw == 2
    rows, columns = slice(None, None, -1 if vertical else 1), slice(None, None, -1 if horizontal else 1)
    # A copy of the crop as it lies lets go of the whole image, and is read faster in any other order.
    degraded, clean = (image.numpy().copy(order="K")[:, rows, columns] for image in images)
    return (degraded.swapaxes(1, 2), clean.swapaxes(1, 2)) if transpose else (degraded, clean)
