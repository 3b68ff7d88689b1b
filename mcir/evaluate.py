"""Measuring a network on whole images: every rank takes its share, the values are gathered per image and averaged once.

No collective is called between two images, so uneven shares, fewer images than ranks and slow images block nobody, and
the mean is summed in the order of the images: the same number for any number of processes.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mcir.config import ValidationSet
from mcir.data.loader import to_float
from mcir.data.resize import imresize
from mcir.data.transforms import validation_pair
from mcir.metrics import score

Restore = Callable[[Tensor], Tensor]
"""(1, 3, H, W) in [0, 1] -> (1, 3, s * H, s * W)."""


@dataclass(frozen=True)
class Scores:
    """Values of one set, one entry an image: `psnr` in dB, `ssim`."""

    keys: list[str]
    values: dict[str, list[float]]

    def mean(self) -> dict[str, float]:
        return {metric: float(np.mean(values)) for metric, values in self.values.items()}


@dataclass(frozen=True)
class Picture:
    """One image of a set: `degraded`, `restored`, `clean`, (3, H, W) in [0, 1] on the CPU."""

    key: str
    degraded: Tensor
    restored: Tensor
    clean: Tensor


@torch.no_grad()
def evaluate(
    restore: Restore, data: ValidationSet, scale: int, accelerator: Accelerator, num_pictures: int = 0
) -> tuple[Scores, list[Picture]]:
    """Scores of every image of a set, in its order, on all ranks, and the first `num_pictures` images. Collective."""
    shares: list[tuple[int, str, dict[str, float], Picture | None]] = []
    for index, row in enumerate(data.source.open()):
        if index % accelerator.num_processes != accelerator.process_index:
            continue
        rng = np.random.default_rng([0, zlib.crc32(row.key.encode())])
        pair = validation_pair(row, scale, data.degradation, rng)
        degraded, clean = (to_float(image[None]).to(accelerator.device) for image in pair)
        restored = restore(degraded)
        values = score(restored, clean, data.protocol, **({"scale": scale} if data.protocol == "sr" else {}))
        shown = (degraded[0].cpu(), restored[0].clamp(0, 1).cpu(), clean[0].cpu())
        picture = Picture(row.key, *shown) if index < num_pictures else None
        shares.append((index, row.key, {metric: float(value) for metric, value in values.items()}, picture))
    images = sorted(gather_object(shares), key=lambda image: image[0])
    metrics = {metric: [image[2][metric] for image in images] for metric in images[0][2]}
    return Scores([image[1] for image in images], metrics), [image[3] for image in images if image[3] is not None]


def baseline(scale: int) -> Restore:
    """What a network must beat: MATLAB's bicubic for super-resolution, the degraded image itself elsewhere."""
    return (lambda degraded: imresize(degraded, scale)) if scale > 1 else (lambda degraded: degraded)
