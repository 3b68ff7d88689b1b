"""The section `validation`."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, field_validator

from mcir.data.chain import AnyDegradation
from mcir.data.rows import Units
from mcir.data.sources import AnySource
from mcir.evaluation.metrics import PROTOCOLS
from mcir.evaluation.perceptual import AnyMetric
from mcir.section import Section

MEAN = "mean"
"""Where the mean over the sets stands, beside their names."""


def set_name(name: str) -> str:
    """The name; ValueError for one that files, such as the pictures of a set, cannot have."""
    if not re.fullmatch(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*", name):
        raise ValueError(f"{name!r} is no name of a set: it begins without a dot and has no slash")
    return name


class ValidationSet(Section):
    """Whole images to measure on."""

    source: AnySource
    degradation: AnyDegradation | None = None
    """Makes `degraded` on the fly where the source holds clean images only; always the same one for an image."""
    protocol: PROTOCOLS
    """How PSNR and SSIM are computed: sr, rgb, ffanet, dehazeformer, derain, nafnet."""
    published: dict[str, tuple[float, float]] = {}  # noqa: RUF012
    """What others measured on this set, PSNR in dB and SSIM, by name: `mcir evaluate --published` shows it."""

    def open(self) -> Units:
        """The rows, with what the degradation is made from."""
        return self.source.open(self.columns("degradation"))

    def columns(self, field: str) -> dict[str, str]:
        """The further columns that `degradation`, which stands at `field`, reads."""
        return dict.fromkeys(self.degradation.columns if self.degradation else (), field)


class ValidationConfig(Section):
    """When and on what the run is measured."""

    every: PositiveInt
    """Optimizer steps between two validations; the last step always validates."""
    sets: dict[Annotated[str, AfterValidator(set_name)], ValidationSet] = Field(min_length=1)
    metrics: tuple[AnyMetric, ...] = ()
    """Measured beside PSNR and SSIM: ms_ssim, lpips, dists, niqe, or `{name: import, target: module:function,
    direction: lower}`."""
    tile: PositiveInt | Literal["auto"] | None = None
    """Side of the tiles, in degraded pixels, for images that do not fit; `auto` halves on out-of-memory."""
    weights: Literal["target", "ema"] | None = None
    """Which weights are measured; by default the EMA where there is one."""
    best: str | None = None
    """`SET/psnr`, `SET/ssim` or `SET/` and another metric that decides which checkpoint is best, `mean/psnr` … that of
    the sets together, each of the same weight; by default the first set's PSNR."""

    @field_validator("metrics")
    @classmethod
    def _one_of_a_name(cls, metrics: tuple[AnyMetric, ...]) -> tuple[AnyMetric, ...]:
        labels = ["psnr", "ssim", *(metric.label for metric in metrics)]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"two metrics are called {twice}")
        return metrics

    @property
    def lower_is_better(self) -> frozenset[str]:
        """The metrics of which less is better."""
        return frozenset(metric.label for metric in self.metrics if metric.better == "lower")
