"""The weight of a contrast as a share of the reconstruction loss.

Contrasts differ in scale by orders of magnitude (features, network, loss and phase of training decide), so a share is
what carries over from one recipe to another. The weight moves on the device, by numbers that all ranks have agreed on,
and slowly: it can neither jump when a negative has just been updated, nor wait for the host.
"""

import math

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from mcir.section import Section

DECAY = 0.99
"""Of the running means, a step."""
FASTEST = math.log(1.05)
"""The weight changes by no more than 5 % a step: tenfold in 47 steps."""


class TargetRatio(Section):
    """weight = target_ratio * |reconstruction| / |contrast|, of running means over the last hundred steps or so. A loss
    that is negative (-PSNR, -SSIM) counts by its absolute value: with -PSNR the share is of some 30 dB."""

    target_ratio: PositiveFloat
    """Share of the reconstruction loss; its authors advise 0.01 to 0.1 for SPN (Aitical/MCLIR#4)."""
    initial: PositiveFloat = 1e-3
    """The weight that the run begins with; it changes by at most 5 % a step."""


class Weight(nn.Module):
    """The weight now, a scalar on the device."""

    value: Tensor
    means: Tensor

    def __init__(self, config: float | TargetRatio) -> None:
        super().__init__()
        self.ratio = config.target_ratio if isinstance(config, TargetRatio) else None
        initial = config.initial if isinstance(config, TargetRatio) else config
        self.register_buffer("value", torch.tensor(float(initial)))
        self.register_buffer("means", torch.zeros(2))  # of |reconstruction| and |contrast|, unweighted

    @torch.no_grad()
    def follow(self, reconstruction: Tensor, contrast: Tensor) -> None:
        """Take in a step's losses, equal on all ranks, the contrast already weighted. No host sync."""
        if self.ratio is None:
            return
        seen = torch.stack([reconstruction, contrast / self.value]).abs()
        usable = seen.isfinite().all() & (seen[1] > 0)
        self.means.copy_(torch.where(usable, DECAY * self.means + (1 - DECAY) * seen, self.means))
        wanted = self.ratio * self.means[0] / self.means[1]
        change = (wanted / self.value).log().clamp(-FASTEST, FASTEST).exp()
        self.value.copy_(torch.where(usable, self.value * change, self.value))
