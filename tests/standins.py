"""Small networks with the outputs of those that no package has: one image, three stages, three scales."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OneImage(nn.Module):
    """Restormer, PromptIR: an image."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, degraded: Tensor) -> Any:
        return degraded + self.conv(degraded)


class Running(OneImage):
    """Networks that subtract a running mean, in training too (ActNorm, codebooks)."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, degraded: Tensor) -> Any:
        if self.training:
            self.mean.lerp_(degraded.mean((0, 2, 3)), 0.5)
        return super().forward(degraded - self.mean.view(1, 3, 1, 1))


class Spectral(OneImage):
    """A convolution of spectral norm 1: weights are computed with before they are used."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        nn.utils.spectral_norm(self.conv)


class Unused(OneImage):
    """A parameter that never gets a gradient."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))


class Gain(OneImage):
    """A parameter that is a single number."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, degraded: Tensor) -> Any:
        return self.gain * super().forward(degraded)


class Stages(OneImage):
    """MPRNet: the last of its three stages first."""

    def forward(self, degraded: Tensor) -> list[Tensor]:
        first = super().forward(degraded)
        second = super().forward(first)
        return [super().forward(second), second, first]


class Scales(OneImage):
    """MIMO-UNet: a quarter of the side, half of it, the whole."""

    def forward(self, degraded: Tensor) -> list[Tensor]:
        restored = super().forward(degraded)
        return [*(F.avg_pool2d(restored, factor) for factor in (4, 2)), restored]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).relu()


class Recursive(nn.Module):
    """DRRN: one block, passed through three times."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.head, self.tail = (nn.Conv2d(*channels, 3, padding=1) for channels in ((3, 8), (8, 3)))
        self.body = nn.Sequential(*self.blocks())

    def blocks(self) -> list[Block]:
        return [Block()] * 3

    def forward(self, degraded: Tensor) -> Tensor:
        return degraded + self.tail(self.body(self.head(degraded)))


class Tied(Recursive):
    """Three blocks of one weight and their own biases."""

    def blocks(self) -> list[Block]:
        blocks = [Block() for _ in range(3)]
        for block in blocks[1:]:
            block.conv.weight = blocks[0].conv.weight
        return blocks
