"""What decides the bytes of a packed dataset, beside its samples."""

from dataclasses import dataclass
from typing import Literal

from mcir.data.chain import AnyDegradation
from mcir.data.pairs import Pairs, Split
from mcir.errors import UserError


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the shards, beside the samples."""

    crop_size: int | None = None
    """Cut clean images into squares of this side (DIV2K: 480); None keeps the images and their original bytes."""
    crop_step: int | None = None
    """Distance of neighbouring squares (DIV2K: 240); None is crop_size. The last ones are flush with the border."""
    crop_format: Literal["png", "webp"] = "png"
    """Lossless encoding of images that cannot keep their bytes; WebP is a quarter smaller and slower to write."""
    seed: int | None = 0
    """Of the row shuffling; None keeps the order of the samples."""
    num_shards: int | None = None
    shard_bytes: int = 256 * 2**20
    """Size that decides the number of shards where num_shards does not."""
    split: Split = "train"
    degradation: AnyDegradation | None = None
    """Makes the degraded images of clean-only samples, once and for all, seeded by `seed` and the sample's key."""

    def check(self, pairs: Pairs) -> None:
        if self.degradation is not None and any(pair.degraded for pair in pairs.samples):
            raise UserError("the samples are pairs already: leave the degradation out")
        for column in self.degradation.columns if self.degradation else ():
            if column not in pairs.columns:
                raise UserError(f"the degradation needs a column {column}: give --column {column}=FOLDER")
        scale = self.scale(pairs)
        if self.crop_size is None and self.crop_step is not None:
            raise UserError("crop_step is given without crop_size")
        for name in ("crop_size", "crop_step"):
            value = getattr(self, name)
            if value is not None and (value <= 0 or value % scale):
                raise UserError(f"{name} must be a positive multiple of the scale {scale}, not {value}")
        if (self.num_shards is not None and self.num_shards < 1) or self.shard_bytes < 1:
            raise UserError("num_shards and shard_bytes must be at least 1")

    def columns(self, pairs: Pairs) -> list[str]:
        """Of images, in the order in which the shards have them."""
        paired = self.degradation is not None or pairs.samples[0].degraded is not None
        return ["clean", *(["degraded"] if paired else []), *pairs.columns]

    def scale(self, pairs: Pairs) -> int:
        return self.degradation.scale if self.degradation else pairs.scale
