"""Several degradations one after the other, as blind super-resolution trains, and the published chains."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, PositiveInt
from torch import Tensor

from mcir.data.decode import to_float
from mcir.data.degrade import Degradation, Single, like
from mcir.data.steps import (
    AnyStep,
    Blur,
    Compression,
    GaussianNoise,
    Group,
    Kind,
    Mode,
    OneOf,
    PoissonNoise,
    Resize,
    Sample,
    Shape,
    Sinc,
    resized,
    take,
)

Preset = Literal["real_esrgan", "bsrgan"]


class Chain(Degradation):
    """Steps (`mcir.data.steps`), each with its probability, in their order or a random one.

    The result is 1 / `scale` of the clean image exactly: where the steps leave it at another size, a bicubic resize
    follows the last of them. It is clipped at the end, and where a step says so.
    """

    name: Literal["chain"] = "chain"
    scale: Literal[1, 2, 3, 4] = 4
    """Clean side / degraded side. Clean sides must be multiples of it."""
    steps: Preset | Annotated[tuple[AnyStep, ...], Field(min_length=1)]
    """A list of steps, or the name of a published chain: real_esrgan, bsrgan."""
    shuffle: bool = False
    """The steps in a random order for each image; those that resize keep theirs among themselves."""
    window: PositiveInt | None = None
    """Side of the clean window, anywhere around the training crop and inside the image, that is degraded, and of which
    the crop is cut: away from borders, and on any place of JPEG's grid. By default what the published chain has
    (Real-ESRGAN 400), else the crop itself."""

    def __call__(self, clean: Tensor, rng: np.random.Generator) -> Tensor:
        height, width = clean.shape[-2:]
        if height % self.scale or width % self.scale:
            raise ValueError(f"crop the clean image ({height} x {width}) to a multiple of {self.scale} first")
        size = (height // self.scale, width // self.scale)
        steps = published(self.steps, self.scale) if isinstance(self.steps, str) else self.steps
        image = take(steps, self.shuffle, to_float(clean).float(), size, rng)
        return like(clean, resized(image, size, "bicubic").clamp(0, 1))

    @property
    def window_size(self) -> int:
        """Of `window`, 0 for the crop itself."""
        return self.window or (400 if self.steps == "real_esrgan" else 0)


AnyDegradation = Annotated[Single | Chain, Field(discriminator="name")]


def published(preset: Preset, scale: int) -> tuple[AnyStep, ...]:
    return _real_esrgan() if preset == "real_esrgan" else _bsrgan(scale)


_SHAPES: dict[Shape, float] = {
    "isotropic": 0.45,
    "anisotropic": 0.25,
    "generalised_isotropic": 0.12,
    "generalised_anisotropic": 0.03,
    "plateau_isotropic": 0.12,
    "plateau_anisotropic": 0.03,
}
_EVEN: tuple[Mode, ...] = ("bilinear", "bicubic", "area")


def _real_esrgan() -> tuple[AnyStep, ...]:
    """xinntao/Real-ESRGAN, options/train_realesrgan_x4plus.yml with realesrgan/data and realesrgan/models.

    What differs: JPEG is libjpeg's and its quality whole, sizes are exact ratios of the grids, borders of blurs are
    mirrored with the border pixel. The clean image is as it comes: sharpening it is another matter.
    """

    def blur(sigma: tuple[float, float], probability: float) -> OneOf:
        # a sinc filter in 1 of 10 cases, with a lower cutoff for the 5 of 8 sizes from 13 on
        small = Sinc(probability=0.1 * 3 / 8, size=(7, 11), cutoff=(1 / 3, 1.0))
        large = Sinc(probability=0.1 * 5 / 8, size=(13, 21), cutoff=(1 / 5, 1.0))
        return OneOf(probability=probability, steps=(small, large, Blur(probability=0.9, shapes=_SHAPES, sigma=sigma)))

    def noise(sigma: float, strength: float) -> OneOf:
        gaussian = GaussianNoise(probability=0.5, sigma=(1.0, sigma), kinds={"colour": 0.6, "grey": 0.4})
        poisson = PoissonNoise(probability=0.5, strength=(0.05, strength), kinds={"colour": 0.6, "grey": 0.4})
        return OneOf(steps=(gaussian, poisson))

    jpeg = Compression(quality=(30, 95))
    finish = Group(steps=(Resize(of="result"), Sinc(probability=0.8, size=(7, 21), cutoff=(1 / 3, 1.0))))
    return (
        blur((0.2, 3.0), 1.0),
        Resize(chances={"up": 0.2, "down": 0.7, "keep": 0.1}, up=(1.0, 1.5), down=(0.15, 1.0)),
        noise(30.0, 3.0),
        jpeg,
        blur((0.2, 1.5), 0.8),
        Resize(chances={"up": 0.3, "down": 0.4, "keep": 0.3}, up=(1.0, 1.2), down=(0.3, 1.0), of="result"),
        noise(25.0, 2.5),
        Group(steps=(finish, jpeg), shuffle=True),
    )


def _bsrgan(scale: int) -> tuple[AnyStep, ...]:
    """cszn/KAIR, utils/utils_blindsr.py, degradation_bsrgan. At scale 4 a quarter of the images is halved first, and
    then degraded with the numbers of scale 2.

    What differs: no noise of a camera's processing, whose model the code leaves out too unless it is given one; levels
    of noise are not whole; sigma starts at 0.01 instead of 0; torch's resizing instead of OpenCV's.
    """

    def rest(factor: int) -> tuple[AnyStep, ...]:
        wide, narrow = (4.0 + factor) ** 0.5, 2.0 + 0.2 * factor  # the former is published as a variance
        turned = Blur(shapes={"anisotropic": 1.0}, size=(7, 25), sigma=(0.01, wide), uniform_in="variance")
        round_ = Blur(shapes={"isotropic": 1.0}, size=(7, 25), sigma=(0.01, narrow))
        blur = OneOf(steps=(turned, round_))
        smaller = Resize(
            probability=0.75, chances={"down": 1.0}, down=(0.5 / factor, 1.0), uniform_in="divisor", modes=_EVEN
        )
        sample = Sample(probability=0.25, factor=factor, sigma=(0.1, 0.6 * factor))
        kinds: dict[Kind, float] = {"colour": 0.4, "grey": 0.4, "correlated": 0.2}
        shuffled = Group(
            shuffle=True,
            steps=(
                blur,
                blur,
                OneOf(steps=(smaller, sample)),
                Resize(of="result", modes=_EVEN),
                GaussianNoise(sigma=(2.0, 25.0), kinds=kinds),
                Compression(probability=0.9, quality=(30, 95)),
            ),
        )
        return shuffled, Compression(quality=(30, 95))

    if scale != 4:
        return rest(scale)
    halves = [
        Resize(probability=0.5, chances={"down": 1.0}, down=0.5, modes=modes) for modes in (_EVEN, ("antialiased",))
    ]
    halved = Group(probability=0.25, steps=(OneOf(steps=tuple(halves)), *rest(2)))
    return (OneOf(steps=(halved, Group(probability=0.75, steps=rest(4)))),)
