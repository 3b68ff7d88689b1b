"""Reconstruction losses: `restored` against `clean`, both (B, 3, H, W) in [0, 1] RGB, one value an image, (B,), in
fp32.

Each entry of the `objective.reconstruction` section is the loss itself: its fields are its arguments.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from mcir.errors import below
from mcir.objective.features import FeaturesConfig
from mcir.section import Section


class _Loss(Section):
    name: str
    weight: PositiveFloat = 1.0
    """Factor of this loss in the objective."""
    min_side: ClassVar[int] = 1
    """Smallest side of an image that it can be taken of."""


class L1(_Loss):
    """Mean absolute error."""

    name: Literal["l1"] = "l1"

    def __call__(self, restored: Tensor, clean: Tensor) -> Tensor:
        return self.weight * _mean((restored.float() - clean).abs())


class Charbonnier(_Loss):
    """mean sqrt((restored - clean)^2 + eps), eps as in BasicSR (1e-12); MPRNet's 1e-3, squared there, is 1e-6 here."""

    name: Literal["charbonnier"] = "charbonnier"
    eps: PositiveFloat = 1e-12

    def __call__(self, restored: Tensor, clean: Tensor) -> Tensor:
        return self.weight * _mean(((restored.float() - clean).square() + self.eps).sqrt())


class MSE(_Loss):
    """Mean squared error."""

    name: Literal["mse"] = "mse"

    def __call__(self, restored: Tensor, clean: Tensor) -> Tensor:
        return self.weight * _mean((restored.float() - clean).square())


class PSNR(_Loss):
    """-PSNR in dB, per image, as NAFNet trains: mean_b 10 / ln 10 * ln(mse_b + 1e-8) (megvii-research/NAFNet)."""

    name: Literal["psnr"] = "psnr"

    def __call__(self, restored: Tensor, clean: Tensor) -> Tensor:
        return self.weight * 10 * torch.log10(_mean((restored.float() - clean).square()) + 1e-8)


class Edge(_Loss):
    """Charbonnier distance of the Laplacians, v minus its own low-pass pyramid level, eps inside the root squared
    (swz30/MPRNet, losses.py: weight 0.05 beside the Charbonnier loss)."""

    name: Literal["edge"] = "edge"
    eps: PositiveFloat = 1e-3

    def __call__(self, restored: Tensor, clean: Tensor) -> Tensor:
        difference = _laplacian(restored.float() - clean)  # linear: of the difference, not the difference of two
        return self.weight * _mean((difference.square() + self.eps**2).sqrt())


class FFT(_Loss):
    """Mean absolute error of the spectra: fft2 of both halves without normalisation, real and imaginary parts apart
    (chosj95/MIMO-UNet, c-yn/ConvIR, kkkls/FFTformer: weight 0.1). It grows with the square root of the crop's area."""

    name: Literal["fft"] = "fft"

    def __call__(self, restored: Tensor, clean: Tensor) -> Tensor:
        spectrum = torch.fft.fft2(restored.float() - clean)
        return self.weight * _mean(torch.view_as_real(spectrum).abs())


class NegativeSSIM(_Loss):
    """-SSIM: 11 x 11 Gaussian of sigma 1.5, range 1, per channel."""

    name: Literal["ssim"] = "ssim"
    padding: Literal["zeros", "none"] = "zeros"
    """zeros: as IDT and PReNet train (jiexiaou/IDT, loss/SSIM.py); none: windows inside the image alone, as
    pytorch_msssim has it."""

    def __call__(self, restored: Tensor, clean: Tensor) -> Tensor:
        ssim, _ = _ssim(restored.float(), clean, self.padding)
        return -self.weight * ssim.mean(1)


class MultiScaleSSIM(_Loss):
    """1 - MS-SSIM of five scales, windows inside the image alone (Wang et al. 2003; VainF/pytorch-msssim)."""

    name: Literal["ms_ssim"] = "ms_ssim"
    min_side: ClassVar[int] = 161

    def __call__(self, restored: Tensor, clean: Tensor) -> Tensor:
        x, y = restored.float(), clean
        exponents = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
        product = torch.ones(x.shape[:2], device=x.device)  # (B, 3)
        for scale, exponent in enumerate(exponents):
            if scale:
                odd = [side % 2 for side in x.shape[-2:]]
                x, y = (F.avg_pool2d(image, 2, padding=odd) for image in (x, y))
            ssim, structure = _ssim(x, y, "none")
            last = scale == len(exponents) - 1
            product = product * (ssim if last else structure).relu() ** exponent
        return self.weight * (1 - product.mean(1))


class Perceptual(_Loss):
    """sum_l w_l * distance of VGG_l(restored) and VGG_l(clean), which pulls the features to the clean image's."""

    name: Literal["perceptual"] = "perceptual"
    distance: Literal["l1", "mse"] = "l1"
    """l1 as BasicSR has it; mse as FFA-Net's `--perloss`, of weight 0.04 there, layers a third each."""
    features: FeaturesConfig = FeaturesConfig()

    def build(self) -> nn.Module:
        return _Perceptual(self)


class _Perceptual(nn.Module):
    def __init__(self, config: Perceptual) -> None:
        super().__init__()
        self.weight, self.distance = config.weight, config.distance
        self.features = config.features.build()

    def forward(self, restored: Tensor, clean: Tensor) -> Tensor:
        wanted = self.features.of_constant(clean)
        total = torch.zeros(len(clean), device=clean.device)
        for weight, found, target in zip(self.features.tap_weights, self.features(restored), wanted, strict=True):
            difference = found.float() - target.float()
            total = total + weight * _mean(difference.abs() if self.distance == "l1" else difference.square())
        return self.weight * total


AnyReconstruction = Annotated[
    L1 | Charbonnier | MSE | PSNR | Edge | FFT | NegativeSSIM | MultiScaleSSIM | Perceptual,
    Field(discriminator="name"),
]


def _as_list(given: Any) -> Any:
    return given if isinstance(given, list | tuple) else [given]


Terms = Annotated[
    tuple[AnyReconstruction, ...],
    Field(min_length=1),
    BeforeValidator(_as_list, json_schema_input_type=AnyReconstruction | tuple[AnyReconstruction, ...]),
]
"""One loss or a list of them, which is their weighted sum."""


class Reconstruction(nn.Module):
    """The terms by name; a second one of a name is called `name_2`. Their sum is the loss."""

    def __init__(self, terms: Sequence[AnyReconstruction]) -> None:
        super().__init__()
        self.terms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        for i, term in enumerate(terms):
            num_before = sum(other.name == term.name for other in terms[: len(self.terms)])
            name = f"{term.name}_{num_before + 1}" if num_before else term.name
            with below(f"reconstruction.{i}"):
                self.terms[name] = term.build() if isinstance(term, Perceptual) else term
        self.features = nn.ModuleList(term for term in self.terms.values() if isinstance(term, nn.Module))

    def forward(self, restored: Tensor, clean: Tensor) -> dict[str, Tensor]:
        """One value an image, (B,), of each term, weighted."""
        return {name: term(restored, clean) for name, term in self.terms.items()}


def _mean(values: Tensor) -> Tensor:
    """(B, ...) -> (B,)"""
    return values.flatten(1).mean(1)


def _ssim(x: Tensor, y: Tensor, padding: Literal["zeros", "none"]) -> tuple[Tensor, Tensor]:
    """SSIM and its factor of contrast and structure, means over the image, (B, 3)."""
    offsets = torch.arange(11, device=x.device, dtype=x.dtype) - 5
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(image: Tensor) -> Tensor:
        return _blur(image, window, 5 if padding == "zeros" else 0)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    ssim = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * structure
    return ssim.mean((2, 3)), structure.mean((2, 3))


def _laplacian(image: Tensor) -> Tensor:
    """The image minus what is left of it after one step down and up a Gaussian pyramid, borders repeated."""
    window = torch.full((5,), 0.25, device=image.device)  # filled there: a copy would wait for what the device does
    window[::4], window[2] = 0.05, 0.4

    def blur(x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, :1], x[:, :, :1], x, x[:, :, -1:], x[:, :, -1:]], dim=2)
        x = torch.cat([x[..., :1], x[..., :1], x, x[..., -1:], x[..., -1:]], dim=3)
        return _blur(x, window, 0)

    low = blur(image)
    kept = torch.zeros_like(low)
    kept[:, :, ::2, ::2] = 4 * low[:, :, ::2, ::2]
    return image - blur(kept)


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def _blur(image: Tensor, window: Tensor, padding: int) -> Tensor:
    """Each channel convolved with `window` along both sides, beyond which `padding` zeros lie. In fp32 under autocast
    too: a variance is a small difference of large numbers."""
    rows = window.expand(image.shape[1], 1, len(window))
    image = F.conv2d(image, rows[:, :, None, :], padding=(0, padding), groups=image.shape[1])
    return F.conv2d(image, rows[:, :, :, None], padding=(padding, 0), groups=image.shape[1])
