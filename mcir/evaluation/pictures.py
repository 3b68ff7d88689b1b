"""What a validation shows: pictures side by side, and the table of the baseline against the network."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from mcir.evaluation.config import MEAN
from mcir.evaluation.evaluate import Picture, Scores, mean_of_sets
from mcir.evaluation.report import png, write_whole

PICTURE_SIDE = 384
LABEL = 18
"""Height of the line that says what a picture is."""


def side_by_side(images: Mapping[str, Tensor], compared: Sequence[Tensor]) -> Tensor:
    """(3, H, W) images of several sizes in one row of the last one's size: labels, the central parts, and below them,
    enlarged, the window in which the `compared` ones (of the last one's size) differ most."""
    last = list(images.values())[-1]
    height, width = last.shape[-2:]
    shown = [F.interpolate(image[None].cpu(), (height, width), mode="nearest")[0] for image in images.values()]
    top, left = max(0, (height - PICTURE_SIDE) // 2), max(0, (width - PICTURE_SIDE) // 2)
    centres = [image[:, top : top + PICTURE_SIDE, left : left + PICTURE_SIDE] for image in shown]
    panel = centres[0].shape[2]
    y, x, side = detail_window(compared)
    times = max(1, panel // side)
    columns = []
    for label, image, centre in zip(images, shown, centres, strict=True):
        detail = image[:, y : y + side, x : x + side].repeat_interleave(times, 1).repeat_interleave(times, 2)
        detail = F.pad(detail[:, :, :panel], (0, max(0, panel - detail.shape[2])), value=1)
        columns.append(torch.cat([_label(label, panel), centre, detail.new_ones(3, 4, panel), detail], dim=1))
    return torch.cat(columns, dim=2)


def one_below_another(rows: Sequence[Tensor]) -> Tensor:
    """(3, H, W) pictures in one, white where one is narrower."""
    width = max(row.shape[2] for row in rows)
    return torch.cat([F.pad(row, (0, width - row.shape[2]), value=1) for row in rows], dim=1)


def detail_window(images: Sequence[Tensor]) -> tuple[int, int, int]:
    """(top, left, side) of the square in which (3, H, W) images of one size differ most from each other."""
    stacked = torch.stack([image.float().cpu() for image in images]).clamp(0, 1)
    height, width = stacked.shape[-2:]
    side = min(height, width, max(24, min(height, width, PICTURE_SIDE) // 6))
    spread, stride = (stacked.amax(0) - stacked.amin(0)).mean(0), max(1, side // 4)
    mean = F.avg_pool2d(spread[None, None], side, stride)[0, 0]
    index = int(mean.argmax())
    return index // mean.shape[1] * stride, index % mean.shape[1] * stride, side


def _label(text: str, width: int) -> Tensor:
    image = Image.new("L", (width, LABEL), 255)
    ImageDraw.Draw(image).text((2, 1), text, fill=0, font=ImageFont.load_default(13))
    return (torch.from_numpy(np.array(image)).float() / 255).expand(3, -1, -1)


def to_image(rgb: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] as an 8-bit picture."""
    return Image.fromarray((rgb * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def comparison_png(path: Path, pairs: Sequence[tuple[Picture, Picture]]) -> None:
    """Rows of degraded | bicubic (or nothing, where the degraded image is the baseline) | restored | clean. `pairs`:
    what the network and what the baseline made of an image."""
    rows = []
    for picture, reference in pairs:
        upscaled = {"bicubic": reference.restored} if picture.degraded.shape != picture.clean.shape else {}
        shown = {"degraded": picture.degraded, **upscaled, "restored": picture.restored, "clean": picture.clean}
        rows.append(side_by_side(shown, [reference.restored, picture.restored]))
    write_whole(path, png(to_image(one_below_another(rows))))


def results_table(
    baseline_name: str,
    scores: Mapping[str, tuple[Scores, Scores]],
    contrast_share: float | None = None,
    further: Sequence[str] = (),
) -> Table:
    """Set by set: (baseline, network), `further` metrics of both, and the mean of several sets; below it what part the
    contrast had."""
    caption = None if contrast_share is None else f"the contrast was {contrast_share:.2%} of the reconstruction loss"
    heads = "set", "images", f"{baseline_name} PSNR / SSIM", "restored PSNR / SSIM", "gain", *map(str.upper, further)
    table = Table(*heads, caption=caption)
    before_of, after_of = (mean_of_sets({name: pair[i].mean() for name, pair in scores.items()}) for i in (0, 1))
    for name in [*scores, *([MEAN] if len(scores) > 1 else [])]:
        before, after = before_of[name], after_of[name]
        table.add_row(
            name,
            str(len(scores[name][1].keys)) if name in scores else f"{len(scores)} sets",
            f"{before['psnr']:.2f} dB / {before['ssim']:.4f}",
            f"{after['psnr']:.2f} dB / {after['ssim']:.4f}",
            f"{after['psnr'] - before['psnr']:+.2f} dB",
            *(f"{before[metric]:.4f} -> {after[metric]:.4f}" for metric in further),
        )
    return table


def sources_table(sources: Mapping[str, Mapping[str, float]]) -> Table:
    """What `mcir.objective.sources` read of the samples of each source."""
    table = Table("source", "share of samples", "loss", "PSNR of training crops")
    for label, values in sources.items():
        table.add_row(label, f"{values['share']:.0%}", f"{values['loss']:.4g}", f"{values['psnr']:.2f} dB")
    return table
