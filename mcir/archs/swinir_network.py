"""spandrel's SwinIR, mended where it does not fit our ways. Apart from swinir.py: importing spandrel takes as long as
importing torch."""

from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from spandrel.architectures.SwinIR import SwinIR as SpandrelSwinIR
from torch import Tensor


@lru_cache(maxsize=8)
def _shift_mask(window: int, shift: int, size: tuple[int, int]) -> np.ndarray:
    """`shift_mask` as numpy: a tensor kept from one call to the next would not survive tracing."""
    if shift == 0:
        return np.zeros((1, window**2, window**2), np.float32)
    row, col = (np.arange(side) >= side - shift for side in size)  # rolled in
    origin = 2 * row[:, None] + col[None]  # (H, W), the same all over a window but the last of a row or column
    origin = rearrange(origin, "(rows y) (cols x) -> (rows cols) (y x)", y=window, x=window)
    return np.where(origin[:, None] != origin[:, :, None], np.float32(-100), np.float32(0))


def shift_mask(window: int, shift: int, size: tuple[int, int]) -> Tensor:
    """What to add to the attention scores so that pixels rolled in from the far side do not attend to the others.

    0 or -100, (windows, N, N) with N = window^2; (1, N, N) without a shift. In bf16, which holds both values exactly
    and takes on the precision of the scores it is added to.
    """
    return torch.from_numpy(_shift_mask(window, shift, size)).bfloat16()


class SwinIR(SpandrelSwinIR):
    """(B, 3, H, W) in [0, 1] -> (B, 3, scale * H, scale * W), not clamped. Any size.

    Mended against the base: its forward leaves the image mean in the precision of the last input, and sizes other than
    `img_size` get fp32 masks, computed anew in each block, which a network cast to bf16 as a whole cannot add.
    """

    rgb_mean: Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("rgb_mean", self.mean, persistent=False)
        for block in self.modules():
            if isinstance(shift := getattr(block, "shift_size", None), int):
                block.calculate_mask = partial(shift_mask, block.window_size, shift)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.rgb_mean
        return super().forward(x)
