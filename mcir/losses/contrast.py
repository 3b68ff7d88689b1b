"""Self-prior negatives (SPN): the distance, in feature space, between what a network restores and what it used to
restore.

Wu et al., "Learning from History: Task-agnostic Model Contrastive Learning for Image Restoration", AAAI 2024
(Aitical/MCLIR). The caller subtracts the result: the negatives repel.
"""

from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from mcir.losses.features import RELEASED_LAYERS, Features, FeaturesConfig
from mcir.negatives import Schedule


class SPN(nn.Module):
    """weight * mean_k sum_l w_l * mean |VGG_l(restored) - VGG_l(negative_k)|, a scalar >= 0, to be subtracted.

    Gradients flow through `restored` alone, whose features are computed once, whatever the number of negatives.
    No negatives give 0.
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
        anchor = self.features(restored)
        total = torch.zeros((), device=restored.device)
        for negative in negatives:
            with torch.no_grad():
                past = self.features(negative)
            for tap_weight, a, p in zip(self.features.tap_weights, anchor, past, strict=True):
                total = total + tap_weight * F.l1_loss(a.float(), p.float())
        return self.weight / len(negatives) * total


class SPNConfig(BaseModel):
    """The contrastive term. Choose `weight` so that it is 0.01 to 0.1 of the reconstruction loss (Aitical/MCLIR#4)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    weight: PositiveFloat = 1e-3
    features: FeaturesConfig = FeaturesConfig()
    negatives: tuple[Schedule, ...] = Field(
        default_factory=lambda: tuple(Schedule(update_every=n) for n in (100, 200, 500, 1000))
    )
    """One entry a negative; an empty list trains plainly. The default is the released FFANet configuration."""

    def build(self) -> SPN:
        return SPN(self.weight, self.features.network, self.features.layers, self.features.weights)
