"""The section `validation`."""

from typing import Literal

from pydantic import Field, PositiveInt

from mcir.data.degrade import AnyDegradation
from mcir.data.sources import AnySource
from mcir.evaluation.metrics import PROTOCOLS
from mcir.section import Section

MEAN = "mean"
"""Where the mean over the sets stands, beside their names."""


class ValidationSet(Section):
    """Whole images to measure on."""

    source: AnySource
    degradation: AnyDegradation | None = None
    """Makes `degraded` on the fly where the source holds clean images only; always the same one for an image."""
    protocol: PROTOCOLS
    """How PSNR and SSIM are computed: sr, rgb, ffanet, dehazeformer, derain, nafnet."""
    published: dict[str, tuple[float, float]] = {}  # noqa: RUF012
    """What others measured on this set, PSNR in dB and SSIM, by name: `mcir evaluate --published` shows it."""


class ValidationConfig(Section):
    """When and on what the run is measured."""

    every: PositiveInt
    """Optimizer steps between two validations; the last step always validates."""
    sets: dict[str, ValidationSet] = Field(min_length=1)
    tile: PositiveInt | Literal["auto"] | None = None
    """Side of the tiles, in degraded pixels, for images that do not fit; `auto` halves on out-of-memory."""
    weights: Literal["target", "ema"] | None = None
    """Which weights are measured; by default the EMA where there is one."""
    best: str | None = None
    """`SET/psnr` or `SET/ssim` that decides which checkpoint is best, `mean/psnr` or `mean/ssim` that of the sets
    together, each of the same weight; by default the first set's PSNR."""
