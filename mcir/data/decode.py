"""Bytes of an image file to an RGB tensor, or one sentence that says which row is bad and why.

Every image of every dataset passes through `decode`. Invariants: the header is read and the number of pixels checked
before anything is decoded; each format goes to the fastest decoder: PNG and WebP to imagecodecs (1.5 and 1.1 times as
fast as Pillow; torchvision is slower, and a broken PNG kills it), JPEG in its common forms to simplejpeg (1.2 times as
fast as Pillow), everything else to Pillow; a file that cannot be decoded whole is an error, never a half grey picture.
(JPEG has no checksum: flipped bits inside one may still pass.)

A crop needs no row below it, and decoders read from the top and stop at the height that the header names. So where
only the rows above `bottom` are wanted, PNG without interlacing, JPEG and lossy WebP are decoded from a copy whose
header names no more than these and the few below that theirs depend on: the same pixels, sooner (nearly the same in a
progressive JPEG that lacks scans). That the file goes on to its end, and a PNG's checksums, are looked at beforehand;
pixels below that cannot be decoded though their checksums are right are not noticed.

What becomes of what is not 8-bit RGB: grey and palette images are expanded to RGB; alpha is dropped and the colour
stored under it kept, as the readers of the published code do; CMYK is converted without a colour profile; the EXIF
orientation is applied; of an animation the first frame is taken; 16-bit images become float32.
"""

import io
import logging
import os
from dataclasses import dataclass
from struct import unpack_from
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from imagecodecs import png_decode, spng_decode, webp_decode, zlibng_crc32
from PIL import Image, ImageOps, UnidentifiedImageError
from simplejpeg import decode_jpeg
from torch import Tensor

from mcir.errors import UserError

_INHERITED = "_MCIR_MAX_PIXELS"
"""In the environment of this process's children, where `allow` was called."""
MAX_PIXELS = int(os.environ.get(_INHERITED, "89478485"))
"""Largest image that is decoded, in pixels; by default 256 MiB of RGB, Pillow's own warning limit. More is taken for an
attack, unless `allow` raises it."""
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")  # no format that runs code
_ORIENTATION = 0x0112
_ROWS_BELOW = {"PNG": 0, "JPEG": 2, "WEBP": 16}
"""that the last row wanted depends on: the chroma sample below it; with WebP's loop filter a whole macroblock."""
logging.getLogger("imagecodecs").setLevel(logging.ERROR)  # it warns of each odd colour profile


@dataclass(frozen=True)
class _Header:
    kind: str
    height: int
    width: int
    height_at: int | None
    """Where the file names its height, if naming less makes its decoder stop there."""


def decode(data: bytes | memoryview, where: str, bottom: int | None = None) -> Tensor:
    """An image file's bytes as RGB, (3, H, W): uint8, or float32 in [0, 1] when it stores 16 bits a channel.

    Of the rows from `bottom` on any number may be missing. The strides are the decoder's. `where` (file, row and
    column) opens the message of every error.

    Raises UserError: no bytes, not an image, truncated or corrupt, more than MAX_PIXELS, 32 bits a channel.
    """
    if header := _common(data):
        kind = header.kind
        if is_too_large(header.height, header.width):
            raise too_large(where)
    else:
        image = _open(data, where)
        kind = str(image.format)
    try:
        if header:
            return _rgb(_decode_common(data, header, header.height if bottom is None else bottom))
        return _decode(data, image)
    except Exception as error:  # decoders raise whatever they like on bad bytes: RuntimeError, OSError, SyntaxError...
        raise UserError(f"{where}: the {kind} image is truncated or corrupt: {_first_line(error)}") from error


def image_size(data: bytes | memoryview, where: str) -> tuple[int, int]:
    """(height, width) of what `decode` gives, from the header alone (TIFF apart). Raises UserError as `decode` does."""
    if header := _common(data):
        if is_too_large(header.height, header.width):
            raise too_large(where)
        return header.height, header.width
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
        raise too_large(where) from error
    except UnidentifiedImageError as error:
        if bytes(data[:4]) == b"\0\5\x16\7":
            raise UserError(
                f"{where}: no image, but what macOS keeps beside one (AppleDouble, ._*): remove it"
            ) from error
        raise UserError(f"{where}: not an image in a format that is read ({', '.join(_FORMATS)})") from error
    except Exception as error:
        raise UserError(f"{where}: the image's header is corrupt: {error}") from error
    if is_too_large(image.height, image.width):
        raise too_large(where)
    return image


def allow(max_pixels: int) -> None:
    """Images of up to so many pixels are decoded from now on, by this process and those that it will start."""
    global MAX_PIXELS
    MAX_PIXELS = Image.MAX_IMAGE_PIXELS = max_pixels
    os.environ[_INHERITED] = str(max_pixels)


def is_too_large(height: int, width: int) -> bool:
    return height * width > MAX_PIXELS


def too_large(where: str) -> UserError:
    return UserError(
        f"{where}: refused, more than {MAX_PIXELS:,} pixels (a decompression bomb?); --max-pixels raises the limit"
    )


def _orientation(image: Image.Image) -> int:
    # Pillow decodes a whole PNG to look for EXIF data behind the pixels; only what stands before them counts here.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return image.getexif().get(_ORIENTATION, 1)


def _common(data: bytes | memoryview) -> _Header | None:
    """The header where it is as in nearly all files: PNG of 8 bits without a palette, baseline or progressive JPEG in
    grey or colour, WebP without an extended header, none with EXIF data. Otherwise, and where anything looks odd, None:
    Pillow looks closer, which takes it a tenth of the time to decode 256 x 256 pixels."""
    header = None
    if data[:16] == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" and len(data) > 28:
        if data[24] == 8 and data[25] in (0, 2, 6) and data[26:28] == b"\0\0" and data[28] in (0, 1):
            start = 33  # of a chunk; EXIF data counts where it stands before the pixels
            while data[start + 4 : start + 8] not in (b"IDAT", b"eXIf", b""):
                start += 12 + int.from_bytes(data[start : start + 4])
            if data[start + 4 : start + 8] == b"IDAT":
                width, height = unpack_from(">II", data, 16)
                header = _Header("PNG", height, width, None if data[28] else 20)
    elif data[:3] == b"\xff\xd8\xff":
        start = 2  # of a segment; the one wanted (SOF0 to SOF2) holds the bits, the size and the number of channels
        while start + 10 <= len(data) and data[start] == 0xFF and 0xC0 <= data[start + 1] != 0xDA:
            if data[start + 1] <= 0xC2:
                if data[start + 4] == 8 and data[start + 9] in (1, 3):
                    height, width = unpack_from(">HH", data, start + 5)
                    header = _Header("JPEG", height, width, start + 5)
                break
            if data[start + 1] == 0xE1 and data[start + 4 : start + 8] == b"Exif":
                break
            start += 2 + int.from_bytes(data[start + 2 : start + 4])
    elif data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") == len(data) - 8 > 22:
        if data[8:16] == b"WEBPVP8L" and data[20] == 0x2F:
            bits = int.from_bytes(data[21:25], "little")
            header = _Header("WEBP", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, None)
        elif data[8:16] == b"WEBPVP8 " and data[23:26] == b"\x9d\x01\x2a":
            width, height = (side & 0x3FFF for side in unpack_from("<HH", data, 26))  # the other 2 bits: ignored by all
            header = _Header("WEBP", height, width, 28)
    return header if header and header.width and header.height else None


def _decode_common(data: bytes | memoryview, header: _Header, bottom: int) -> npt.NDArray[Any]:
    """The pixels, at least those above `bottom`."""
    rows = bottom + _ROWS_BELOW[header.kind]
    if header.height_at is None or rows >= header.height:
        return _DECODERS[header.kind](data)
    shortened = bytearray(data)
    if header.kind == "PNG":
        shortened[20:24] = rows.to_bytes(4)
        shortened[29:33] = zlibng_crc32(shortened[12:29]).to_bytes(4)
        try:
            _check_chunks(data)
            return spng_decode(shortened)  # libpng would inflate the rows that are left
        except Exception:  # as good or bad as libpng finds the whole
            return _decode_png(data)
    size = slice(header.height_at, header.height_at + 2)
    shortened[size] = rows.to_bytes(2, "little" if header.kind == "WEBP" else "big")
    return _DECODERS[header.kind](shortened)


def _check_chunks(png: bytes | memoryview) -> None:
    """ValueError where one was changed or the last is missing."""
    start = 8
    while png[start + 4 : start + 8] != b"IEND":
        end = start + 12 + int.from_bytes(png[start : start + 4])
        if end > len(png):
            raise ValueError("it ends early")
        if zlibng_crc32(png[start + 4 : end - 4]) != int.from_bytes(png[end - 4 : end]):  # type: ignore[arg-type]
            raise ValueError("a checksum is wrong")
        start = end


def _decode_png(data: bytes | memoryview | bytearray) -> npt.NDArray[Any]:
    return png_decode(data)  # type: ignore[arg-type]  # any buffer; palettes expanded; checks the CRCs of what counts


def _decode_jpeg(data: bytes | memoryview | bytearray) -> npt.NDArray[Any]:
    if data[-2:] != b"\xff\xd9" and b"\xff\xd9" not in bytes(data[_scans(data) :]):
        raise ValueError("it ends before its last marker")
    try:
        return decode_jpeg(data, "RGB", strict=False)  # strict: no warnings, such as of what follows the last row
    except ValueError:  # sampling factors that TurboJPEG does not know
        return np.array(Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB"))


def _scans(jpeg: bytes | memoryview | bytearray) -> int:
    """Where the first scan starts: behind the segments, whose thumbnails are JPEGs with an end of their own."""
    start = 2
    while start + 4 <= len(jpeg) and jpeg[start + 1] != 0xDA:
        filler = jpeg[start + 1] == 0xFF
        start += 1 if filler else 2 + int.from_bytes(jpeg[start + 2 : start + 4])
    return start


def _decode_webp(data: bytes | memoryview | bytearray) -> npt.NDArray[Any]:
    return webp_decode(data, hasalpha=False)  # type: ignore[arg-type]  # any buffer


_DECODERS = {"PNG": _decode_png, "JPEG": _decode_jpeg, "WEBP": _decode_webp}


def _decode(data: bytes | memoryview, image: Image.Image) -> Tensor:
    kind = "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG with a thumbnail behind it
    if (
        kind == "PNG"
        or (kind == "JPEG" and image.mode in ("RGB", "L"))
        or (kind == "WEBP" and not getattr(image, "is_animated", False))
    ):
        return _rgb(_DECODERS[kind](data), _orientation(image))
    if image.mode in ("I", "F"):
        raise ValueError("it stores 32 bits a channel; save it with 8 or 16")
    image = ImageOps.exif_transpose(image)
    return _rgb(np.array(image if image.mode.startswith("I;16") else image.convert("RGB")))


def _rgb(pixels: npt.NDArray[Any], orientation: int = 1) -> Tensor:
    """(H, W) or (H, W, C) as stored, uint8 or uint16, to (3, H, W) as shown, uint8 or float32."""
    height, width = pixels.shape[:2]
    pixels = pixels.reshape(height, width, -1)
    pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, 2)  # the last of 2 or 4 is alpha
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    turned = pixels[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]
    if turned.dtype.itemsize == 2:
        turned = turned.astype(np.float32) / 65535
    return torch.from_numpy(turned if orientation == 1 else turned.copy()).permute(2, 0, 1)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def to_float(image: Tensor) -> Tensor:
    """uint8 -> fp32 in [0, 1], the same bits on every device: CUDA divides by a tensor, and multiplies with the rounded
    inverse of a plain number. Floats pass."""
    return image / image.new_full((), 255) if image.dtype == torch.uint8 else image
