"""How large batches and crops are at each step: a pure function of the step."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import PositiveInt

from mcir.section import Section


class Stage(Section):
    """Other crops and batches from a step on, as progressive training has them (Restormer: crops of 128 to 384 pixels
    with batches of 64 to 8)."""

    after: PositiveInt
    """It holds for the steps after this one, until the next stage."""
    crop_size: PositiveInt
    """Instead of data.crop_size."""
    batch_size: PositiveInt
    """Instead of the run's batch_size."""


@dataclass(frozen=True)
class Phase:
    """Steps alike: they begin after `step`, with the sample at `position`, and end before that at `end`, if ever."""

    step: int
    position: int
    end: int | None
    batch_size: int
    crop_size: int


def phases(batch_size: int, crop_size: int, stages: Sequence[Stage]) -> tuple[Phase, ...]:
    """A run that begins with this batch and crop and goes on with `stages`, whose `after` rise."""
    sizes = [(0, batch_size, crop_size), *((stage.after, stage.batch_size, stage.crop_size) for stage in stages)]
    made, position = list[Phase](), 0
    for i, (step, batch, crop) in enumerate(sizes):
        end = position + (sizes[i + 1][0] - step) * batch if i + 1 < len(sizes) else None
        made.append(Phase(step, position, end, batch, crop))
        position = end or 0
    return tuple(made)


def phase_of(phases: Sequence[Phase], step: int) -> Phase:
    """That of a step, counted from 1."""
    return next(phase for phase in reversed(phases) if phase.step < step)


def position_after(phases: Sequence[Phase], step: int) -> int:
    """Samples that are taken in so many steps."""
    phase = phase_of(phases, max(step, 1))
    return phase.position + (step - phase.step) * phase.batch_size
