"""Degraded images made on the fly from clean ones: bicubic, noise, JPEG, blur, haze, rain.

For quick starts and tests; published numbers use published pairs (bicubic apart, which equals the published files).
Each degradation is a frozen config entry and a function of (clean, rng): every random number comes from `rng`, so one
seed gives one picture. The result has the type of the input; uint8 results are rounded half up and clipped, float
images are in [0, 1]. Formulas are in the class docstrings: J is the clean image, I the degraded one.

A field that takes a number or a pair [low, high] is drawn uniformly from the pair for each image.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import AfterValidator, Field
from torch import Tensor

from mcir.data.decode import to_float
from mcir.data.resize import imresize, imresize_crop
from mcir.section import Section

T = TypeVar("T")


def _ordered(value: float | tuple[float, float]) -> float | tuple[float, float]:
    if isinstance(value, tuple) and value[0] > value[1]:
        raise ValueError(f"write the pair as [low, high], not [{value[0]}, {value[1]}]")
    return value


_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Degrees = Annotated[float, Field(ge=-180, le=180)]
_Quality = Annotated[int, Field(ge=1, le=100)]
Positive = Annotated[_Positive | tuple[_Positive, _Positive], AfterValidator(_ordered)]
Share = Annotated[_Share | tuple[_Share, _Share], AfterValidator(_ordered)]
Degrees = Annotated[_Degrees | tuple[_Degrees, _Degrees], AfterValidator(_ordered)]
Quality = Annotated[_Quality | tuple[_Quality, _Quality], AfterValidator(_ordered)]


class Degradation(Section, ABC):
    """`degradation(clean, rng)`: clean (3, H, W) uint8, or float in [0, 1], to degraded (3, H / scale, W / scale)."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Further image columns of the source that it is made from."""
        return ()

    @abstractmethod
    def __call__(self, clean: Tensor, rng: np.random.Generator) -> Tensor: ...

    def of(self, clean: Tensor, rng: np.random.Generator, images: Mapping[str, Tensor]) -> Tensor:
        """The same with the images of its columns, (3, H, W) as clean is."""
        return self(clean, rng)


class Bicubic(Degradation):
    """Smaller by `scale` with MATLAB's bicubic imresize; on uint8 the very values of the published test images."""

    name: Literal["bicubic"] = "bicubic"
    scale: Literal[2, 3, 4] = 4
    """Clean side / degraded side. Clean sides must be multiples of it."""

    def __call__(self, clean: Tensor, rng: np.random.Generator) -> Tensor:
        height, width = clean.shape[-2:]
        if height % self.scale or width % self.scale:
            raise ValueError(f"crop the clean image ({height} x {width}) to a multiple of {self.scale} first")
        return imresize(clean, Fraction(1, self.scale))


class LowResolution(Degradation):
    """Smaller by `factor` and enlarged again, both with MATLAB's bicubic imresize: super-resolution with a degraded
    image of the clean one's size, beside other tasks of a network that keeps the size."""

    name: Literal["low_resolution"] = "low_resolution"
    scale: ClassVar[int] = 1
    factor: Literal[2, 3, 4] = 4

    def __call__(self, clean: Tensor, rng: np.random.Generator) -> Tensor:
        height, width = clean.shape[-2:]
        return imresize_crop(imresize(clean, Fraction(1, self.factor)), self.factor, 0, 0, height, width)


class Noise(Degradation):
    """White Gaussian noise: I = J + sigma / 255 * n, n ~ N(0, 1) for each pixel and channel. Float is not clipped."""

    name: Literal["noise"] = "noise"
    scale: ClassVar[int] = 1
    sigma: Positive = 25.0
    """Standard deviation in 1/255."""

    def __call__(self, clean: Tensor, rng: np.random.Generator) -> Tensor:
        sigma = draw(rng, self.sigma) / 255
        noise = torch.from_numpy(rng.standard_normal(tuple(clean.shape), dtype=np.float32))
        return like(clean, to_float(clean) + sigma * noise)


class Jpeg(Degradation):
    """Compressed and decompressed (libjpeg, 4:2:0). Float images are rounded to 8 bits first."""

    name: Literal["jpeg"] = "jpeg"
    scale: ClassVar[int] = 1
    quality: Quality = (10, 40)
    """libjpeg quality, 1 to 100."""

    def __call__(self, clean: Tensor, rng: np.random.Generator) -> Tensor:
        return like(clean, compressed(to_float(clean), draw_whole(rng, self.quality)))


class GaussianBlur(Degradation):
    """I = J convolved with a sampled Gaussian cut at 4 sigma, its weights summing to 1; borders mirrored."""

    name: Literal["gaussian_blur"] = "gaussian_blur"
    scale: ClassVar[int] = 1
    sigma: Positive = (0.5, 3.0)
    """Standard deviation in pixels."""

    def __call__(self, clean: Tensor, rng: np.random.Generator) -> Tensor:
        sigma = draw(rng, self.sigma)
        x = torch.arange(-int(np.ceil(4 * sigma)), int(np.ceil(4 * sigma)) + 1)
        kernel = torch.exp(-0.5 * (x / sigma) ** 2)
        kernel = kernel[:, None] * kernel
        return like(clean, convolve(to_float(clean), kernel / kernel.sum()))


class MotionBlur(Degradation):
    """I = J convolved with a line of uniform weight (a camera moving straight while it exposes); borders mirrored."""

    name: Literal["motion_blur"] = "motion_blur"
    scale: ClassVar[int] = 1
    length: Positive = (5.0, 21.0)
    """Length of the line in pixels."""
    angle: Degrees = (-90.0, 90.0)
    """Degrees against the horizontal, counter-clockwise."""

    def __call__(self, clean: Tensor, rng: np.random.Generator) -> Tensor:
        length, angle = draw(rng, self.length), draw(rng, self.angle)
        return like(clean, convolve(to_float(clean), line_kernel(length, angle)))


class Haze(Degradation):
    """Atmospheric scattering: I = J t + A (1 - t), t = exp(-beta d), d in [0, 1], synthetic or from a column.

    The model and the ranges of beta and A are those of RESIDE's indoor training set (Li et al., "Benchmarking
    single-image dehazing and beyond", IEEE TIP 2019), which takes d from a depth camera; see `haze` and
    `synthetic_depth`.
    """

    name: Literal["haze"] = "haze"
    scale: ClassVar[int] = 1
    beta: Positive = (0.6, 1.8)
    """Scattering coefficient."""
    airlight: Share = (0.7, 1.0)
    """A, the colour of the haze, a grey."""
    depth: str | None = None
    """The column of the source that holds d: images of the clean one's size, of 8 or 16 bits, white the farthest
    (`mcir data pack --column depth=FOLDER`); they are cut and flipped with it."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.depth,) if self.depth else ()

    def __call__(self, clean: Tensor, rng: np.random.Generator, depth: Tensor | None = None) -> Tensor:
        assert (depth is None) == (self.depth is None)
        beta, airlight = draw(rng, self.beta), draw(rng, self.airlight)
        depth = synthetic_depth(clean.shape[-2], clean.shape[-1], rng) if depth is None else depth
        return haze(clean, depth, beta, airlight)

    def of(self, clean: Tensor, rng: np.random.Generator, images: Mapping[str, Tensor]) -> Tensor:
        return self(clean, rng, to_float(images[self.depth][0]) if self.depth else None)


class Rain(Degradation):
    """Streaks added to the scene: I = min(J + S, 1), S = strength * (drops convolved with a line of weight 1).

    `drops` is 0 but for a share of the pixels, where it is uniform in [0.5, 1]: a sum of straight white streaks of one
    direction, the additive model of the synthetic rain sets (Yang et al., "Deep joint rain detection and removal from
    a single image", CVPR 2017).
    """

    name: Literal["rain"] = "rain"
    scale: ClassVar[int] = 1
    density: Share = (0.002, 0.008)
    """Share of the pixels where a streak is centred."""
    length: Positive = (10.0, 30.0)
    """Length of a streak in pixels."""
    angle: Degrees = (60.0, 120.0)
    """Degrees against the horizontal, counter-clockwise (90: falling straight)."""
    strength: Share = (0.2, 0.5)
    """Brightness of the brightest single streak."""

    def __call__(self, clean: Tensor, rng: np.random.Generator) -> Tensor:
        density, length, angle = draw(rng, self.density), draw(rng, self.length), draw(rng, self.angle)
        kernel = line_kernel(length, angle)
        kernel /= kernel.max()
        # Drops also lie around the image, so that streaks enter it from outside.
        height, width = (side + size - 1 for side, size in zip(clean.shape[-2:], kernel.shape, strict=True))
        fallen = rng.random((height, width), dtype=np.float32) < density
        drops = np.where(fallen, rng.uniform(0.5, 1.0, (height, width)), 0.0).astype(np.float32)
        streaks = _convolve_inside(torch.from_numpy(drops)[None], kernel)
        return like(clean, (to_float(clean) + draw(rng, self.strength) * streaks).clamp(max=1))


Single = Bicubic | LowResolution | Noise | Jpeg | GaussianBlur | MotionBlur | Haze | Rain
"""All of them but a chain of several: `mcir.data.chain.AnyDegradation`."""


def haze(clean: Tensor, depth: Tensor, beta: float, airlight: float) -> Tensor:
    """J t + A (1 - t) with t = exp(-beta * depth): clean (3, H, W) uint8 or float in [0, 1], depth (H, W)."""
    transmission = torch.exp(-beta * depth)
    return like(clean, to_float(clean) * transmission + airlight * (1 - transmission))


def synthetic_depth(height: int, width: int, rng: np.random.Generator) -> Tensor:
    """A smooth depth (H, W) from 0 to 1: farther towards the top as outdoors, plus as much of a random smooth field."""
    field = torch.from_numpy(rng.random((1, 1, 4, 4), dtype=np.float32))
    field = F.interpolate(field, size=(height, width), mode="bicubic", align_corners=True)[0, 0]
    depth = torch.linspace(1, 0, height)[:, None] + field
    depth -= depth.min()
    return depth / depth.max().clamp(min=1e-6)


def line_kernel(length: float, angle: float) -> Tensor:
    """A straight line through the centre, (2r + 1, 2r + 1) with weights summing to 1.

    `length` in pixels, `angle` in degrees against the horizontal, counter-clockwise. Points a twentieth of a pixel
    apart, or less, are shared among their four nearest pixels, so that length and angle act continuously.
    """
    radius = int(np.ceil((max(length, 1) - 1) / 2))
    reach = (max(length, 1) - 1) / 2
    along = np.linspace(-reach, reach, 40 * radius + 1)
    x = radius + along * np.cos(np.deg2rad(angle))
    y = radius - along * np.sin(np.deg2rad(angle))
    centres = np.arange(2 * radius + 1)
    near_x = np.clip(1 - np.abs(x[:, None] - centres), 0, None)
    near_y = np.clip(1 - np.abs(y[:, None] - centres), 0, None)
    return torch.from_numpy(near_y.T @ near_x / len(along)).float()


def compressed(image: Tensor, quality: int) -> Tensor:
    """(3, H, W), float, through a JPEG of 8 bits and back to float in [0, 1]."""
    pixels = (image * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(stream, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1).contiguous().float() / 255


def draw(rng: np.random.Generator, value: float | tuple[float, float]) -> float:
    return float(rng.uniform(*value)) if isinstance(value, tuple) else float(value)


def draw_whole(rng: np.random.Generator, value: int | tuple[int, int]) -> int:
    return int(rng.integers(value[0], value[1] + 1)) if isinstance(value, tuple) else value


def draw_odd(rng: np.random.Generator, size: int | tuple[int, int]) -> int:
    return 2 * int(rng.integers(size[0] // 2, size[1] // 2 + 1)) + 1 if isinstance(size, tuple) else size


def choice(rng: np.random.Generator, chances: dict[T, float]) -> T:
    """One of the keys, its chance being its value over their sum."""
    bounds = np.cumsum(list(chances.values()))
    return list(chances)[int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))]


def like(clean: Tensor, degraded: Tensor) -> Tensor:
    if clean.dtype == torch.uint8:
        return (degraded * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)
    return degraded.to(clean.dtype)


def convolve(image: Tensor, kernel: Tensor) -> Tensor:
    """(C, H, W) with an odd kernel, same size, borders mirrored with the border pixel (torch pads no such way)."""
    for dim, size in ((-2, kernel.shape[0]), (-1, kernel.shape[1])):
        side = image.shape[dim]
        index = torch.arange(-(size // 2), side + size // 2) % (2 * side)
        image = image.index_select(dim, torch.where(index < side, index, 2 * side - 1 - index))
    return _convolve_inside(image, kernel)


def _convolve_inside(image: Tensor, kernel: Tensor) -> Tensor:
    """(C, H, W) to (C, H - h + 1, W - w + 1), where the kernel (h, w) lies inside. By FFT: 5 ms where sums take 50."""
    size = [-(-side // 32) * 32 for side in image.shape[-2:]]  # sizes with large prime factors are slow
    product = torch.fft.rfft2(image, s=size) * torch.fft.rfft2(kernel.to(image.dtype), s=size)
    bottom, right = image.shape[-2:]
    return torch.fft.irfft2(product, s=size)[:, kernel.shape[0] - 1 : bottom, kernel.shape[1] - 1 : right]
