"""The sections `checkpoint`, `tracking` and `watch`."""

from pydantic import Field, PositiveFloat, PositiveInt

from mcir.section import Section


class CheckpointConfig(Section):
    """When the run is saved, and how much is kept."""

    every: PositiveInt = 5000
    """Optimizer steps between two checkpoints; the last step and a stop signal always save."""
    keep_last: PositiveInt = 3
    keep_best: bool = True
    """Whether the checkpoint of the best validation is kept beyond `keep_last`."""


class TrackingConfig(Section):
    """What TensorBoard and the progress bar show."""

    log_every: PositiveInt = 100
    """Optimizer steps between two log lines. Only these steps wait for the device."""
    num_images: int = Field(2, ge=0)
    """Picture rows (degraded, negative, restored, clean, difference) of each validation set."""


class WatchConfig(Section):
    """When a run is said to have left its sane band. Out of it for `patience` steps in a row, it stops."""

    max_share: PositiveFloat = 1.0
    """A contrast that lowers the loss, such as SPN, which has no bound below, does so by less than this share of the
    reconstruction loss."""
    deviations: PositiveFloat = 10.0
    """The reconstruction loss is less than so many deviations above its running mean of the last hundred steps or so
    (5 % of that count as one at least). A single step above it, or one of the gradient norm, is told, no more."""
    patience: PositiveInt = 20
    max_drop: PositiveFloat = 6.0
    """A validation that many dB below the best is told."""
