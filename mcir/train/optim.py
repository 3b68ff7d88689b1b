"""Optimizer and learning rate from the config. The rate is a pure function of the step: nothing of it is saved."""

import inspect
import math
from abc import abstractmethod
from collections.abc import Iterable
from itertools import pairwise
from types import MethodType
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
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
        return _optimizer(torch.optim.Adam, self, parameters)


class AdamW(Section):
    """AdamW: decoupled weight decay."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return _optimizer(torch.optim.AdamW, self, parameters)


def _optimizer(
    kind: type[torch.optim.Adam], section: Adam | AdamW, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """The fused optimizer, without torch.compile's import at its first calls: a third of a run's start.

    torch's optimizers load the compiler to tell it that it must not trace them (`torch._compile._disable_dynamo` looks
    for the answer in an attribute first; `step` breaks the graph). Nothing here traces an optimizer.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        method.__dict__.setdefault("__dynamo_disable", method)
    optimizer = kind(parameters, section.lr, section.betas, section.eps, section.weight_decay, fused=True)
    step = kind.profile_hook_step(torch.no_grad()(inspect.unwrap(kind.step)))
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    return optimizer


class _Schedule(Section):
    name: str
    warmup_steps: NonNegativeInt = 0
    """Steps of linear rise to the base rate; the schedule itself is not shifted by them."""

    @abstractmethod
    def rate(self, base: float, step: int, steps: int) -> float:
        """The rate of step `step`, counted from 0, of `steps`, from the base rate."""


class Constant(_Schedule):
    """The base rate throughout."""

    name: Literal["constant"] = "constant"

    def rate(self, base: float, step: int, steps: int) -> float:
        return base


class Linear(_Schedule):
    """A straight line from `start_lr` to `end_lr`."""

    name: Literal["linear"] = "linear"
    start_lr: NonNegativeFloat | None = None
    """By default the base rate."""
    end_lr: NonNegativeFloat | None = None
    """By default the base rate."""

    def rate(self, base: float, step: int, steps: int) -> float:
        start = base if self.start_lr is None else self.start_lr
        end = base if self.end_lr is None else self.end_lr
        return start + (end - start) * step / steps


class Cosine(_Schedule):
    """min_lr + (lr - min_lr) / 2 * (1 + cos(pi * t / period)); beyond `period` it rises again, as torch's
    CosineAnnealingLR."""

    name: Literal["cosine"] = "cosine"
    min_lr: NonNegativeFloat = 0.0
    period: PositiveInt | None = None
    """Steps from lr down to min_lr; by default the length of the run, or of the piece."""

    def rate(self, base: float, step: int, steps: int) -> float:
        return self.min_lr + (base - self.min_lr) / 2 * (1 + math.cos(math.pi * step / (self.period or steps)))


class MultiStep(_Schedule):
    """The rate is multiplied by `gamma` after each milestone (in steps)."""

    name: Literal["multistep"] = "multistep"
    milestones: tuple[PositiveInt, ...]
    gamma: PositiveFloat = 0.5

    def rate(self, base: float, step: int, steps: int) -> float:
        return base * self.gamma ** sum(step >= milestone for milestone in self.milestones)


class Piece(Section):
    """A piece of a schedule; it begins where the one before ends."""

    until: PositiveInt | None = None
    """The last step of the piece, counted from the beginning of the run; null, for the last piece only: its end."""
    lr: PositiveFloat | None = None
    """The base rate of the piece; by default the optimizer's."""
    schedule: Annotated[Constant | Linear | Cosine | MultiStep, Field(discriminator="name")]
    """Its own steps count from the beginning of the piece."""


class Segments(Section):
    """One schedule after the other: flat and then a cosine, cosines with floors of their own, a line up and steps
    down."""

    name: Literal["segments"] = "segments"
    pieces: tuple[Piece, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        ends = [math.inf if piece.until is None else piece.until for piece in self.pieces]
        for i, (end, following) in enumerate(pairwise(ends), 1):
            if following <= end or math.isinf(end):
                raise ValueError(f"pieces.{i} does not end after the one before it: until must rise")
        return self

    @property
    def end(self) -> int | None:
        """The last step that has a rate; null: any has."""
        return self.pieces[-1].until

    def locate(self, step: int, steps: int) -> tuple[Piece, int, int]:
        """(piece, its first step, its length) at a step counted from 0."""
        begin, last = 0, self.pieces[-1]
        for piece in self.pieces[:-1]:
            assert piece.until is not None
            if step < piece.until:
                return piece, begin, piece.until - begin
            begin = piece.until
        return last, begin, (last.until or max(steps, begin + 1)) - begin


class OptimConfig(Section):
    """How the target moves."""

    optimizer: Annotated[Adam | AdamW, Field(discriminator="name")]
    schedule: Annotated[Constant | Linear | Cosine | MultiStep | Segments, Field(discriminator="name")] = Constant()
    lr_every: PositiveInt = 1
    """Steps between two changes of the rate: an epoch's, where the published schedule moves once an epoch."""
    max_grad_norm: PositiveFloat | None = None
    """Gradients are scaled down to this total norm; null: never."""
    max_skipped: NonNegativeInt = 10
    """A step whose gradient is not finite is skipped on all ranks; more than this many in a row stop the run."""

    def lr(self, step: int, steps: int) -> float:
        """The rate of optimizer step `step`, counted from 1, in a run of `steps`."""
        schedule, base, place = self.schedule, self.optimizer.lr, (step - 1) // self.lr_every * self.lr_every
        if isinstance(schedule, Segments):
            piece, begin, steps = schedule.locate(place, steps)
            schedule, base, place = piece.schedule, piece.lr or base, place - begin
        rate = schedule.rate(base, place, steps)
        if not schedule.warmup_steps:
            return rate
        return rate * min(1.0, (place + self.lr_every) / schedule.warmup_steps)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
