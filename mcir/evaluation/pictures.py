"""What a validation shows: pictures side by side, and the table of the baseline against the network."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from mcir.evaluation.config import MEAN
from mcir.evaluation.evaluate import Picture, Scores, mean_of_sets

PICTURE_SIDE = 384


def side_by_side(images: Sequence[Tensor]) -> Tensor:
    """(3, H, W) images of several sizes, the central part of each, in one row of the last one's size."""
    height, width = images[-1].shape[-2:]
    shown = [F.interpolate(image[None], (height, width), mode="nearest")[0] for image in images]
    top, left = max(0, (height - PICTURE_SIDE) // 2), max(0, (width - PICTURE_SIDE) // 2)
    return torch.cat([image[:, top : top + PICTURE_SIDE, left : left + PICTURE_SIDE] for image in shown], dim=2)


def to_image(rgb: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] as an 8-bit picture."""
    return Image.fromarray((rgb * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def comparison_png(path: Path, pictures: Sequence[Picture], references: Sequence[Picture]) -> None:
    """Rows of degraded | bicubic (or nothing, where the degraded image is the baseline) | restored | clean."""
    rows = []
    for picture, reference in zip(pictures, references, strict=True):
        upscaled = [reference.restored] if picture.degraded.shape != picture.clean.shape else []
        rows.append(side_by_side([picture.degraded, *upscaled, picture.restored, picture.clean]))
    width = min(row.shape[2] for row in rows)
    image = to_image(torch.cat([row[:, :, :width] for row in rows], dim=1))
    temporary = path.with_name(f".{path.name}.partial")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)


def results_table(baseline_name: str, scores: Mapping[str, tuple[Scores, Scores]]) -> Table:
    """Set by set: (baseline, network), and the mean of several sets."""
    table = Table("set", "images", f"{baseline_name} PSNR / SSIM", "restored PSNR / SSIM", "gain")
    before_of, after_of = (mean_of_sets({name: pair[i].mean() for name, pair in scores.items()}) for i in (0, 1))
    for name in [*scores, *([MEAN] if len(scores) > 1 else [])]:
        before, after = before_of[name], after_of[name]
        table.add_row(
            name,
            str(len(scores[name][1].keys)) if name in scores else f"{len(scores)} sets",
            f"{before['psnr']:.2f} dB / {before['ssim']:.4f}",
            f"{after['psnr']:.2f} dB / {after['ssim']:.4f}",
            f"{after['psnr'] - before['psnr']:+.2f} dB",
        )
    return table


def sources_table(sources: Mapping[str, Mapping[str, float]]) -> Table:
    """What `mcir.objective.sources` read of the samples of each source."""
    table = Table("source", "share of samples", "loss", "PSNR of training crops")
    for label, values in sources.items():
        table.add_row(label, f"{values['share']:.0%}", f"{values['loss']:.4g}", f"{values['psnr']:.2f} dB")
    return table
