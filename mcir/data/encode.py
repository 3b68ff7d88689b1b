"""An RGB tensor to the bytes of an image file, without loss: the other way round of decode.py."""

import io
from typing import Any

import torch
from imagecodecs import png_encode
from PIL import Image
from torch import Tensor

_WEBP_SIDE = 16383
_OPTIONS: dict[str, dict[str, Any]] = {"png": {}, "webp": {"lossless": True, "quality": 80, "exact": True}}


def encode(image: Tensor, kind: str) -> tuple[bytes, str]:
    """(3, H, W) as a file of this kind, png or webp, and the kind it became: 8 bits a channel of uint8, and of floats
    in [0, 1] 16 bits, which PNG alone holds, as it does sides above 16,383."""
    pixels = image.permute(1, 2, 0).contiguous()
    if image.dtype != torch.uint8:
        return bytes(png_encode((pixels.clamp(0, 1) * 65535).round().numpy().astype("uint16"))), "png"
    kind = "png" if max(pixels.shape) > _WEBP_SIDE else kind
    stream = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(stream, kind, **_OPTIONS[kind])
    return stream.getvalue(), kind


def centre(image: Tensor, height: int, width: int) -> Tensor:
    """The middle of an image, as torchvision's center_crop cuts it."""
    top, left = round((image.shape[-2] - height) / 2), round((image.shape[-1] - width) / 2)
    return image[..., top : top + height, left : left + width]
