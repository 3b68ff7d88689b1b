"""SwinIR (Liang et al., ICCVW 2021) as spandrel has it: the official keys and output.

spandrel's class comes from JingyunLiang/SwinIR (Apache-2.0). Defaults are the published networks of the tables:
`light` (002_lightweightSR) and `classical`, the 11.9 M parameters of 001_classicalSR. The network pads inside to whole
windows; the official test script pads before that, always, by mirroring: see the descriptor.
"""

from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import nn

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
        from mcir.archs.swinir_network import SwinIR

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
