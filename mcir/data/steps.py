"""The steps of a chain of degradations (`mcir.data.chain`): blurs, filters, resizing, noise, JPEG, and lists of them.

A step is a frozen config entry and a function `step(image, result, rng)`: image (3, h, w) float32 to the same of any
size; `result` is the (height, width) that the whole chain ends with. Every random number comes from `rng`. Only noise
and JPEG clip to [0, 1], where the published chains do.

A field that takes a number or a pair [low, high] is drawn uniformly from the pair for each image.
"""

from abc import ABC, abstractmethod
from typing import Annotated, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, PositiveInt, field_validator
from torch import Tensor

from mcir.data.degrade import (
    Degradation,
    GaussianBlur,
    Haze,
    Jpeg,
    LowResolution,
    MotionBlur,
    Noise,
    Positive,
    Quality,
    Rain,
    choice,
    compressed,
    convolve,
    draw,
    draw_odd,
    draw_whole,
)
from mcir.data.kernels import Profile, blur_kernel, sinc_kernel
from mcir.section import Section

Shape = Literal[
    "isotropic",
    "anisotropic",
    "generalised_isotropic",
    "generalised_anisotropic",
    "plateau_isotropic",
    "plateau_anisotropic",
]
Mode = Literal["area", "bilinear", "bicubic", "antialiased"]
"""torch's `interpolate`; `antialiased` is the bicubic that widens its kernel when it shrinks, as MATLAB's does."""
Kind = Literal["colour", "grey", "correlated"]
T = TypeVar("T")


def _odd(size: int | tuple[int, int]) -> int | tuple[int, int]:
    low, high = size if isinstance(size, tuple) else (size, size)
    if low > high or not low % 2 or not high % 2:
        raise ValueError(f"write an odd size, or a pair of odd sizes [low, high], not {size}")
    return size


def _some(chances: dict[T, float]) -> dict[T, float]:
    if not sum(chances.values()) > 0:
        raise ValueError("give at least one of them a chance above 0")
    return chances


OddSize = Annotated[PositiveInt | tuple[PositiveInt, PositiveInt], AfterValidator(_odd)]
Chance = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Step(Section, ABC):
    probability: Annotated[float, Field(ge=0, le=1)] = 1.0
    """How often the step is taken; else the image passes as it is."""

    @property
    def resizes(self) -> bool:
        return False

    @abstractmethod
    def __call__(self, image: Tensor, result: tuple[int, int], rng: np.random.Generator) -> Tensor: ...


class Blur(Step):
    """Convolution with a kernel of a random shape (`mcir.data.kernels`); borders mirrored."""

    name: Literal["blur"] = "blur"
    shapes: Annotated[dict[Shape, Chance], AfterValidator(_some)] = Field(default={"isotropic": 1.0})
    """The shapes to draw from, with their relative chances."""
    size: OddSize = (7, 21)
    """Side of the kernel: odd, or a pair of odd sides between which it is drawn."""
    sigma: Positive = (0.2, 3.0)
    """In pixels; anisotropic shapes draw one for each of their axes, which lie at any angle."""
    uniform_in: Literal["sigma", "variance"] = "sigma"
    """What is drawn uniformly."""
    beta_generalised: tuple[float, float] = (0.5, 4.0)
    beta_plateau: tuple[float, float] = (1.0, 2.0)
    """Exponents, [low, high]: half of the time uniform from low to 1, half of the time from 1 to high."""

    def __call__(self, image: Tensor, result: tuple[int, int], rng: np.random.Generator) -> Tensor:
        return convolve(image, self.kernel(rng))

    def kernel(self, rng: np.random.Generator) -> Tensor:
        shape, size = choice(rng, self.shapes), draw_odd(rng, self.size)
        first = second = self._sigma(rng)
        angle, beta = 0.0, 1.0
        if shape.endswith("anisotropic"):
            second, angle = self._sigma(rng), float(rng.uniform(-np.pi, np.pi))
        profile: Profile = "gaussian"
        if shape.startswith("generalised"):
            profile, beta = "generalised", _draw_beta(rng, self.beta_generalised)
        elif shape.startswith("plateau"):
            profile, beta = "plateau", _draw_beta(rng, self.beta_plateau)
        return blur_kernel(size, (first, second), angle, profile, beta)

    def _sigma(self, rng: np.random.Generator) -> float:
        if self.uniform_in == "variance" and isinstance(self.sigma, tuple):
            return float(rng.uniform(self.sigma[0] ** 2, self.sigma[1] ** 2)) ** 0.5
        return draw(rng, self.sigma)


class Sinc(Step):
    """Convolution with a circular low-pass filter cut off at its kernel's side: ringing and overshoot."""

    name: Literal["sinc"] = "sinc"
    size: OddSize = (7, 21)
    """Side of the kernel, as `blur` has it."""
    cutoff: Annotated[Positive, AfterValidator(lambda cutoff: _within(cutoff, 0.0, 1.0))] = (1 / 3, 1.0)
    """Highest frequency that passes, as a part of the highest that pixels hold (pi radians a pixel)."""

    def __call__(self, image: Tensor, result: tuple[int, int], rng: np.random.Generator) -> Tensor:
        return convolve(image, self.kernel(rng))

    def kernel(self, rng: np.random.Generator) -> Tensor:
        return sinc_kernel(draw_odd(rng, self.size), np.pi * draw(rng, self.cutoff))


class Resize(Step):
    """Larger, smaller or kept, by a mode drawn evenly from `modes`. Sides are rounded down, at least 1."""

    name: Literal["resize"] = "resize"
    chances: Annotated[dict[Literal["up", "down", "keep"], Chance], AfterValidator(_some)] = Field(
        default={"keep": 1.0}
    )
    """Relative chances of becoming larger, smaller, or neither."""
    up: Annotated[Positive, AfterValidator(lambda factor: _within(factor, 1.0, np.inf))] = (1.0, 1.5)
    down: Annotated[Positive, AfterValidator(lambda factor: _within(factor, 0.0, 1.0))] = (0.15, 1.0)
    """Factors of the sides."""
    uniform_in: Literal["factor", "divisor"] = "factor"
    """What is drawn uniformly: the factor, or 1 / factor."""
    of: Literal["image", "result"] = "image"
    """What is multiplied: the sides that the image has, or those that the chain ends with."""
    modes: tuple[Mode, ...] = Field(default=("area", "bilinear", "bicubic"), min_length=1)

    @property
    def resizes(self) -> bool:
        return True

    def __call__(self, image: Tensor, result: tuple[int, int], rng: np.random.Generator) -> Tensor:
        height, width = result if self.of == "result" else image.shape[-2:]
        factor = self.factor(rng)
        mode = self.modes[int(rng.integers(len(self.modes)))]
        return resized(image, (max(1, int(height * factor)), max(1, int(width * factor))), mode)

    def factor(self, rng: np.random.Generator) -> float:
        which = choice(rng, self.chances)
        if which == "keep":
            return 1.0
        factor = self.up if which == "up" else self.down
        if self.uniform_in == "divisor" and isinstance(factor, tuple):
            return 1 / draw(rng, (1 / factor[1], 1 / factor[0]))
        return draw(rng, factor)


class Sample(Step):
    """One value of each block of `factor` x `factor` pixels, of the image blurred by a Gaussian about the block's
    centre: the classical model of super-resolution."""

    name: Literal["sample"] = "sample"
    factor: PositiveInt = 4
    sigma: Positive = (0.1, 2.4)
    """In pixels."""

    @property
    def resizes(self) -> bool:
        return True

    def __call__(self, image: Tensor, result: tuple[int, int], rng: np.random.Generator) -> Tensor:
        sigma, shift = draw(rng, self.sigma), (self.factor - 1) / 2
        reach = int(np.ceil(4 * sigma + shift))
        exponent = -0.5 * ((np.arange(-reach, reach + 1) - shift) / sigma) ** 2
        weights = np.exp(exponent - exponent.max())
        kernel = torch.from_numpy(np.outer(weights, weights) / weights.sum() ** 2).float()
        return convolve(image, kernel.flip(0, 1))[:, :: self.factor, :: self.factor].contiguous()


class GaussianNoise(Step):
    """Normal noise of a standard deviation of sigma / 255, then clipped.

    `colour` is independent for each channel, `grey` the same for all three. `correlated` (BSRGAN) has a random
    covariance |L^2 U^T D U| between the channels: L the upper end of `sigma`, U orthonormal, D uniform in [0, 1].
    """

    name: Literal["noise"] = "noise"
    sigma: Positive = (1.0, 30.0)
    """In 1/255."""
    kinds: Annotated[dict[Kind, Chance], AfterValidator(_some)] = Field(default={"colour": 1.0})
    """Relative chances."""

    def __call__(self, image: Tensor, result: tuple[int, int], rng: np.random.Generator) -> Tensor:
        kind, sigma = choice(rng, self.kinds), draw(rng, self.sigma) / 255
        num = 1 if kind == "grey" else 3
        noise = torch.from_numpy(rng.standard_normal((num, *image.shape[-2:]), dtype=np.float32))
        if kind == "correlated":
            largest = self.sigma[1] if isinstance(self.sigma, tuple) else self.sigma
            basis = np.linalg.svd(rng.random((3, 3)))[0]
            covariance = np.abs(basis.T @ np.diag(rng.random(3)) @ basis) * (largest / 255) ** 2
            values, vectors = np.linalg.eigh(covariance)
            mixing = torch.from_numpy(vectors * np.abs(values) ** 0.5).float()
            return (image + torch.einsum("ij,jhw->ihw", mixing, noise)).clamp(0, 1)
        return (image + sigma * noise).clamp(0, 1)


class PoissonNoise(Step):
    """Noise of counted light, times `strength`, then clipped: with J in 8 bits and n its number of distinct values
    rounded up to a power of 2, I = J + strength * (Poisson(n J) / n - J) (Real-ESRGAN). Grey noise is that of the
    luma, the same for all channels."""

    name: Literal["poisson"] = "poisson"
    strength: Positive = (0.05, 3.0)
    kinds: Annotated[dict[Literal["colour", "grey"], Chance], AfterValidator(_some)] = Field(default={"colour": 1.0})
    """Relative chances."""

    def __call__(self, image: Tensor, result: tuple[int, int], rng: np.random.Generator) -> Tensor:
        kind, strength = choice(rng, self.kinds), draw(rng, self.strength)
        light = image
        if kind == "grey":
            light = (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
        levels = (light * 255).round().clamp(0, 255).to(torch.uint8)
        count = 2.0 ** np.ceil(np.log2(np.count_nonzero(np.bincount(levels.flatten().numpy()))))
        light = levels / 255
        counted = torch.from_numpy(rng.poisson(light.numpy() * count).astype(np.float32)) / count
        return (image + strength * (counted - light)).clamp(0, 1)


class Compression(Step):
    """Clipped, rounded to 8 bits, compressed and decompressed (libjpeg, 4:2:0)."""

    name: Literal["jpeg"] = "jpeg"
    quality: Quality = (30, 95)
    """libjpeg quality, 1 to 100."""

    def __call__(self, image: Tensor, result: tuple[int, int], rng: np.random.Generator) -> Tensor:
        return compressed(image, draw_whole(rng, self.quality))


class Apply(Step):
    """A degradation that is a section of its own and keeps the size, as a step."""

    name: Literal["apply"] = "apply"
    degradation: Annotated[
        LowResolution | Noise | Jpeg | GaussianBlur | MotionBlur | Haze | Rain, Field(discriminator="name")
    ]

    @field_validator("degradation")
    @classmethod
    def _of_the_image_alone(cls, degradation: Degradation) -> Degradation:
        if degradation.columns:
            raise ValueError(f"no column ({degradation.columns[0]}) goes through the steps of a chain: leave it out")
        return degradation

    def __call__(self, image: Tensor, result: tuple[int, int], rng: np.random.Generator) -> Tensor:
        return self.degradation(image, rng)


class Group(Step):
    """Steps that are taken, or left out, together."""

    name: Literal["group"] = "group"
    steps: tuple["AnyStep", ...] = Field(min_length=1)
    shuffle: bool = False
    """In a random order; those that resize keep theirs among themselves (BSRGAN)."""

    @property
    def resizes(self) -> bool:
        return any(step.resizes for step in self.steps)

    def __call__(self, image: Tensor, result: tuple[int, int], rng: np.random.Generator) -> Tensor:
        return take(self.steps, self.shuffle, image, result, rng)


class OneOf(Step):
    """One of the steps: the `probability` of each, over their sum, is its chance."""

    name: Literal["one_of"] = "one_of"
    steps: tuple["AnyStep", ...] = Field(min_length=1)

    @property
    def resizes(self) -> bool:
        return any(step.resizes for step in self.steps)

    def __call__(self, image: Tensor, result: tuple[int, int], rng: np.random.Generator) -> Tensor:
        which = choice(rng, {i: step.probability for i, step in enumerate(self.steps)})
        return self.steps[which](image, result, rng)


AnyStep = Annotated[
    Blur | Sinc | Resize | Sample | GaussianNoise | PoissonNoise | Compression | Apply | Group | OneOf,
    Field(discriminator="name"),
]
Group.model_rebuild()
OneOf.model_rebuild()


def take(
    steps: tuple[AnyStep, ...], shuffle: bool, image: Tensor, result: tuple[int, int], rng: np.random.Generator
) -> Tensor:
    """One step after the other, each with its probability."""
    for step in arranged(steps, rng) if shuffle else steps:
        if rng.random() < step.probability:
            image = step(image, result, rng)
    return image


def arranged(steps: tuple[AnyStep, ...], rng: np.random.Generator) -> list[AnyStep]:
    """In a random order, but for those that resize among themselves."""
    order = [int(i) for i in rng.permutation(len(steps))]
    places = [place for place, i in enumerate(order) if steps[i].resizes]
    for place, i in zip(places, sorted(order[place] for place in places), strict=True):
        order[place] = i
    return [steps[i] for i in order]


def resized(image: Tensor, size: tuple[int, int], mode: Mode) -> Tensor:
    """(3, h, w) to (3, *size); an image of that size already is left alone."""
    if tuple(image.shape[-2:]) == size:
        return image
    if mode == "antialiased":
        return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
    return F.interpolate(image[None], size, mode=mode)[0]


def _draw_beta(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(rng.uniform(bounds[0], 1.0) if rng.random() < 0.5 else rng.uniform(1.0, bounds[1]))


def _within(value: float | tuple[float, float], least: float, most: float) -> float | tuple[float, float]:
    low, high = value if isinstance(value, tuple) else (value, value)
    if low < least or high > most:
        raise ValueError(f"should lie between {least:g} and {most:g}, not at {value}")
    return value
