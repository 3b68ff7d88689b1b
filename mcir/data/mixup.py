"""Mixup: each sample is blended with the one that was in its place of the batch a step before.

Published code pairs the samples of a GPU's own batch, so what it computes depends on the number of GPUs. A place of the
batch always is the same rank's, so here it does not, and no image is decoded for it.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor

from mcir.section import Section


class Mixup(Section):
    """x <- l x + (1 - l) x', for degraded, clean and further images alike, l ~ Beta(beta, beta) (Zhang et al., "mixup:
    beyond empirical risk minimization", ICLR 2018). The Restormer family: the defaults; MIRNet and Uformer: beta 0.6,
    probability 1, per sample, after 5 epochs."""

    beta: PositiveFloat = 1.2
    """Both parameters of the Beta distribution."""
    after: NonNegativeInt = 0
    """The steps after this one are mixed."""
    probability: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of mixing at all."""
    per: Literal["batch", "sample"] = "batch"
    """What l and whether to mix are drawn for."""


class Mixer:
    """Remembers a step's samples for the next."""

    def __init__(self, mixup: Mixup, seed: int, start: int, send: Callable[[Tensor], Tensor]) -> None:
        """`start`: the position of the first sample that may be mixed. `send` takes a tensor to where the images are,
        without waiting for what that device is busy with."""
        self.mixup, self.seed, self.start, self.send = mixup, seed, start, send
        self._before: dict[int, tuple[list[int], Sequence[Tensor]]] = {}

    def __call__(
        self, part: int, batch: int, positions: Sequence[int], places: list[int], images: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """The images (B, 3, H, W), of each kind, of micro-batch `part` of the step whose batch begins at position
        `batch`, mixed. `places`: where in the micro-batch each of the B stands, and `positions` which samples they
        are."""
        before, self._before[part] = self._before.get(part), (places, images)
        if before is None or batch < self.start:
            return images
        there = {place: i for i, place in enumerate(before[0])}
        own = [self._weight(batch if self.mixup.per == "batch" else position) for position in positions]
        own = [weight if place in there else 1.0 for weight, place in zip(own, places, strict=True)]
        if all(weight == 1 for weight in own):
            return images
        weight = self.send(torch.tensor(own))[:, None, None, None]
        partners = self.send(torch.tensor([there.get(place, 0) for place in places]))
        return [weight * now + (1 - weight) * old[partners] for now, old in zip(images, before[1], strict=True)]

    def _weight(self, position: int) -> float:
        rng = np.random.default_rng([self.seed, 4, position])
        return float(rng.beta(self.mixup.beta, self.mixup.beta)) if rng.random() < self.mixup.probability else 1.0
