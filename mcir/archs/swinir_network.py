"""The network that `swinir.py` describes, apart from it: spandrel imports torchvision, which takes as long as torch.

spandrel's modules hold the weights, under the official keys. What they compute is computed here otherwise: the features
of a group stay in the order of windows from block to block, so that a block knows of no shift and no image (one
compiled graph serves all of them), and its attention adds bias and mask in one.
"""

from typing import Any

import torch
from einops import rearrange
from spandrel.architectures.SwinIR import SwinIR as SpandrelSwinIR
from spandrel.architectures.SwinIR.__arch import SwinIR as official
from torch import Tensor

from mcir.archs.attention import attend
from mcir.archs.base import DropPath

Size = tuple[int, int]


def to_windows(x: Tensor, size: Size, window: int, shift: int) -> Tensor:
    """(B, H * W, C), pixels in the order of the image -> same, window by window of the image rolled by `shift`."""
    x = x.unflatten(1, size)
    x = x.roll((-shift, -shift), (1, 2)) if shift else x
    return rearrange(x, "b (rows y) (cols x) c -> b (rows cols y x) c", y=window, x=window)


def to_image(x: Tensor, size: Size, window: int, shift: int) -> Tensor:
    """The inverse of `to_windows`."""
    rows = size[0] // window
    x = rearrange(x, "b (rows cols y x) c -> b (rows y) (cols x) c", rows=rows, y=window, x=window)
    return (x.roll((shift, shift), (1, 2)) if shift else x).flatten(1, 2)


def shift_mask(window: int, shift: int, size: Size, device: torch.device) -> Tensor:
    """What to add to the attention scores so that pixels rolled in from the far side do not attend to the others.

    0 or -100, (windows, N, N) with N = window^2; all 0 without a shift.
    """
    row, col = (torch.arange(side, device=device) >= side - shift for side in size)  # rolled in
    origin = 2 * row[:, None] + 1 * col[None]  # (H, W), the same all over a window but the last of a row or column
    origin = rearrange(origin, "(rows y) (cols x) -> (rows cols) (y x)", y=window, x=window)
    return -100.0 * (origin[:, None] != origin[:, :, None])


class Attention(official.WindowAttention):
    """(B, windows * N, C), (windows, N, N) -> (B, windows * N, C)"""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        num_windows, num_pixels, _ = mask.shape
        qkv = self.qkv(x).view(len(x), num_windows, num_pixels, 3, self.num_heads, -1)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each (B, windows, heads, N, D)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # (heads, N, N)
        attended = attend(q, k, v, bias + mask.to(bias.dtype)[:, None])
        return self.proj(attended.transpose(2, 3).reshape(x.shape))


class SwinTransformerBlock(official.SwinTransformerBlock):
    """Attention inside windows and MLP, each with a skip. (B, windows * N, C), (windows, N, N) -> first's shape."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Blocks(official.BasicLayer):
    """The blocks of a group, every second one in shifted windows. (B, H * W, C) -> same."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        masks = {
            block.shift_size: shift_mask(block.window_size, block.shift_size, size, x.device)
            for block in self.blocks[:2]
        }
        for block in self.blocks:
            x = to_windows(x, size, block.window_size, block.shift_size)
            x = block(x, masks[block.shift_size])
            x = to_image(x, size, block.window_size, block.shift_size)
        return x


EXCHANGED = {
    official.WindowAttention: Attention,
    official.SwinTransformerBlock: SwinTransformerBlock,
    official.BasicLayer: Blocks,
}


class SwinIR(SpandrelSwinIR):
    """(B, 3, H, W) in [0, 1] -> (B, 3, scale * H, scale * W), not clamped. Any size.

    Mended against the base: its forward leaves the image mean in the precision of the last input.
    """

    rgb_mean: Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("rgb_mean", self.mean, persistent=False)
        for module in self.modules():
            module.__class__ = EXCHANGED.get(type(module), type(module))
            if isinstance(module, SwinTransformerBlock):
                module.drop_path = DropPath(getattr(module.drop_path, "drop_prob", 0.0))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.rgb_mean
        return super().forward(x)
