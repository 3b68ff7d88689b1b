"""EDSR (Lim et al., CVPRW 2017) with the state_dict keys of BasicSR's class.

Source of keys and recipe: XPixelGroup/BasicSR, options/train/EDSR. The defaults are the "light" (M) network of the
MCLIR tables: 64 features, 16 blocks, 1,517,571 parameters at x4.
"""

from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from mcir.archs.base import Arch, Descriptor, PixelShuffle

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)  # RGB mean of the DIV2K training images


class ResidualBlock(nn.Module):
    """conv, ReLU, conv and a scaled skip; no normalisation. (B, C, H, W) -> same."""

    def __init__(self, num_features: int, res_scale: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_features, num_features, 3, padding=1)
        self.conv2 = nn.Conv2d(num_features, num_features, 3, padding=1)
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.conv2(torch.relu(self.conv1(x))), alpha=self.res_scale)


class Upsampler(nn.Sequential):
    """Convolutions, each with a pixel shuffle. (B, C, H, W) -> (B, C, scale * H, scale * W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)  # a frame of ours: torch 2.11 compiles none of its own, but what they call one by one


class EDSR(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, 3, scale * H, scale * W), not clamped. Any size."""

    mean: Tensor

    def __init__(self, scale: int, num_features: int, num_blocks: int, res_scale: float, img_range: float) -> None:
        super().__init__()
        self.img_range = img_range
        self.register_buffer("mean", torch.tensor(DIV2K_MEAN).view(1, 3, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(3, num_features, 3, padding=1)
        self.body = nn.Sequential(*[ResidualBlock(num_features, res_scale) for _ in range(num_blocks)])
        self.conv_after_body = nn.Conv2d(num_features, num_features, 3, padding=1)
        stages: list[nn.Module] = []
        for factor in [2, 2] if scale == 4 else [scale]:
            stages += [nn.Conv2d(num_features, num_features * factor**2, 3, padding=1), PixelShuffle(factor)]
        self.upsample = Upsampler(*stages)
        self.conv_last = nn.Conv2d(num_features, 3, 3, padding=1)

    def forward(self, degraded: Tensor) -> Tensor:
        x = self.conv_first((degraded - self.mean) * self.img_range)  # (B, C, H, W)
        x = x + self.conv_after_body(self.body(x))
        x = self.conv_last(self.upsample(x))  # (B, 3, scale * H, scale * W)
        return x / self.img_range + self.mean


class Edsr(Arch):
    """EDSR for super-resolution; the defaults are EDSR-light (M)."""

    name: Literal["edsr"] = "edsr"
    scale: Literal[2, 3, 4]
    num_features: PositiveInt = 64
    num_blocks: PositiveInt = 16
    res_scale: PositiveFloat = 1.0
    """0.1 in the large network (256 features, 32 blocks)."""
    img_range: PositiveFloat = 255.0
    """The network works on (x - mean) * img_range."""

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(scale=self.scale, blocks=("ResidualBlock", "Upsampler"), channels_last=True)

    def build(self) -> nn.Module:
        return EDSR(self.scale, self.num_features, self.num_blocks, self.res_scale, self.img_range)
