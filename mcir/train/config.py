"""The sections `checkpoint`, `tracking` and `watch`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from mcir.section import PathText, Section


class CheckpointConfig(Section):
    """When the run is saved, and how much is kept."""

    every: PositiveInt = 5000
    """Optimizer steps between two checkpoints; the last step and a stop signal always save."""
    keep_last: PositiveInt = 3
    keep_best: bool = True
    """Whether the checkpoint of the best validation is kept beyond `keep_last`."""
    to: PathText | None = None
    """Another place to which each checkpoint is copied when it is whole here, such as s3://bucket/runs, and from which
    `--resume auto` brings the newest back to a disk that lacks it. Credentials are the environment's."""


TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]
"""Accelerate's names."""


class TrackingConfig(Section):
    """What trackers and the progress bar show."""

    to: tuple[Annotated[TrackerName, BeforeValidator(lambda name: "comet_ml" if name == "comet" else name)], ...] = (
        "tensorboard",
    )
    """Where curves, pictures and the config go; all but TensorBoard are packages to be installed. Credentials,
    addresses and modes are the environment's (WANDB_API_KEY, WANDB_MODE=offline, MLFLOW_TRACKING_URI, …); without any,
    MLflow writes `mlruns` in the run directory. A resumed run goes on in the same remote run."""
    project: Annotated[str, Field(min_length=1)] = "mcir"
    """That the run belongs to (MLflow: experiment), where the tracker's own environment variable does not say."""
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
