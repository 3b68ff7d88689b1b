"""SwinIR (Liang et al., ICCVW 2021) as spandrel has it: the official keys and output.

spandrel's class comes from JingyunLiang/SwinIR (Apache-2.0). Defaults are the published networks of the tables:
`light` (002_lightweightSR) and `classical`, the 11.9 M parameters of 001_classicalSR. The network pads inside to whole
windows; the official test script pads before that, always, by mirroring: see the descriptor.
"""

from functools import lru_cache, partial
from typing import Any, Literal, Self

import numpy as np
import torch
from einops import rearrange
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from spandrel.architectures.SwinIR import SwinIR as SpandrelSwinIR
from torch import Tensor, nn

from mcir.archs.base import Arch, Descriptor

VARIANTS: dict[str, dict[str, Any]] = {
    "light": {
        "image_size": 64,
        "embed_dim": 60,
        "depths": (6, 6, 6, 6),
        "num_heads": (6, 6, 6, 6),
        "upsampler": "pixelshuffledirect",
    },
    "classical": {
        "image_size": 48,  # trained on DIV2K; 64 on DIV2K + Flickr2K
        "embed_dim": 180,
        "depths": (6, 6, 6, 6, 6, 6),
        "num_heads": (6, 6, 6, 6, 6, 6),
        "upsampler": "pixelshuffle",
    },
}


@lru_cache(maxsize=8)
def _shift_mask(window: int, shift: int, size: tuple[int, int]) -> np.ndarray:
    """`shift_mask` as numpy: a tensor kept from one call to the next would not survive tracing."""
    if shift == 0:
        return np.zeros((1, window**2, window**2), np.float32)
    row, col = (np.arange(side) >= side - shift for side in size)  # rolled in
    origin = 2 * row[:, None] + col[None]  # (H, W), the same all over a window but the last of a row or column
    origin = rearrange(origin, "(rows y) (cols x) -> (rows cols) (y x)", y=window, x=window)
    return np.where(origin[:, None] != origin[:, :, None], np.float32(-100), np.float32(0))


def shift_mask(window: int, shift: int, size: tuple[int, int]) -> Tensor:
    """What to add to the attention scores so that pixels rolled in from the far side do not attend to the others.

    0 or -100, (windows, N, N) with N = window^2; (1, N, N) without a shift. In bf16, which holds both values exactly
    and takes on the precision of the scores it is added to.
    """
    return torch.from_numpy(_shift_mask(window, shift, size)).bfloat16()


class SwinIR(SpandrelSwinIR):
    """(B, 3, H, W) in [0, 1] -> (B, 3, scale * H, scale * W), not clamped. Any size.

    Mended against the base: its forward leaves the image mean in the precision of the last input, and sizes other than
    `img_size` get fp32 masks, computed anew in each block, which a network cast to bf16 as a whole cannot add.
    """

    rgb_mean: Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("rgb_mean", self.mean, persistent=False)
        for block in self.modules():
            if isinstance(shift := getattr(block, "shift_size", None), int):
                block.calculate_mask = partial(shift_mask, block.window_size, shift)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.rgb_mean
        return super().forward(x)


class Swinir(Arch):
    """SwinIR for super-resolution; everything that is not given is the variant's published value."""

    name: Literal["swinir"] = "swinir"
    variant: Literal["light", "classical"]
    scale: Literal[2, 3, 4, 8]
    image_size: PositiveInt | None = None
    """Side of the training patch (degraded): shapes the stored attention masks, not the sizes it takes."""
    embed_dim: PositiveInt | None = None
    depths: tuple[PositiveInt, ...] | None = None
    num_heads: tuple[PositiveInt, ...] | None = None
    upsampler: Literal["pixelshuffle", "pixelshuffledirect", "nearest+conv"] | None = None
    window_size: PositiveInt = 8
    mlp_ratio: PositiveFloat = 2.0
    qkv_bias: bool = True
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Highest rate of stochastic depth, reached linearly over all blocks."""
    img_range: PositiveFloat = 1.0
    residual: Literal["1conv", "3conv"] = "1conv"
    """The convolutions at the end of each group."""

    @property
    def published(self) -> dict[str, Any]:
        """The variant's values, those that are given replaced."""
        given = self.model_dump(include=set(VARIANTS[self.variant]), exclude_none=True)
        return VARIANTS[self.variant] | given

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        values = self.published
        if len(values["depths"]) != len(values["num_heads"]):
            raise ValueError(f"depths has {len(values['depths'])} entries and num_heads {len(values['num_heads'])}")
        if wrong := [heads for heads in values["num_heads"] if values["embed_dim"] % heads]:
            raise ValueError(f"embed_dim {values['embed_dim']} does not divide into {wrong[0]} heads")
        return self

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(
            scale=self.scale, size_multiple=self.window_size, pad_mode="flip", blocks=("SwinTransformerBlock",)
        )

    def build(self) -> nn.Module:
        published = self.published
        return SwinIR(
            upscale=self.scale,
            in_chans=3,
            img_size=published["image_size"],
            window_size=self.window_size,
            img_range=self.img_range,
            depths=list(published["depths"]),
            embed_dim=published["embed_dim"],
            num_heads=list(published["num_heads"]),
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            drop_path_rate=self.drop_path,
            upsampler=published["upsampler"],
            resi_connection=self.residual,
        )
