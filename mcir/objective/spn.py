"""Self-prior negatives (SPN): the distance, in feature space, between what a network restores and what it used to
restore, subtracted from the loss: the negatives repel.

Wu et al., "Learning from History: Task-agnostic Model Contrastive Learning for Image Restoration", AAAI 2024
(Aitical/MCLIR).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from mcir.objective.contrast import ContrastConfig
from mcir.objective.distance import summed
from mcir.objective.features import RELEASED_LAYERS, Features


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
        normalise: str = "imagenet",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.features = Features(network, layers, weights, normalise)

    def forward(self, restored: Tensor, negatives: Sequence[Tensor]) -> Tensor:
        return -self.weight * self.term(restored, restored, negatives, ())

    def term(self, restored: Tensor, clean: Tensor, negatives: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
        """Mean distance from the anchors - mean distance from the negatives, unweighted, to be added; the clean image
        has no part in it."""
        total, own = restored.new_zeros((), dtype=torch.float32), self.features(restored)
        for images, sign in ((negatives, -1.0), (anchors, 1.0)):
            if images:
                weights = [sign / len(images)] * len(images)
                distances = summed(own, map(self.features.of_constant, images), weights)
                total = total + (distances * self.features.layer_weights).sum()
        return total


class SPNConfig(ContrastConfig):
    """- weight * mean_k sum_l w_l * d_l(restored, negative_k). It has no lower bound: choose `weight` so that it is
    0.01 to 0.1 of the reconstruction loss (Aitical/MCLIR#4), or give that share as `{target_ratio: 0.05}`."""

    name: Literal["spn"] = "spn"
    negatives_per_image: Literal["all", "one"] = "all"
    """`one` deals each image of a batch one of the negatives: K cost what one costs, and the expectation of loss and
    gradient is that of all."""

    @property
    def roles(self) -> list[str]:
        if self.negatives_per_image == "all":
            return super().roles
        return ["negative", *(role for role in super().roles if role == "anchor")]

    @model_validator(mode="after")
    def _dealt_without_views(self) -> "SPNConfig":
        if self.negatives_per_image == "one":
            dealt = [schedule for schedule in self.negatives if schedule.role == "negative"]
            if not dealt:
                raise ValueError("negatives_per_image: one deals each image a negative, and there is none")
            if any(schedule.views > 1 for schedule in dealt):
                raise ValueError("negatives_per_image: one deals negatives of one view each: leave their views out")
        return self

    def build(self) -> SPN:
        features = self.features
        return SPN(1.0, features.network, features.layers, features.weights, features.normalise)
