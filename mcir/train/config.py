"""The sections `checkpoint` and `tracking`."""

from pydantic import Field, PositiveInt

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
