"""Quotients of distances: close to the clean image and far from the negatives, as one term with a lower bound.

The family of CR (Wu et al., CVPR 2021; GlassyWu/AECR-Net), CCR (Zheng et al., CVPR 2023; YuZheng9/C2PNet), DCR (Zhou et
al., AAAI 2025; super-SSS/DCKD) and MixDehazeNet's CR (AmeryXiong/MixDehazeNet); with the history as negatives it is
"SPN with a positive".
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from mcir.objective.contrast import AgainstImages
from mcir.objective.distance import summed
from mcir.objective.features import Features
from mcir.section import Section


class Curriculum(Section):
    """A negative weighs 1 + gamma when the best validated PSNR is above its threshold, and 1 - gamma before
    (C2PNet). The network must have outgrown a negative before that counts in full."""

    gamma: float = Field(0.25, ge=0, lt=1)
    thresholds: tuple[float, ...]
    """In dB, one a negative: the history's, then those of `columns`."""


class RatioConfig(AgainstImages):
    """weight * sum_l w_l * mean_p d_l(restored, p) / (sum_k v_k d_l(restored, negative_k) + eps), minimised. The
    positives p are the clean image and the anchors; batches are averaged before the quotient, as released."""

    name: Literal["ratio"] = "ratio"
    degraded_weight: PositiveFloat = 1.0
    """Weight v of the degraded image where the others' is 1 (C2PNet: their number)."""
    average: bool = False
    """Whether the weights v are divided by their sum, as CCR does; DCR adds plainly, so more negatives count less."""
    curriculum: Curriculum | None = None
    eps: PositiveFloat = 1e-7

    @model_validator(mode="after")
    def _one_threshold_each(self) -> "RatioConfig":
        expected = self.num_negatives - self.degraded
        if self.curriculum and len(self.curriculum.thresholds) != expected:
            raise ValueError(f"curriculum.thresholds: {len(self.curriculum.thresholds)} for {expected} negatives")
        return self

    def build(self) -> "Ratio":
        return Ratio(self)


class Ratio(nn.Module):
    """The term of `RatioConfig`, unweighted."""

    def __init__(self, config: RatioConfig) -> None:
        super().__init__()
        self.config = config
        self.features: Features = config.features.build()
        self.best_psnr = torch.zeros((), dtype=torch.float64)  # no buffer: it is read on the host
        """What the curriculum goes by, in dB, equal on all ranks."""

    def term(self, restored: Tensor, clean: Tensor, negatives: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
        own, positives = self.features(restored), [clean, *anchors]
        see = self.features.of_constant
        near = summed(own, map(see, positives), [1 / len(positives)] * len(positives))
        far = summed(own, map(see, negatives), self.weights())
        return (self.features.layer_weights * near / (far + self.config.eps)).sum()

    def weights(self) -> list[float]:
        """One a negative: of the history, of the columns, of the degraded image."""
        config = self.config
        weights = [1.0] * (config.num_negatives - config.degraded)
        if config.curriculum:
            gamma, best = config.curriculum.gamma, float(self.best_psnr)
            weights = [1 + gamma if best > threshold else 1 - gamma for threshold in config.curriculum.thresholds]
        if config.degraded:
            weights.append(config.degraded_weight)
        return [weight / sum(weights) for weight in weights] if config.average else weights
