"""PNE's contrast: the clean image must be told from the negatives by its distance. It is bounded below by 0.

Cheng et al., "Progressive Negative Enhancing Contrastive Learning for Image Dehazing and Beyond", TMM 2024
(YanLi-LY/PNE-Net, Losses/ContrastiveLoss.py), by logsumexp where the release exponentiates distances as they stand.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from mcir.objective.contrast import AgainstImages
from mcir.objective.distance import soft_nearest, summed
from mcir.objective.features import Features


class InfoNCEConfig(AgainstImages):
    """weight * sum_l w_l * -log(e^(-p_l / t) / (e^(-p_l / t) + sum_k e^(-d_l(restored, negative_k) / t))), p_l the mean
    d_l from the clean image and the anchors."""

    name: Literal["infonce"] = "infonce"
    temperature: PositiveFloat = 2.0
    per_sample: bool = True
    """Whether the term is the mean over the samples of what each has by itself, as in PNE's training but for its first
    epoch, which takes distances over the whole batch; so it does not depend on how batches are cut."""

    def build(self) -> "InfoNCE":
        return InfoNCE(self.features.build(), self.temperature, self.per_sample)


class InfoNCE(nn.Module):
    """The term of `InfoNCEConfig`, unweighted."""

    def __init__(self, features: Features, temperature: float = 2.0, per_sample: bool = True) -> None:
        super().__init__()
        self.features, self.temperature, self.per_sample = features, temperature, per_sample

    def term(self, restored: Tensor, clean: Tensor, negatives: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
        own, positives = self.features(restored), [clean, *anchors]
        see = self.features.of_constant
        weights = [1 / len(positives)] * len(positives)
        near = summed(own, map(see, positives), weights, self.per_sample) / -self.temperature
        far = soft_nearest(own, map(see, negatives), self.temperature, self.per_sample)
        of_layers = (torch.logaddexp(near, far) - near).view(len(near), -1).mean(1)  # (L, B) or (L,) -> (L,)
        return (self.features.layer_weights * of_layers).sum()
