"""Measuring a network on whole images: every rank takes its share, the values are gathered per image and averaged once.

No collective is called between two images, so uneven shares, fewer images than ranks and slow images block nobody, and
the mean is summed in the order of the images: the same number for any number of processes. Validation inside a run and
`mcir evaluate` are both this function.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch import distributed as dist

from mcir.data.decode import to_float
from mcir.data.resize import imresize
from mcir.data.rows import Row
from mcir.data.transforms import validation_pair
from mcir.errors import UserError
from mcir.evaluation import perceptual
from mcir.evaluation.config import MEAN, ValidationConfig, ValidationSet
from mcir.evaluation.metrics import score
from mcir.evaluation.perceptual import AnyMetric
from mcir.restoration.inference import is_out_of_memory

Restore = Callable[[Tensor], Tensor]
"""(1, 3, H, W) in [0, 1] -> (1, 3, s * H, s * W)."""


@dataclass(frozen=True)
class Scores:
    """Values of one set, one entry an image: `psnr` in dB, `ssim`, and of further metrics by their labels."""

    keys: list[str]
    values: dict[str, list[float]]
    failed: Mapping[int, str] = field(default_factory=dict)
    """By place in the set: images that could not be measured, which are left out above, and why."""

    def without(self, failed: Mapping[int, str]) -> "Scores":
        """Without images that failed elsewhere, so that the same images are compared."""
        places = (i for i in range(len(self.keys) + len(self.failed)) if i not in self.failed)
        kept = [j for j, place in enumerate(places) if place not in failed]
        values = {metric: [column[j] for j in kept] for metric, column in self.values.items()}
        return Scores([self.keys[j] for j in kept], values, {**failed, **self.failed})

    def mean(self) -> dict[str, float]:
        return {metric: float(np.mean(values)) for metric, values in self.values.items()}


def mean_of_sets(means: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The means of the sets, and under `mean` the mean of these: each set has the same weight, whatever its size."""
    metrics = next(iter(means.values()))
    together = {metric: float(np.mean([mean[metric] for mean in means.values()])) for metric in metrics}
    return {**{name: dict(mean) for name, mean in means.items()}, MEAN: together}


@dataclass(frozen=True)
class Picture:
    """One image of a set: `degraded`, `restored`, `clean`, (3, H, W) in [0, 1] on the CPU."""

    key: str
    degraded: Tensor
    restored: Tensor
    clean: Tensor


@torch.no_grad()
def evaluate(
    restore: Restore,
    data: ValidationSet,
    scale: int,
    accelerator: Accelerator,
    num_pictures: int = 0,
    visit: Callable[[Picture], Mapping[str, float]] | None = None,
    metrics: Sequence[AnyMetric] = (),
) -> tuple[Scores, list[Picture]]:
    """Scores of every image of a set, in its order, on all ranks, and the first `num_pictures` images. Collective.

    `metrics` are measured beside those of the protocol. `visit` sees each image on the rank that restored it; the
    values it returns join the image's scores. An image that cannot be read, that the protocol or the memory cannot take
    or that `visit` refuses costs no other: it is among the scores' `failed`.
    Raises UserError: no images, or none that can be measured.
    """
    group = _patient_group() if accelerator.num_processes > 1 else None  # created while the ranks are together
    measures = {metric.label: metric.build(accelerator.device) for metric in metrics}
    share: list[tuple[int, str, dict[str, float], Picture | None]] = []
    failed: dict[int, str] = {}
    for index, row in enumerate(data.open()):
        if index % accelerator.num_processes != accelerator.process_index:
            continue
        size = "its"
        try:
            degraded, clean = pair_of(row, data, scale, accelerator.device)
            size = f"{degraded.shape[2]} x {degraded.shape[3]}"
            restored = restore(degraded)
            scores = score(restored, clean, data.protocol, scale=scale)
            values = {metric: float(value) for metric, value in scores.items()}
            values |= perceptual.measure(measures, restored, clean)
            shown = None
            if visit or index < num_pictures:
                shown = Picture(row.key, degraded[0].cpu(), restored[0].clamp(0, 1).cpu(), clean[0].cpu())
            if visit and shown:
                values |= visit(shown)
            share.append((index, row.key, values, shown if index < num_pictures else None))
        except UserError as error:
            failed[index] = str(error)
        except ValueError as error:
            failed[index] = f"{row.where}: {error}"
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed[index] = f"{row.where}: {size} pixels do not fit into memory; set tile to auto"
    shares: list[Any] = [(share, failed)]
    if group is not None:
        shares = [None] * accelerator.num_processes
        dist.all_gather_object(shares, (share, failed), group=group)
    images = sorted((image for share, _ in shares for image in share), key=lambda image: image[0])
    failed = dict(sorted(item for _, faults in shares for item in faults.items()))
    if not images and failed:
        raise UserError(f"no image can be measured; the first: {next(iter(failed.values()))}")
    if not images:
        raise UserError(f"no images to measure on in {data.source}")
    columns = {metric: [image[2][metric] for image in images] for metric in images[0][2]}
    pictures = [image[3] for image in images if image[3] is not None]
    return Scores([image[1] for image in images], columns, failed), pictures


def try_first(config: ValidationConfig, scale: int, device: torch.device) -> None:
    """Build the metrics, open the sets and decode the first pair of each. UserError where that fails: better now than
    after hours."""
    for metric in config.metrics:
        metric.build(device)
    for name, data in config.sets.items():
        units = data.source.open_at(
            f"validation.sets.{name}.source", data.columns(f"validation.sets.{name}.degradation")
        )
        try:
            row = next(iter(units), None)
            if row is None:
                raise UserError("no images to measure on")
            pair_of(row, data, scale, device)
        except UserError as error:
            raise UserError(f"validation.sets.{name}: {error}") from error


def pair_of(row: Row, data: ValidationSet, scale: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """degraded (1, 3, H, W) and clean (1, 3, s * H, s * W) of a row, in [0, 1] on the device. UserError, ValueError."""
    rng = np.random.default_rng([0, zlib.crc32(row.key.encode())])
    degraded, clean = validation_pair(row, scale, data.degradation, rng)
    return to_float(degraded[None]).to(device), to_float(clean[None]).to(device)


def baseline(scale: int) -> Restore:
    """What a network must beat: MATLAB's bicubic for super-resolution, the degraded image itself elsewhere.

    Of the same 8-bit RGB image that networks get, so PSNR is up to 0.02 dB above the rows called bicubic in papers
    (Set5 x2: 33.68 and 33.66 dB), which shrink and enlarge an unrounded Y.
    """
    return (lambda degraded: imresize(degraded, scale)) if scale > 1 else (lambda degraded: degraded)


@functools.cache
def _patient_group() -> Any:
    """All ranks, over gloo: one whose share is done waits for the slowest as long as that takes, while the watchdog of
    the run's own group would end it. A peer that dies still ends the wait at once. Collective."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=14))
