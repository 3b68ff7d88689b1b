"""Reconstruction losses: `restored` against `clean`, both (B, 3, H, W) in [0, 1] RGB, to one scalar, computed in fp32.

Each entry of the `objective.reconstruction` section is the loss itself: its fields are its arguments.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from mcir.section import Section


class _Loss(Section):
    weight: PositiveFloat = 1.0
    """Factor of this loss in the objective."""


class L1(_Loss):
    """Mean absolute error."""

    name: Literal["l1"] = "l1"

    def __call__(self, restored: Tensor, clean: Tensor) -> Tensor:
        return self.weight * F.l1_loss(restored.float(), clean)


class Charbonnier(_Loss):
    """mean sqrt((restored - clean)^2 + eps), eps as in BasicSR (1e-12)."""

    name: Literal["charbonnier"] = "charbonnier"
    eps: PositiveFloat = 1e-12

    def __call__(self, restored: Tensor, clean: Tensor) -> Tensor:
        return self.weight * ((restored.float() - clean).square() + self.eps).sqrt().mean()


class MSE(_Loss):
    """Mean squared error."""

    name: Literal["mse"] = "mse"

    def __call__(self, restored: Tensor, clean: Tensor) -> Tensor:
        return self.weight * F.mse_loss(restored.float(), clean)


class PSNR(_Loss):
    """-PSNR in dB, per image, as NAFNet trains: mean_b 10 / ln 10 * ln(mse_b + 1e-8) (megvii-research/NAFNet)."""

    name: Literal["psnr"] = "psnr"

    def __call__(self, restored: Tensor, clean: Tensor) -> Tensor:
        mse = (restored.float() - clean).square().mean(dim=(1, 2, 3))  # (B,)
        return self.weight * 10 * torch.log10(mse + 1e-8).mean()


class NegativeSSIM(_Loss):
    """-SSIM as IDT trains: 11 x 11 Gaussian of sigma 1.5, zero padding, range 1, per channel (jiexiaou/IDT,
    loss/SSIM.py)."""

    name: Literal["ssim"] = "ssim"

    def __call__(self, restored: Tensor, clean: Tensor) -> Tensor:
        return -self.weight * _ssim(restored.float(), clean)


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    offsets = torch.arange(11, device=x.device, dtype=x.dtype) - 5
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = (window / window.sum()).expand(x.shape[1], 1, 11)  # one row per channel

    def blur(image: Tensor) -> Tensor:
        image = F.conv2d(image, window[:, :, None, :], padding=(0, 5), groups=image.shape[1])
        return F.conv2d(image, window[:, :, :, None], padding=(5, 0), groups=image.shape[1])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return ssim.mean()


AnyReconstruction = Annotated[L1 | Charbonnier | MSE | PSNR | NegativeSSIM, Field(discriminator="name")]
