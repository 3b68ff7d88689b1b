"""When and how far a network of the history follows the target, and what it restores."""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from mcir.section import Section


class Stage(Section):
    """A period of updates, up to a step."""

    until: PositiveInt | None = None
    """The last step of this stage; the last stage has none."""
    every: PositiveInt
    """Optimizer steps between two updates."""


class Schedule(Section):
    """When and how far one negative follows the target: negative = decay * negative + (1 - decay) * target."""

    update_every: PositiveInt | tuple[Stage, ...] | None = 100
    """Optimizer steps between two updates, or stages of it: `[{until: 100000, every: 1000}, {every: 2000}]`. Steps
    count from 1 and the update follows `optimizer.step`."""
    trigger: PositiveFloat | None = None
    """In place of `update_every`: updated after a step in which mean_b std(2 (restored - clean)) is above this,
    triggered ones in turn, one a step (Aitical/MCLIR's adaptive models: 0.022, with a decay of 0.001). The target is
    gathered every step."""
    decay: float = Field(0.1, ge=0, lt=1)
    """Share of the negative's own past that an update keeps."""
    start: float = Field(0.0, ge=0, le=1)
    """Share of a random initialisation of its own that the negative starts with; the rest is the target (0.1 as
    published)."""
    source: Literal["target", "ema"] = "target"
    """What it follows: the target, or its average for evaluation (`ema_decay`; DCKD)."""
    role: Literal["negative", "anchor"] = "negative"
    """`negative` repels; `anchor` attracts, beside the clean image where the contrast has one: for a slow history
    (SSC-SR, PNE), such as update_every 1 and decay 0.999."""
    views: PositiveInt = 1
    """Images that it restores: the degraded one and `views` - 1 noisy copies of it, each an image of the past, at the
    memory of one network (DCKD: 5)."""
    view_sigma: tuple[NonNegativeFloat, NonNegativeFloat] = (1.0, 30.0)
    """Range, of 255, of the copies' white Gaussian noise, drawn for each image; clipped to [0, 1]."""
    view_gray: float = Field(0.5, ge=0, le=1)
    """Share of the copies whose noise is the same in all channels."""

    @model_validator(mode="before")
    @classmethod
    def _a_trigger_stands_alone(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("trigger") is not None:
            return {"update_every": None} | values
        return values

    @model_validator(mode="after")
    def _consistent(self) -> "Schedule":
        if (self.update_every is None) == (self.trigger is None):
            raise ValueError("a negative has either update_every or a trigger")
        if isinstance(self.update_every, tuple):
            *ends, last = [stage.until for stage in self.update_every] or [0]
            if last is not None or None in ends or sorted(set(ends)) != ends:  # type: ignore[type-var]
                raise ValueError(
                    "update_every: each stage but the last has an `until`, and these must rise; the last has none"
                )
        low, high = self.view_sigma
        if low > high:
            raise ValueError(f"view_sigma: write the pair as [low, high], not [{low}, {high}]")
        return self

    def last_update(self, step: int) -> int:
        """The last step up to this one that it is updated after, 0 for none; not of a triggered one."""
        if isinstance(self.update_every, int):
            return step - step % self.update_every
        begin, last = 0, 0
        for stage in self.update_every or ():
            end = min(step, stage.until or step)
            if end - end % stage.every > begin:
                last = end - end % stage.every
            begin = end
        return last
