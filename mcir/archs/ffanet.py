"""FFA-Net (Qin et al., AAAI 2020) with the state_dict keys of its repository (zhilin007/FFA-Net, class FFA).

Three groups of residual blocks with channel and pixel attention; a channel attention over the three groups' features
weighs them into one. The published network is given normalised images and returns an image in [0, 1]; the
normalisation happens here, inside, so that input and output are both RGB in [0, 1].
"""

from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mcir.archs.base import Arch, Descriptor

HAZY_MEAN = (0.64, 0.6, 0.58)  # RGB statistics of the hazy RESIDE images
HAZY_STD = (0.14, 0.15, 0.152)
REDUCTION = 8  # of channels inside the attentions of a block
GROUP_REDUCTION = 16  # of the attention over the groups, relative to the channels of one group


class ChannelAttention(nn.Module):
    """One gate a channel from the image mean. (B, C, H, W) -> same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ca = nn.Sequential(
            nn.Conv2d(dim, dim // REDUCTION, 1), nn.ReLU(), nn.Conv2d(dim // REDUCTION, dim, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.ca(x.mean((2, 3), keepdim=True))


class PixelAttention(nn.Module):
    """One gate a pixel from its own features. (B, C, H, W) -> same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pa = nn.Sequential(
            nn.Conv2d(dim, dim // REDUCTION, 1), nn.ReLU(), nn.Conv2d(dim // REDUCTION, 1, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.pa(x)


class AttentionBlock(nn.Module):
    """A skip around the first convolution, both attentions, and a skip around all. (B, C, H, W) -> same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.calayer = ChannelAttention(dim)
        self.palayer = PixelAttention(dim)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(torch.relu(self.conv1(x)) + x)
        return self.palayer(self.calayer(inner)) + x


class Group(nn.Module):
    """`num_blocks` blocks, a convolution and a skip around them. (B, C, H, W) -> same."""

    def __init__(self, dim: int, num_blocks: int) -> None:
        super().__init__()
        blocks = [AttentionBlock(dim) for _ in range(num_blocks)]
        self.gp = nn.Sequential(*blocks, nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gp(x) + x


class FFANet(nn.Module):
    """(B, 3, H, W) in [0, 1] -> same shape and range, not clamped. Any size."""

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, num_blocks: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(HAZY_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(HAZY_STD).view(1, 3, 1, 1), persistent=False)
        self.pre = nn.Sequential(nn.Conv2d(3, dim, 3, padding=1))
        self.g1 = Group(dim, num_blocks)
        self.g2 = Group(dim, num_blocks)
        self.g3 = Group(dim, num_blocks)
        self.ca = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(3 * dim, dim // GROUP_REDUCTION, 1),
            nn.ReLU(),
            nn.Conv2d(dim // GROUP_REDUCTION, 3 * dim, 1),
            nn.Sigmoid(),
        )
        self.palayer = PixelAttention(dim)
        self.post = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, 3, 3, padding=1))

    def forward(self, degraded: Tensor) -> Tensor:
        normalised = (degraded - self.mean) / self.std
        first = self.g1(self.pre(normalised))  # (B, C, H, W)
        second = self.g2(first)
        third = self.g3(second)
        groups = torch.cat([first, second, third], dim=1)  # (B, 3C, H, W)
        fused = sum((self.ca(groups) * groups).chunk(3, dim=1))  # (B, C, H, W)
        # The published network adds its normalised input to an output that it compares with the image in [0, 1].
        return self.post(self.palayer(fused)) + normalised


class Ffanet(Arch):
    """FFA-Net for dehazing; the defaults are the published network of 4,455,913 parameters."""

    name: Literal["ffanet"] = "ffanet"
    dim: PositiveInt = Field(default=64, multiple_of=GROUP_REDUCTION)
    num_blocks: PositiveInt = 19
    """Blocks in each of the three groups (the command line of the repository says 20, its checkpoints have 19)."""

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(blocks=("AttentionBlock",), channels_last=True)

    def build(self) -> nn.Module:
        return FFANet(self.dim, self.num_blocks)
