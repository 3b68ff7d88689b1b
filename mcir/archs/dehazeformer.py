"""DehazeFormer (Song et al., TIP 2023) with the state_dict keys of its repository (IDKiro/DehazeFormer).

A U-shaped network of shifted-window attention blocks. What sets it apart: the normalisation keeps the mean and
deviation it removes and gives them back, rescaled, after the attention; shifted windows pad by reflection instead of
rolling; a depthwise convolution of the values runs beside the attention; two branches are fused by selecting kernels;
and the head predicts a gain and an offset of the image. The published network works on [-1, 1]: the change of range
is inside.
"""

import math
from typing import Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from mcir.archs.base import Arch, Descriptor, under

META_FEATURES = 256  # of the network that maps a relative position to one bias a head
FUSION_REDUCTION = 8
MIN_FUSION_FEATURES = 4
SIZE_MULTIPLE = 4  # two stages of merging 2 x 2 pixels
EPS = 1e-5

Stages = tuple[int, int, int, int, int]
Ratios = tuple[float, float, float, float, float]


class Variant(NamedTuple):
    embed_dims: Stages
    depths: Stages
    attention_ratios: Ratios
    conv: Literal["depthwise", "full"]


NARROW, WIDE = (24, 48, 96, 48, 24), (48, 96, 192, 96, 48)
USUAL_RATIOS = (1 / 4, 1 / 2, 3 / 4, 0.0, 0.0)
VARIANTS = {
    "t": Variant(NARROW, (4, 4, 4, 2, 2), (0.0, 1 / 2, 1.0, 0.0, 0.0), "depthwise"),
    "s": Variant(NARROW, (8, 8, 8, 4, 4), USUAL_RATIOS, "depthwise"),
    "b": Variant(NARROW, (16, 16, 16, 8, 8), USUAL_RATIOS, "depthwise"),
    "d": Variant(NARROW, (32, 32, 32, 16, 16), USUAL_RATIOS, "depthwise"),
    "w": Variant(WIDE, (16, 16, 16, 8, 8), USUAL_RATIOS, "depthwise"),
    "m": Variant(NARROW, (12, 12, 12, 6, 6), USUAL_RATIOS, "full"),
    "l": Variant(WIDE, (16, 16, 16, 12, 12), USUAL_RATIOS, "full"),
}


def initialise(module: nn.Module, gain: float) -> None:
    """Truncated Xavier normal weights and zero biases for every convolution inside."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d) and conv.bias is not None:
            fans = (conv.weight.shape[0] + conv.weight.shape[1]) * conv.weight[0, 0].numel()
            nn.init.trunc_normal_(conv.weight, std=gain * math.sqrt(2 / fans))
            nn.init.zeros_(conv.bias)


class RescaleNorm(nn.Module):
    """Normalises over (C, H, W) and returns what gives the removed statistics back.

    (B, C, H, W) -> normalised (B, C, H, W), gain (B, C, 1, 1), offset (B, C, 1, 1). The statistics are of the whole
    input, so the output depends on the crop; they are taken in fp32 whatever the precision of the rest.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.meta1 = nn.Conv2d(1, dim, 1)
        self.meta2 = nn.Conv2d(1, dim, 1)
        for meta, bias in (self.meta1, 1.0), (self.meta2, 0.0):
            nn.init.trunc_normal_(meta.weight, std=0.02)
            nn.init.constant_(cast(Tensor, meta.bias), bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance, mean = torch.var_mean(x.float(), dim=(1, 2, 3), correction=0, keepdim=True)
        deviation = (variance + EPS).sqrt()
        dtype = self.weight.dtype  # not fp32 in a network that was cast to bf16 as a whole
        normalised = ((x - mean) / deviation).to(dtype) * self.weight + self.bias
        return normalised, self.meta1(deviation.to(dtype)), self.meta2(mean.to(dtype))


class PositionBias(nn.Module):
    """A bias for each head and pair of the N pixels of a window, from a small network. () -> (heads, N, N)."""

    relative_positions: Tensor

    def __init__(self, window: int, num_heads: int) -> None:
        super().__init__()
        pixels = torch.cartesian_prod(torch.arange(window), torch.arange(window))  # (N, 2)
        offsets = (pixels[:, None] - pixels[None]).float()  # (N, N, 2)
        self.register_buffer("relative_positions", offsets.sign() * offsets.abs().log1p())
        self.meta = nn.Sequential(nn.Linear(2, META_FEATURES), nn.ReLU(), nn.Linear(META_FEATURES, num_heads))

    def forward(self) -> Tensor:
        return self.meta(self.relative_positions).permute(2, 0, 1)


class Mixer(nn.Module):
    """The spatial part of a block: a convolution, attention in windows, or their sum. (B, C, H, W) -> same."""

    def __init__(
        self, dim: int, num_heads: int, window: int, shift: int, attention: bool, conv: str, gain: float
    ) -> None:
        super().__init__()
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.attention, self.project = attention, attention or conv == "depthwise"
        if conv == "depthwise":
            self.conv: nn.Module = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, padding_mode="reflect")
        else:
            self.conv = nn.Sequential(
                nn.Conv2d(dim, dim, 3, padding=1, padding_mode="reflect"),
                nn.ReLU(),
                nn.Conv2d(dim, dim, 3, padding=1, padding_mode="reflect"),
            )
        if self.project:
            self.V = nn.Conv2d(dim, dim, 1)
            self.proj = nn.Conv2d(dim, dim, 1)
        initialise(self, gain)
        if attention:
            self.QK = nn.Conv2d(dim, 2 * dim, 1)
            initialise(self.QK, gain=1)
            self.attn = PositionBias(window, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        if not self.project:
            return self.conv(x)
        values = self.V(x)
        mixed = self.conv(values)
        if self.attention:
            mixed = mixed + self.attend(self.QK(x), values)
        return self.proj(mixed)

    def attend(self, queries_keys: Tensor, values: Tensor) -> Tensor:
        """Softmax attention inside windows. (B, 2C, H, W), (B, C, H, W) -> (B, C, H, W)."""
        height, width = values.shape[2:]
        qkv = torch.cat([queries_keys, values], dim=1)  # (B, 3C, H, W)
        # A shifted grid starts `shift` pixels outside the image and, like the other, covers it to the far border.
        bottom, right = (-(side + self.shift) % self.window for side in (height, width))
        qkv = F.pad(qkv, (self.shift, right, self.shift, bottom), mode="reflect")
        rows = qkv.shape[2] // self.window
        q, k, v = rearrange(
            qkv,
            "b (three heads c) (rows y) (cols x) -> three (b rows cols) heads (y x) c",
            three=3,
            heads=self.num_heads,
            y=self.window,
            x=self.window,
        )
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + self.attn()  # (B windows, heads, N, N)
        out = rearrange(
            scores.softmax(-1) @ v,
            "(b rows cols) heads (y x) c -> b (heads c) (rows y) (cols x)",
            b=len(values),
            rows=rows,
            y=self.window,
        )
        return out[:, :, self.shift : self.shift + height, self.shift : self.shift + width]


class DehazeFormerBlock(nn.Module):
    """Mixer and MLP, each with a skip; the mixer between norm and rescaling if it attends. (B, C, H, W) -> same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        window: int,
        shift: int,
        attention: bool,
        conv: str,
        gain: float,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = RescaleNorm(dim) if attention else None
        self.attn = Mixer(dim, num_heads, window, shift, attention, conv, gain)
        self.mlp = under("mlp", nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, dim, 1)))
        initialise(self.mlp, gain)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm1 is None:
            x = x + self.attn(x)
        else:
            normalised, gain, offset = self.norm1(x)
            x = x + self.attn(normalised) * gain + offset
        return x + self.mlp(x)


class Fusion(nn.Module):
    """Weighs two branches by a softmax a channel (selective kernels). Twice (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(dim // FUSION_REDUCTION, MIN_FUSION_FEATURES)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, 2 * dim, 1, bias=False)
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        logits = self.mlp((a + b).mean((2, 3), keepdim=True))  # (B, 2C, 1, 1)
        weight_a, weight_b = logits.unflatten(1, (2, -1)).softmax(1).unbind(1)
        return a * weight_a + b * weight_b


class DehazeFormer(nn.Module):
    """(B, 3, H, W) in [0, 1] -> same shape and range, not clamped. Any sides from 25 pixels up: pads inside."""

    def __init__(
        self,
        embed_dims: Stages,
        depths: Stages,
        num_heads: Stages,
        mlp_ratios: Ratios,
        attention_ratios: Ratios,
        conv: str,
        window_size: int,
    ) -> None:
        super().__init__()
        gain = (8 * sum(depths)) ** -0.25

        def stage(i: int) -> nn.Module:
            """The last `attention_ratios[i]` of the blocks attend, every second one in shifted windows."""
            first_attention = depths[i] - attention_ratios[i] * depths[i]
            blocks = [
                DehazeFormerBlock(
                    dim=embed_dims[i],
                    num_heads=num_heads[i],
                    mlp_ratio=mlp_ratios[i],
                    window=window_size,
                    shift=j % 2 * (window_size // 2),
                    attention=j >= first_attention,
                    conv=conv,
                    gain=gain,
                )
                for j in range(depths[i])
            ]
            return under("blocks", nn.Sequential(*blocks))

        def upsampler(in_dim: int, out_dim: int) -> nn.Module:
            return under("proj", nn.Sequential(nn.Conv2d(in_dim, 4 * out_dim, 1), nn.PixelShuffle(2)))

        full, half, quarter = embed_dims[:3]
        self.patch_embed = under("proj", nn.Conv2d(3, full, 3, padding=1, padding_mode="reflect"))
        self.layer1 = stage(0)
        self.patch_merge1 = under("proj", nn.Conv2d(full, half, 2, stride=2))
        self.skip1 = nn.Conv2d(full, full, 1)
        self.layer2 = stage(1)
        self.patch_merge2 = under("proj", nn.Conv2d(half, quarter, 2, stride=2))
        self.skip2 = nn.Conv2d(half, half, 1)
        self.layer3 = stage(2)
        self.patch_split1 = upsampler(quarter, half)
        self.fusion1 = Fusion(half)
        self.layer4 = stage(3)
        self.patch_split2 = upsampler(half, full)
        self.fusion2 = Fusion(full)
        self.layer5 = stage(4)
        self.patch_unembed = under("proj", under("0", nn.Conv2d(full, 4, 3, padding=1, padding_mode="reflect")))

    def forward(self, degraded: Tensor) -> Tensor:
        height, width = degraded.shape[2:]
        image = F.pad(degraded, (0, -width % SIZE_MULTIPLE, 0, -height % SIZE_MULTIPLE), mode="reflect") * 2 - 1
        fine = self.layer1(self.patch_embed(image))  # (B, C, H, W)
        middle = self.layer2(self.patch_merge1(fine))  # (B, 2C, H/2, W/2)
        coarse = self.layer3(self.patch_merge2(middle))  # (B, 4C, H/4, W/4)
        x = self.patch_split1(coarse)
        x = self.layer4(self.fusion1(x, self.skip2(middle)) + x)
        x = self.patch_split2(x)
        x = self.layer5(self.fusion2(x, self.skip1(fine)) + x)
        gain, offset = self.patch_unembed(x).split([1, 3], dim=1)
        restored = gain * image - offset + image
        return restored[:, :, :height, :width] / 2 + 0.5


class Dehazeformer(Arch):
    """DehazeFormer for dehazing; everything that is not given is the variant's published value."""

    name: Literal["dehazeformer"] = "dehazeformer"
    variant: Literal["t", "s", "b", "m", "w", "d", "l"]
    embed_dims: Stages | None = None
    depths: Stages | None = None
    attention_ratios: Ratios | None = None
    """Share of each stage's blocks, counted from the last, that attend."""
    conv: Literal["depthwise", "full"] | None = None
    """The convolution beside the attention: 5 x 5 depthwise, or two full 3 x 3."""
    num_heads: Stages = (2, 4, 6, 1, 1)
    mlp_ratios: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (2, 4, 4, 2, 2)
    window_size: PositiveInt = 8

    @property
    def published(self) -> Variant:
        """The variant's values, those that are given replaced."""
        given = self.model_dump(include=set(Variant._fields), exclude_none=True)
        return VARIANTS[self.variant]._replace(**given)

    @model_validator(mode="after")
    def _branches_and_heads_fit(self) -> Self:
        dims = self.published.embed_dims
        if (dims[3], dims[4]) != (dims[1], dims[0]):
            raise ValueError("embed_dims must end as they began: the last two stages are fused with the first two")
        for dim, heads in zip(dims, self.num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"embed_dims: {dim} does not divide into {heads} heads")
        return self

    @property
    def descriptor(self) -> Descriptor:
        # Below this, a shifted window on the coarsest features would need more reflection than there is image.
        return Descriptor(min_size=SIZE_MULTIPLE * (3 * self.window_size // 4) + 1, blocks=("DehazeFormerBlock",))

    def build(self) -> nn.Module:
        return DehazeFormer(
            **self.published._asdict(),
            num_heads=self.num_heads,
            mlp_ratios=self.mlp_ratios,
            window_size=self.window_size,
        )
