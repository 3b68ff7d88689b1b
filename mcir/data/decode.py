"""Bytes of an image file to an RGB tensor, or one sentence that says which row is bad and why.

Every image of every dataset passes through `decode`. Invariants: the header is read and the number of pixels checked
before anything is decoded; each format goes to the fastest decoder that refuses what is broken: PNG and WebP to
imagecodecs (1.5 and 1.1 times as fast as Pillow; torchvision is slower, and a broken PNG kills it), JPEG in its common
forms to torchvision (1.2 times as fast as Pillow; imagecodecs' takes truncated files), everything else to Pillow; a
file that cannot be decoded whole is an error, never a half grey picture. (JPEG has no checksum: flipped bits inside one
may still pass.)

What becomes of what is not 8-bit RGB: grey and palette images are expanded to RGB; alpha is dropped and the colour
stored under it kept, as the readers of the published code do; CMYK is converted without a colour profile; the EXIF
orientation is applied; of an animation the first frame is taken; 16-bit images become float32.
"""

import io
import logging
import re
import warnings
from struct import unpack_from

import numpy as np
import torch
from imagecodecs import png_decode, webp_decode
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from mcir.errors import UserError

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels: 256 MiB of RGB, Pillow's own warning limit. More is taken for an attack."""

_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")  # no format that runs code
_ORIENTATION = 0x0112
logging.getLogger("imagecodecs").setLevel(logging.ERROR)  # it warns of each odd colour profile


def decode(data: bytes | memoryview, where: str) -> Tensor:
    """An image file's bytes as RGB, (3, H, W): uint8, or float32 in [0, 1] when it stores 16 bits a channel.

    The strides are the decoder's. `where` (file, row and column) opens the message of every error.

    Raises UserError: no bytes, not an image, truncated or corrupt, more than MAX_PIXELS, 32 bits a channel.
    """
    kind, width, height = _common(data)
    image = None if kind else _open(data, where)
    if width * height > MAX_PIXELS:
        raise _too_large(where)
    try:
        return _decode_common(data, kind) if image is None else _decode(data, image)
    except Exception as error:  # decoders raise whatever they like on bad bytes: RuntimeError, OSError, SyntaxError...
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).partition("\n")[0]) or type(error).__name__
        kind = kind if image is None else str(image.format)
        raise UserError(f"{where}: the {kind} image is truncated or corrupt: {reason}") from error


def image_size(data: bytes | memoryview, where: str) -> tuple[int, int]:
    """(height, width) of what `decode` gives, from the header alone (TIFF apart). Raises UserError as `decode` does."""
    image = _open(data, where)
    try:
        if image.format == "TIFF":
            image.load()  # Pillow turns TIFFs itself, some versions only now
        turned = _orientation(image) >= 5
    except Exception as error:
        raise UserError(f"{where}: the {image.format} image is truncated or corrupt: {error}") from error
    return (image.width, image.height) if turned else (image.height, image.width)


def _open(data: bytes | memoryview, where: str) -> Image.Image:
    if not data:
        raise UserError(f"{where}: the image is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(where) from error
    except UnidentifiedImageError as error:
        raise UserError(f"{where}: not an image in a format that is read ({', '.join(_FORMATS)})") from error
    except Exception as error:
        raise UserError(f"{where}: the image's header is corrupt: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(where)
    return image


def _too_large(where: str) -> UserError:
    return UserError(f"{where}: refused, more than {MAX_PIXELS:,} pixels (a decompression bomb?)")


def _orientation(image: Image.Image) -> int:
    # Pillow decodes a whole PNG to look for EXIF data behind the pixels; only what stands before them counts here.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return image.getexif().get(_ORIENTATION, 1)


def _common(data: bytes | memoryview) -> tuple[str, int, int]:
    """(format, width, height) where the header is as in nearly all files: PNG of 8 bits without a palette or EXIF data,
    baseline or progressive JPEG in grey or colour, WebP without an extended header. Otherwise, and where anything looks
    odd, ("", 0, 0): Pillow looks closer, which takes it a tenth of the time to decode 256 x 256 pixels."""
    width = height = 0
    kind = ""
    if data[:16] == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" and len(data) > 28:
        if data[24] == 8 and data[25] in (0, 2, 6) and data[26:28] == b"\0\0" and data[28] in (0, 1):
            start = 33  # of a chunk; EXIF data counts where it stands before the pixels
            while data[start + 4 : start + 8] not in (b"IDAT", b"eXIf", b""):
                start += 12 + int.from_bytes(data[start : start + 4])
            if data[start + 4 : start + 8] == b"IDAT":
                kind, (width, height) = "PNG", unpack_from(">II", data, 16)
    elif data[:3] == b"\xff\xd8\xff":
        start = 2  # of a segment; the one wanted (SOF0 to SOF2) holds the bits, the size and the number of channels
        while start + 10 <= len(data) and data[start] == 0xFF and 0xC0 <= data[start + 1] != 0xDA:
            if data[start + 1] <= 0xC2:
                if data[start + 4] == 8 and data[start + 9] in (1, 3):
                    kind, (height, width) = "JPEG", unpack_from(">HH", data, start + 5)
                break
            start += 2 + int.from_bytes(data[start + 2 : start + 4])
    elif data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") == len(data) - 8 > 22:
        if data[8:16] == b"WEBPVP8L" and data[20] == 0x2F:
            bits = int.from_bytes(data[21:25], "little")
            kind, width, height = "WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        elif data[8:16] == b"WEBPVP8 " and data[23:26] == b"\x9d\x01\x2a":
            kind, (width, height) = "WEBP", (side & 0x3FFF for side in unpack_from("<HH", data, 26))
    return (kind, width, height) if width and height else ("", 0, 0)


def _decode_common(data: bytes | memoryview, kind: str) -> Tensor:
    if kind == "PNG":
        return _decode_png(data)
    if kind == "JPEG":
        return decode_jpeg(_tensor(data), ImageReadMode.RGB, apply_exif_orientation=True)
    return torch.from_numpy(webp_decode(data, hasalpha=False)).permute(2, 0, 1)  # type: ignore[arg-type]  # any buffer


def _decode_png(data: bytes | memoryview, orientation: int = 1) -> Tensor:
    # (H, W) or (H, W, C), palettes expanded; checks all CRCs (spng_decode not the last)
    pixels = png_decode(data)  # type: ignore[arg-type]
    height, width = pixels.shape[:2]
    pixels = pixels.reshape(height, width, -1)
    pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, 2)  # the last of 2 or 4 is alpha
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    turned = pixels[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]
    if turned.dtype == np.uint16:
        turned = turned.astype(np.float32) / 65535
    return torch.from_numpy(turned if orientation == 1 else np.ascontiguousarray(turned)).permute(2, 0, 1)


def _decode(data: bytes | memoryview, image: Image.Image) -> Tensor:
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        return _decode_common(data, "JPEG")
    if image.format == "WEBP" and not getattr(image, "is_animated", False) and _orientation(image) == 1:
        return _decode_common(data, "WEBP")
    if image.format == "PNG":
        return _decode_png(data, _orientation(image))
    if image.mode in ("I", "F"):
        raise ValueError("it stores 32 bits a channel; save it with 8 or 16")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        grey = torch.from_numpy(np.array(image, dtype=np.float32) / 65535)
        return grey.expand(3, -1, -1).contiguous()
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


with warnings.catch_warnings():  # torch warns of read-only memory, once in a process; nothing writes to these bytes
    warnings.simplefilter("ignore")
    torch.frombuffer(b"0", dtype=torch.uint8)


def _tensor(data: bytes | memoryview) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)
