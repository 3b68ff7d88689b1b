"""Self-prior negatives (SPN): the distance, in feature space, between what a network restores and what it used to
restore.

Wu et al., "Learning from History: Task-agnostic Model Contrastive Learning for Image Restoration", AAAI 2024
(Aitical/MCLIR). The caller subtracts the result: the negatives repel.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from mcir.objective.features import RELEASED_LAYERS, Features, FeaturesConfig
from mcir.objective.negatives import Schedule
from mcir.section import Section


class SPN(nn.Module):
    """weight * mean_k sum_l w_l * mean |VGG_l(restored) - VGG_l(negative_k)|, a scalar >= 0, to be subtracted.

    Gradients flow through `restored` alone, whose features are computed once, whatever the number of negatives; the
    negatives' features are in memory one at a time. No negatives give 0.
    """

    def __init__(
        self,
        weight: float = 1e-3,
        network: str = "vgg16",
        layers: Mapping[str, float] = RELEASED_LAYERS,
        weights: str = "imagenet",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.features = Features(network, layers, weights)

    def forward(self, restored: Tensor, negatives: Sequence[Tensor]) -> Tensor:
        if not negatives:
            return restored.new_zeros((), dtype=torch.float32)
        weights = [self.weight / len(negatives) * w for w in self.features.tap_weights]
        return _Distance.apply(weights, map(self._past, negatives), *self.features(restored))

    @torch.inference_mode()
    def _past(self, negative: Tensor) -> list[Tensor]:
        return self.features(negative)


class _Distance(torch.autograd.Function):
    """sum_k sum_l weights_l * mean |anchor_l - past_kl|, differentiated by the anchor alone.

    The gradient, a sum of signs, is taken as the pasts go by, so that none of them is kept for the backward pass;
    autograd would keep all.
    """

    @staticmethod
    def forward(ctx: Any, weights: Sequence[float], pasts: Iterable[list[Tensor]], *anchor: Tensor) -> Tensor:
        total = torch.zeros((), device=anchor[0].device)
        signs = [torch.zeros_like(a) for a in anchor]  # whole numbers, exact in bf16 too
        for past in pasts:
            for weight, a, p, sign in zip(weights, anchor, past, signs, strict=True):
                difference = a.float() - p.float()
                total += weight / a.numel() * torch.linalg.vector_norm(difference, 1)
                sign += difference.sign_()
        ctx.weights = weights
        ctx.save_for_backward(*signs)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        pairs = zip(ctx.weights, ctx.saved_tensors, strict=True)
        return None, None, *(sign * (gradient * (weight / sign.numel())) for weight, sign in pairs)


class SPNConfig(Section):
    """The contrastive term. Choose `weight` so that it is 0.01 to 0.1 of the reconstruction loss (Aitical/MCLIR#4)."""

    weight: PositiveFloat = 1e-3
    features: FeaturesConfig = FeaturesConfig()
    negatives: tuple[Schedule, ...] = Field(
        default_factory=lambda: tuple(Schedule(update_every=n) for n in (100, 200, 500, 1000))
    )
    """One entry a negative; an empty list trains plainly. The default is the released FFANet configuration."""

    def build(self) -> SPN:
        return SPN(self.weight, self.features.network, self.features.layers, self.features.weights)
