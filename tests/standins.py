"""Small networks with the outputs of those that no package has: one image, three stages, three scales."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class OneImage(nn.Module):
    """Restormer, PromptIR: an image."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, degraded: Tensor) -> Any:
        return degraded + self.conv(degraded)


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
