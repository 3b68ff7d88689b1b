"""MATLAB's bicubic `imresize`, in torch: the degradation behind every published super-resolution table.

For bytes made smaller by 2, 3 or 4 the kernel's weights are whole numbers over 256, 81 or 4096, so sums of them are
exact in fp32, in whatever order and on whatever device they are taken: `shrink` is that case, of a whole batch too.

Invariants: uint8 in gives MATLAB's uint8 out (each of the two passes is rounded half up and clipped, rows before
columns), so low-resolution images made here equal the published files value for value. An output value depends on the
image only, never on the window it is computed in: positions are integers over a common denominator, and the taps are
added one after the other in one order, so resizing a crop gives the same bits as cropping the resized whole.
"""

from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def imresize(image: Tensor, scale: float | Fraction) -> Tensor:
    """Resize (..., H, W) to (..., ceil(H * scale), ceil(W * scale)) as MATLAB's `imresize(image, scale, "bicubic")`.

    `image` is uint8, or float in any range (float32 and float64 keep their type and are neither rounded nor clipped;
    half types are computed in float32). `scale` is output side / input side; write 1/3 or Fraction(1, 3).
    Antialiased when shrinking. Crop `image` to a multiple of k first where scale is 1/k: published LR files are
    made so, and the pixel grids of both images then coincide.

    Keys' cubic convolution kernel with a = -0.5, widened by 1 / scale when shrinking, borders mirrored including the
    border pixel: R. Keys, "Cubic convolution interpolation for digital image processing", IEEE TASSP 1981, and the
    behaviour of MATLAB's imresize.
    """
    ratio = _ratio(scale)
    height, width = (resized_side(side, ratio) for side in image.shape[-2:])
    return imresize_crop(image, ratio, 0, 0, height, width)


def imresize_crop(image: Tensor, scale: float | Fraction, top: int, left: int, height: int, width: int) -> Tensor:
    """`imresize(image, scale)[..., top : top + height, left : left + width]`, the same bits, at the cost of the crop.

    `image` is the whole image (..., H, W); the window is in pixels of the result. Only the pixels under the window
    and its margin are read, and borders are mirrored only where the window touches them.
    """
    ratio = _ratio(scale)
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"imresize takes uint8 or float images, not {image.dtype}")
    num_rows, num_columns = image.shape[-2:]
    for name, start, count, side in (("rows", top, height, num_rows), ("columns", left, width, num_columns)):
        resized = _times(side, ratio)
        if not (0 <= start <= start + count <= resized):
            raise ValueError(f"{name} {start}..{start + count} are outside the {resized} {name} resized to")
    if height == 0 or width == 0:
        return image.new_empty((*image.shape[:-2], height, width))
    if image.dtype == torch.uint8 and ratio.numerator == 1 and ratio.denominator in _WHOLE:
        around = window(image, ratio.denominator, top, left, height, width)
        flat = around[None].flatten(0, -4) if image.dim() > 2 else around[None, None]
        return shrink(flat, ratio.denominator).view(*image.shape[:-2], height, width)
    rows, row_weights = _taps(num_rows, ratio, top, height)
    columns, column_weights = _taps(num_columns, ratio, left, width)
    # Each pass is local to the other dimension, so everything outside the window and its margin can go first.
    first_row, first_column = int(rows.min()), int(columns.min())
    image = image[..., first_row : int(rows.max()) + 1, first_column : int(columns.max()) + 1]
    image = _resize_rows(image, rows - first_row, row_weights)
    return _resize_rows(image.mT, columns - first_column, column_weights).mT.contiguous()


_WHOLE: dict[int, tuple[int, tuple[int, ...]]] = {
    2: (256, (-3, -9, 29, 111, 111, 29, -9, -3)),
    3: (81, (-1, -2, 0, 9, 21, 27, 21, 9, 0, -2, -1)),
    4: (4096, (-7, -45, -75, -49, 93, 399, 745, 987, 987, 745, 399, 93, -49, -75, -45, -7)),
}
"""By how much smaller: what the weights are divided by, the weights."""


def window(image: Tensor, factor: int, top: int, left: int, height: int, width: int) -> Tensor:
    """What `shrink` makes this window of the small image from: `factor` times its size and 2 * factor more on each
    side, as far as the kernel reaches, mirrored where that lies outside of `image` (..., H, W)."""
    missing = []
    for dim, start, count in ((-2, top, height), (-1, left, width)):
        first, last = (start - 2) * factor, (start + count + 2) * factor
        side = image.shape[dim]
        missing.append((max(0, -first), max(0, last - side)))
        image = image[..., max(0, first) : last, :] if dim == -2 else image[..., max(0, first) : last]
    if missing == [(0, 0), (0, 0)]:
        return image
    # As decoders lay them out. What is cut off was farther from the border than the kernel reaches beyond it.
    pixels = np.moveaxis(image.cpu().numpy(), (-2, -1), (0, 1))
    mirrored = np.pad(pixels, [*missing, *[(0, 0)] * (pixels.ndim - 2)], "symmetric")
    return torch.from_numpy(np.moveaxis(mirrored, (0, 1), (-2, -1))).to(image.device)


def shrink(window: Tensor, factor: int) -> Tensor:
    """uint8 (B, C, factor * (h + 4), factor * (w + 4)) to (B, C, h, w): rows, then columns, each rounded."""
    whole, _ = _WHOLE[factor]
    if window.device.type == "cpu" and whole & (whole - 1) == 0:
        # torch's own kernel for bytes has weights of 16 bits, as these are, and rounds half up, too; borders apart.
        # It is fastest where the colours of a pixel lie together.
        height, width = (side // factor for side in window.shape[-2:])
        window = window.clone(memory_format=torch.channels_last)  # which, of one image, contiguous() may not make it
        rows = F.interpolate(window, (height, width * factor), mode="bicubic", antialias=True)[..., 2:-2, :]
        return F.interpolate(rows, (height - 4, width), mode="bicubic", antialias=True)[..., 2:-2].contiguous()
    exact = _shrink_rows(window.to(torch.float32, memory_format=torch.contiguous_format), factor)
    return _shrink_rows(exact.mT.contiguous(), factor).mT.to(torch.uint8, memory_format=torch.contiguous_format)


def _shrink_rows(image: Tensor, factor: int) -> Tensor:
    """Bytes as fp32, (..., factor * (h + 4), W) to (..., h, W)."""
    whole, weights = _WHOLE[factor]
    first, num = 2 * factor - (len(weights) - factor) // 2, image.shape[-2] - 4 * factor
    total = torch.zeros_like(image[..., :num:factor, :])
    for tap, weight in enumerate(weights, first):
        total.add_(image[..., tap : tap + num : factor, :], alpha=weight)
    return total.add_(whole / 2).div_(whole).floor_().clamp_(0, 255)


def resized_side(side: int, scale: float | Fraction) -> int:
    """The side of the resized image, ceil(side * scale), without the floating-point surprise of 99 * (1 / 3)."""
    return _times(side, _ratio(scale))


def _times(side: int, ratio: Fraction) -> int:
    return -(-side * ratio.numerator // ratio.denominator)


@lru_cache
def _ratio(scale: float | Fraction) -> Fraction:
    """The fraction meant by a float such as 1 / 3 (MATLAB's own arithmetic on 1 / 3 lands on the same pixel grid)."""
    ratio = Fraction(scale).limit_denominator(1_000_000)
    if ratio <= 0:
        raise ValueError(f"scale must be positive, not {scale}")
    return ratio


def _keys_cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _taps(side: int, ratio: Fraction, start: int, count: int) -> tuple[Tensor, Tensor]:
    """For output positions start .. start + count: input indices (P, count) and float64 weights (P, count).

    Input coordinate of output x is u = (x + 1/2) / scale - 1/2 = ((2x + 1) q - p) / 2p for scale p/q, kept as its
    integer numerator: the distances tap - u, and with them the weights, repeat exactly however far along x is.
    """
    p, q = ratio.numerator, ratio.denominator
    shrink = max(p, q)  # the kernel is 4 * shrink / p input pixels wide
    centre = (2 * np.arange(start, start + count, dtype=np.int64) + 1) * q - p
    first = (centre - 4 * shrink) // (2 * p)
    taps = first + np.arange(4 * shrink // p + 3)[:, None]
    weights = _keys_cubic((2 * p * taps - centre) / (2 * shrink))
    weights /= weights.sum(axis=0)
    used = weights.any(axis=1)
    mirrored = taps[used] % (2 * side)
    indices = np.where(mirrored < side, mirrored, 2 * side - 1 - mirrored)
    return torch.from_numpy(indices), torch.from_numpy(weights[used])


def _resize_rows(image: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """One pass over dim -2. Multiply and add stay two roundings (no fused addcmul), the same at any offset."""
    # uint8 in float64: exact ties at x.5 (common at x2) stay exact, everything else is far from one.
    compute = {torch.uint8: torch.float64, torch.float64: torch.float64}.get(image.dtype, torch.float32)
    weights = weights.to(image.device, compute)[..., None]  # (P, count, 1)
    rows = rows.to(image.device)
    total = weights.new_zeros(())
    for tap, weight in zip(rows, weights, strict=True):
        total = total + image.index_select(-2, tap).to(compute) * weight
    if image.dtype == torch.uint8:
        return (total + 0.5).floor_().clamp_(0, 255).to(torch.uint8)
    return total.to(image.dtype)
