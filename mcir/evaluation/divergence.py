"""Where two models differ on one picture, beside where the picture was degraded.

The paper's figure: a network and an earlier state of it differ most where the input is degraded, so pushing them apart
works there. `agreement` puts a number to what the figure shows.
"""

from pathlib import Path

import torch
from torch import Tensor

from mcir.data.resize import imresize
from mcir.restoration.images import Picture, with_rgb, write

RAMP = ((0, 0, 0), (80, 20, 110), (220, 70, 60), (255, 190, 60), (255, 255, 255))  # dark to light, also in grey


def difference(first: Tensor, second: Tensor) -> Tensor:
    """Mean absolute difference over the colours: two of (3, H, W) -> (H, W), in the units of the images."""
    return (first.clamp(0, 1) - second.clamp(0, 1)).abs().mean(0)


def agreement(divergence: Tensor, degradation: Tensor) -> float:
    """Pearson correlation of two maps (H, W): 1 if the models differ just where it was degraded, NaN if one is flat."""
    return float(torch.corrcoef(torch.stack([divergence.flatten(), degradation.flatten()]).double())[0, 1])


def save_divergence(path: Path, degraded: Tensor, clean: Tensor, first: Tensor, second: Tensor) -> float:
    """Writes a PNG of four panels: degraded, restored by the first model, degradation, divergence; returns `agreement`.

    (3, H, W) in [0, 1], `degraded` smaller by the scale. Each map is stretched so that its 99.5th percentile is white.
    Raises ValueError for sizes that do not fit, OSError when the file cannot be written.
    """
    if not first.shape == second.shape == clean.shape:
        raise ValueError(f"Sizes differ: {tuple(first.shape)}, {tuple(second.shape)}, clean {tuple(clean.shape)}.")
    degraded, clean, first, second = (image.detach().float().cpu() for image in (degraded, clean, first, second))
    if degraded.shape != clean.shape:
        degraded = imresize(degraded[None], clean.shape[1] // degraded.shape[1])[0]
    degradation, divergence = difference(degraded, clean), difference(first, second)
    panels = torch.cat([degraded, first, colour(degradation), colour(divergence)], dim=2)
    blank = Picture(panels.new_zeros(*panels.shape[1:], 3, dtype=torch.uint8).numpy(), "PNG")
    write(path, with_rgb(blank, panels))
    return agreement(divergence, degradation)


def colour(values: Tensor) -> Tensor:
    """A map (H, W) >= 0 as a picture (3, H, W) along RAMP."""
    peak = values.flatten().kthvalue(max(1, int(0.995 * values.numel()))).values.clamp(min=1e-6)
    ramp = torch.tensor(RAMP, dtype=values.dtype, device=values.device) / 255
    position = (values / peak).clamp(0, 1) * (len(RAMP) - 1)
    below = position.floor().clamp(max=len(RAMP) - 2)
    left, right = ramp[below.long()], ramp[below.long() + 1]
    return torch.lerp(left, right, (position - below)[..., None]).permute(2, 0, 1)
