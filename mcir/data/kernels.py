"""Blur kernels of blind super-resolution: square, of an odd side, weights summing to 1.

Shapes of BSRGAN (Zhang et al., ICCV 2021) and Real-ESRGAN (Wang et al., ICCV workshops 2021). With q the squared
distance to the centre in units of sigma, along axes turned by `angle`: exp(-q / 2) is the Gaussian, exp(-q^beta / 2)
the generalised one (Pascal et al., 2013), 1 / (1 + q^beta) the plateau.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Profile = Literal["gaussian", "generalised", "plateau"]


def blur_kernel(
    size: int, sigma: tuple[float, float], angle: float = 0.0, profile: Profile = "gaussian", beta: float = 1.0
) -> Tensor:
    """(size, size). `sigma` in pixels along the two axes, the first of them `angle` radians against the horizontal."""
    along = np.arange(size) - (size - 1) / 2
    x, y = along[None, :], along[:, None]
    cos, sin = np.cos(angle), np.sin(angle)
    square = ((cos * x + sin * y) / sigma[0]) ** 2 + ((cos * y - sin * x) / sigma[1]) ** 2
    if profile == "plateau":
        kernel = 1 / (1 + square**beta)
    else:
        kernel = np.exp(-0.5 * (square**beta if profile == "generalised" else square))
    return torch.from_numpy(kernel / kernel.sum()).float()


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """(size, size): lets frequencies below `cutoff` (radians a pixel, up to pi) pass in every direction, and rings.

    The inverse Fourier transform of a disc of radius c is c J1(c r) / (2 pi r), c^2 / (4 pi) in the middle.
    """
    from scipy.special import j1

    along = np.arange(size) - (size - 1) / 2
    radius = np.hypot(along[None, :], along[:, None])
    middle = radius == 0
    kernel = np.where(middle, cutoff**2 / (4 * np.pi), cutoff * j1(cutoff * radius) / (2 * np.pi * radius + middle))
    return torch.from_numpy(kernel / kernel.sum()).float()
