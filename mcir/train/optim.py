"""Optimizer and learning rate from the config. The rate is a pure function of the step: nothing of it is saved."""

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from mcir.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class Adam(Section):
    """Adam; `weight_decay` is the L2 term of torch's Adam."""

    name: Literal["adam"] = "adam"
    lr: PositiveFloat
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, self.lr, self.betas, self.eps, self.weight_decay, fused=True)


class AdamW(Section):
    """AdamW: decoupled weight decay."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, self.lr, self.betas, self.eps, self.weight_decay, fused=True)


class Constant(Section):
    """The base rate throughout."""

    name: Literal["constant"] = "constant"
    warmup_steps: NonNegativeInt = 0
    """Steps of linear rise to the base rate; the schedule itself is not shifted by them."""

    def rate(self, base: float, step: int, steps: int) -> float:
        return base


class Cosine(Section):
    """min_lr + (lr - min_lr) / 2 * (1 + cos(pi * t / period)); beyond `period` it rises again, as torch's
    CosineAnnealingLR."""

    name: Literal["cosine"] = "cosine"
    min_lr: NonNegativeFloat = 0.0
    period: PositiveInt | None = None
    """Steps from lr down to min_lr; by default the length of the run."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear rise to the base rate; the schedule itself is not shifted by them."""

    def rate(self, base: float, step: int, steps: int) -> float:
        return self.min_lr + (base - self.min_lr) / 2 * (1 + math.cos(math.pi * step / (self.period or steps)))


class MultiStep(Section):
    """The rate is multiplied by `gamma` after each milestone (in steps)."""

    name: Literal["multistep"] = "multistep"
    milestones: tuple[PositiveInt, ...]
    gamma: PositiveFloat = 0.5
    warmup_steps: NonNegativeInt = 0
    """Steps of linear rise to the base rate; the schedule itself is not shifted by them."""

    def rate(self, base: float, step: int, steps: int) -> float:
        return base * self.gamma ** sum(step >= milestone for milestone in self.milestones)


class OptimConfig(Section):
    """How the target moves."""

    optimizer: Annotated[Adam | AdamW, Field(discriminator="name")]
    schedule: Annotated[Constant | Cosine | MultiStep, Field(discriminator="name")] = Constant()
    max_grad_norm: PositiveFloat | None = None
    """Gradients are scaled down to this total norm; null: never."""
    max_skipped: NonNegativeInt = 10
    """A step whose gradient is not finite is skipped on all ranks; more than this many in a row stop the run."""

    def lr(self, step: int, steps: int) -> float:
        """The rate of optimizer step `step`, counted from 1, in a run of `steps`."""
        rate = self.schedule.rate(self.optimizer.lr, step - 1, steps)
        return rate * min(1.0, step / self.schedule.warmup_steps) if self.schedule.warmup_steps else rate


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
