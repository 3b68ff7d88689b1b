"""The network that `swinir.py` describes, apart from it: spandrel imports torchvision, which takes as long as torch.

spandrel's modules hold the weights, under the official keys. What they compute is computed here otherwise: the features
go straight from the order of one block's windows into that of the next one's, so that a block knows of no shift and no
image (one compiled graph serves all of them), its attention adds bias and mask in one, and what stochastic depth leaves
out is drawn for all blocks at once.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from spandrel.architectures.SwinIR import SwinIR as SpandrelSwinIR
from spandrel.architectures.SwinIR.__arch import SwinIR as official
from torch import Tensor

from mcir.archs.attention import attend

Size = tuple[int, int]
Kept = TypeVar("Kept")


def pixels(size: Size, window: int, shift: int | None, device: torch.device) -> Tensor:
    """(H * W,): the pixels, numbered as they are read, window by window of the image rolled by `shift`; None: as they
    are read."""
    image = torch.arange(size[0] * size[1], device=device).view(size)
    if shift is None:
        return image.flatten()
    return rearrange(image.roll((-shift, -shift), (0, 1)), "(rows y) (cols x) -> (rows cols y x)", y=window, x=window)


def kept(num: int) -> Callable[[Callable[..., Kept]], Callable[..., Kept]]:
    """Keeps the last `num` results, by arguments, of which the device is the last one; none of a graph that is traced,
    whose tensors hold no values, and for good what a CUDA graph reads."""

    def keep(function: Callable[..., Kept]) -> Callable[..., Kept]:
        remembered = lru_cache(maxsize=num)(torch.inference_mode(mode=False)(function))
        for_good: dict[Any, Kept] = {}

        @wraps(function)
        def call(*arguments: Any) -> Kept:
            if torch.compiler.is_compiling():
                return function(*arguments)
            result = remembered(*arguments)
            if arguments[-1].type == "cuda" and torch.cuda.is_current_stream_capturing():
                for_good[arguments] = result
            return result

        return call

    return keep


@kept(16)
def order(
    size: Size, window: int, shifts: tuple[int | None, int | None], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where, in the order of the first shift, what comes next in the order of the second one is; and its inverse."""
    before, after = (pixels(size, window, shift, device) for shift in shifts)
    places = before.argsort()[after]
    return places, places.argsort()


@kept(2)  # of large images they are large
def shift_mask(size: Size, window: int, shift: int, device: torch.device) -> Tensor:
    """What to add to the attention scores so that pixels rolled in from the far side do not attend to the others.

    0 or -100, (windows, N, N) with N = window^2; all 0 without a shift.
    """
    row, col = (torch.arange(side, device=device) >= side - shift for side in size)  # rolled in
    origin = 2 * row[:, None] + 1 * col[None]  # (H, W), the same all over a window but the last of a row or column
    origin = rearrange(origin, "(rows y) (cols x) -> (rows cols) (y x)", y=window, x=window)
    return -100.0 * (origin[:, None] != origin[:, :, None])


class _Reordered(torch.autograd.Function):
    """Its gradient is reordered too; torch's own would be added up into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0].index_select(1, *ctx.saved_tensors), None, None


class Attention(official.WindowAttention):
    """(B * windows * N, C), (windows, N, N) -> first's shape."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        num_windows, num_pixels, _ = mask.shape
        qkv = self.qkv(x).view(-1, num_windows, num_pixels, 3, self.num_heads, self.dim // self.num_heads)
        bias = F.embedding(self.relative_position_index, self.relative_position_bias_table)  # (N, N, heads)
        bias = bias.permute(2, 0, 1).contiguous()  # laid out as what it is added to
        attended = attend(qkv.permute(3, 0, 1, 4, 2, 5), bias, mask)  # (B, windows, heads, N, D)
        return self.proj(attended.transpose(2, 3).reshape(x.shape))


class Mlp(official.Mlp):
    """Without the dropout, whose rate is 0."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwinTransformerBlock(official.SwinTransformerBlock):
    """Attention inside windows and MLP, each with a skip. (B, windows * N, C), (windows, N, N) -> first's shape.

    `kept` (2, B, 1, 1): in training, what each sample's branches are multiplied by.
    """

    def forward(self, x: Tensor, mask: Tensor, kept: Tensor | None) -> Tensor:
        attended = self.attn(self.norm1(x).flatten(0, 1), mask).view(x.shape)
        x = x + attended if kept is None else torch.addcmul(x, attended, kept[0])
        enriched = self.mlp(self.norm2(x).flatten(0, 1)).view(x.shape)
        return x + enriched if kept is None else torch.addcmul(x, enriched, kept[1])


class Group(official.RSTB):
    """Blocks, every second one in shifted windows, and a convolution, with a skip. (B, H * W, C) -> same."""

    def forward(self, x: Tensor, size: Size, kept: Sequence[Tensor | None]) -> Tensor:
        y, before = x, None
        for block, k in zip(self.residual_group.blocks, kept, strict=True):
            window, shift = block.window_size, block.shift_size
            if shift != before:
                y = self._reordered(y, order(size, window, (before, shift), x.device))
            y, before = block(y, shift_mask(size, window, shift, x.device), k), shift
        y = self._reordered(y, order(size, window, (before, None), x.device))
        return self.patch_embed(self.conv(self.patch_unembed(y, size))) + x

    @staticmethod
    def _reordered(x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        return _Reordered.apply(x, *places) if torch.is_grad_enabled() else x.index_select(1, places[0])


EXCHANGED = {
    official.WindowAttention: Attention,
    official.Mlp: Mlp,
    official.SwinTransformerBlock: SwinTransformerBlock,
    official.RSTB: Group,
}


class SwinIR(SpandrelSwinIR):
    """(B, 3, H, W) in [0, 1] -> (B, 3, scale * H, scale * W), not clamped. Any size.

    Mended against the base: its forward leaves the image mean in the precision of the last input.
    """

    rgb_mean: Tensor
    keep: Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("rgb_mean", self.mean, persistent=False)
        rates = []
        for module in self.modules():
            module.__class__ = EXCHANGED.get(type(module), type(module))
            if isinstance(module, SwinTransformerBlock):
                rates += 2 * [getattr(module.drop_path, "drop_prob", 0.0)]
        self.stochastic, keep = any(rates), torch.tensor([1 - rate for rate in rates])
        self.register_buffer("keep", keep.view(-1, 1, 1, 1), persistent=False)  # (branches, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.rgb_mean
        return super().forward(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The groups. (B, C, H, W) -> same."""
        size = x.shape[2:]
        kept = self._drawn(x)
        x = self.patch_embed(x)
        for group in self.layers:
            blocks = len(group.residual_group.blocks)
            x = group(x, size, kept[:blocks])
            kept = kept[blocks:]
        return self.patch_unembed(self.norm(x), size)

    def _drawn(self, x: Tensor) -> Sequence[Tensor | None]:
        """Of each block (2, B, 1, 1): 0 where a sample's branch is left out and else what makes up for those that are;
        None where none is."""
        num_blocks = len(self.keep) // 2
        if not (self.training and self.stochastic):
            return [None] * num_blocks
        drawn = torch.rand(len(self.keep), len(x), 1, 1, device=x.device)
        return ((drawn < self.keep) / self.keep).to(x.dtype).view(num_blocks, 2, -1, 1, 1).unbind()
