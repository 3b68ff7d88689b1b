"""IDT, the image deraining transformer (Xiao et al., TPAMI 2022), with the state_dict keys of jiexiaou/IDT.

A U-shaped network. Each stage attends first inside windows of 8 x 8 pixels, then between windows: there a window of one
channel is a token and its 64 pixels are the token's features. The relative positions of the windows are counted in the
grid of an image of fixed size, so the network takes only that size (128 x 128); the official test cuts larger images
into overlapping tiles. Features are (B, H, W, C), the official layout flattened (B, H * W, C) with the sides kept.
"""

from collections import OrderedDict
from typing import Literal, Self

import torch
from einops import rearrange
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from mcir.archs.base import Arch, Descriptor, DropPath, under

SCALES = 4  # halvings between the first stage and the bottleneck
NUM_WINDOW_BLOCKS = (3, 3, 2, 2, 1, 1, 2, 2, 3)  # before the block between windows; the bottleneck has no such block
POSITION_KERNEL_REACH = 2

Stages = tuple[
    PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt
]


class QueryKeyValue(nn.Module):
    """(B, N, C) -> query, key, value of the attention, and one more value for the positional convolutions."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_kv = nn.Linear(dim, 3 * dim, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.to_q(x), *self.to_kv(x).chunk(3, dim=-1)


class GridAttention(nn.Module):
    """Attention among the tokens of a side x side grid, plus convolutions of their values. (B, N, C) -> same."""

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, side: int, bound: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.side = num_heads, side
        span = 2 * bound - 1  # distances beyond the bound share one bias
        self.relative_position_bias_table = nn.Parameter(torch.zeros(span**2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        tokens = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # (N, 2)
        offsets = (tokens[:, None] - tokens[None]).clamp(1 - bound, bound - 1) + bound - 1  # (N, N, 2)
        self.register_buffer("relative_position_index", offsets[..., 0] * span + offsets[..., 1], persistent=False)
        reach = min(side - 1, POSITION_KERNEL_REACH)
        self.Position_Extract = nn.Sequential(
            nn.Conv2d(dim, dim, 2 * reach + 1, padding=reach, groups=dim), nn.Conv2d(dim, dim, 1, groups=num_heads)
        )
        self.qkv = QueryKeyValue(dim, qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        *qkv, positional = self.qkv(x)
        q, k, v = (rearrange(t, "b n (heads c) -> b heads n c", heads=self.num_heads) for t in qkv)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # (heads, N, N)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        attended = rearrange(scores.softmax(-1) @ v, "b heads n c -> b n (heads c)")
        position = self.Position_Extract(rearrange(positional, "b (h w) c -> b c h w", h=self.side))
        return self.proj(attended + rearrange(position, "b c h w -> b (h w) c"))


class LocalFeedForward(nn.Module):
    """An MLP with a depthwise convolution, skipped, between its layers. (B, H, W, C) -> same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Sequential(nn.Linear(dim, hidden), nn.GELU())
        self.dwconv = nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.GELU())
        self.linear2 = nn.Sequential(nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear1(x).permute(0, 3, 1, 2)
        return self.linear2((self.dwconv(x) + x).permute(0, 2, 3, 1))


class WindowBlock(nn.Module):
    """Attention inside windows and feed-forward. (B, H, W, C) -> same."""

    def __init__(
        self, dim: int, num_heads: int, window: int, mlp_ratio: float, qkv_bias: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim)
        self.attn = GridAttention(dim, num_heads, side=window, bound=window, qkv_bias=qkv_bias)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = LocalFeedForward(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[1] // self.window
        windows = rearrange(
            self.norm1(x), "b (rows y) (cols x) c -> (b rows cols) (y x) c", y=self.window, x=self.window
        )
        attended = rearrange(
            self.attn(windows), "(b rows cols) (y x) c -> b (rows y) (cols x) c", b=len(x), rows=rows, y=self.window
        )
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SpatialBlock(nn.Module):
    """Attention between the windows of each channel, and feed-forward; no first norm. (B, H, W, C) -> same.

    As published, the attended windows are laid out one after another, window by window, and not put back where they
    were cut: the skip adds pixel i of that sequence to pixel i of the image in reading order.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        grid: int,
        bound: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.window = window
        self.attn = GridAttention(window**2, num_heads, side=grid, bound=bound, qkv_bias=qkv_bias)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = LocalFeedForward(dim, int(window**2 * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(x, "b (rows y) (cols x) c -> (b c) (rows cols) (y x)", y=self.window, x=self.window)
        attended = rearrange(self.attn(tokens), "(b c) windows pixels -> b (windows pixels) c", b=len(x))
        x = x + self.drop_path(attended.view_as(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ChannelsFirst(nn.Sequential):
    """Convolutions on channels-last features. (B, H, W, C) -> (B, H', W', C')."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class IDT(nn.Module):
    """(B, 3, S, S) in [0, 1] -> same shape and range, not clamped; S is `image_size` and nothing else."""

    def __init__(
        self,
        image_size: int,
        embed_dim: int,
        depths: Stages,
        num_heads: Stages,
        window_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        # Depths only spread the rates of stochastic depth: they rise along the encoder and fall along the decoder.
        rates = torch.linspace(0, drop_path, sum(depths[:SCALES])).tolist()

        def stage(i: int, dim: int, rates: list[float]) -> nn.Module:
            scale = SCALES - abs(SCALES - i)  # halvings of the image side
            blocks: list[nn.Module] = [
                WindowBlock(dim, num_heads[i], window_size, mlp_ratio, qkv_bias, drop_path=rates[0])
                for _ in range(NUM_WINDOW_BLOCKS[i])
            ]
            if scale < SCALES:
                grid, bound = image_size // 2**scale // window_size, 2 ** (SCALES - scale)
                blocks.append(
                    SpatialBlock(dim, num_heads[i], window_size, grid, bound, mlp_ratio, qkv_bias, drop_path=rates[-1])
                )
            return under("blocks", nn.Sequential(*blocks))

        def cut(rates: list[float], depths: tuple[int, ...]) -> list[list[float]]:
            ends = [sum(depths[: i + 1]) for i in range(len(depths))]
            return [rates[end - depth : end] for end, depth in zip(ends, depths, strict=True)]

        def convolution(name: str, *layers: nn.Module) -> nn.Module:
            return ChannelsFirst(OrderedDict({name: nn.Sequential(*layers)}))

        dims = [embed_dim * 2**i for i in range(SCALES + 1)]
        self.input_proj = convolution("proj", nn.Conv2d(3, embed_dim, 3, padding=1), nn.LeakyReLU())
        self.output_proj = convolution("proj", nn.Conv2d(2 * embed_dim, 3, 3, padding=1))
        for i, stage_rates in enumerate(cut(rates, depths[:SCALES])):
            down = nn.Conv2d(dims[i], dims[i + 1], 4, stride=2, padding=1)
            self.add_module(f"encoderlayer_{i}", stage(i, dims[i], stage_rates))
            self.add_module(f"dowsample_{i}", convolution("conv", down))  # the official spelling
        self.bottle = stage(SCALES, dims[-1], [drop_path])
        for i, stage_rates in enumerate(cut(rates[::-1], depths[SCALES + 1 :])):
            fine = SCALES - 1 - i
            coarse_dim = dims[-1] if i == 0 else 2 * dims[fine + 1]
            up = nn.ConvTranspose2d(coarse_dim, dims[fine], 2, stride=2)
            self.add_module(f"upsample_{i}", convolution("deconv", up))
            self.add_module(f"decoderlayer_{i}", stage(SCALES + 1 + i, 2 * dims[fine], stage_rates))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, degraded: Tensor) -> Tensor:
        side = self.image_size
        if degraded.shape[2:] != (side, side):
            raise ValueError(f"IDT takes {side} x {side} images, not {tuple(degraded.shape[2:])}: crop or tile")
        x = self.input_proj(degraded.permute(0, 2, 3, 1))
        skips = []
        for i in range(SCALES):
            x = self.get_submodule(f"encoderlayer_{i}")(x)
            skips.append(x)
            x = self.get_submodule(f"dowsample_{i}")(x)  # half the side, twice the channels
        x = self.bottle(x)
        for i in range(SCALES):
            x = self.get_submodule(f"upsample_{i}")(x)
            x = self.get_submodule(f"decoderlayer_{i}")(torch.cat([x, skips.pop()], dim=-1))
        return degraded + self.output_proj(x).permute(0, 3, 1, 2)


class Idt(Arch):
    """IDT for deraining; the defaults are the published network of 16,416,463 parameters."""

    name: Literal["idt"] = "idt"
    image_size: PositiveInt = 128
    """The only side it takes, in training and in testing."""
    embed_dim: PositiveInt = 32
    depths: Stages = (3, 3, 2, 2, 1, 1, 2, 2, 3)
    """Spread the rates of stochastic depth; the number of blocks is fixed."""
    num_heads: Stages = (1, 2, 4, 8, 16, 16, 8, 4, 2)
    window_size: PositiveInt = 8
    mlp_ratio: PositiveFloat = 4.0
    qkv_bias: bool = True
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Highest rate of stochastic depth."""

    @model_validator(mode="after")
    def _windows_and_heads_fit(self) -> Self:
        multiple = 2**SCALES * self.window_size
        if self.image_size % multiple:
            raise ValueError(f"image_size must be a multiple of 16 windows, {multiple}")
        for i, heads in enumerate(self.num_heads):
            halvings = SCALES - abs(SCALES - i)
            dim = self.embed_dim * 2 ** (halvings + (i > SCALES))  # a decoder stage also holds the encoder's features
            pixels = self.window_size**2 if halvings < SCALES else heads  # the features of attention between windows
            for features in (dim, pixels):
                if features % heads:
                    raise ValueError(f"num_heads: {features} features of stage {i} do not divide into {heads} heads")
        return self

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(
            fixed_size=self.image_size,
            min_size=self.image_size,
            tile_overlap=20,
            blocks=("WindowBlock", "SpatialBlock"),
        )

    def build(self) -> nn.Module:
        return IDT(**self.model_dump(exclude={"name"}))
