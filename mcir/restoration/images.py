"""Reads a picture for restoration and writes the restored one as the same kind of file.

The network sees upright RGB in [0, 1]; everything else about the file comes back in the output: format, 8 or 16 bits,
grey, alpha, ICC profile, EXIF with its orientation (the pixels lie as they lay in the input). Invariants: the size is
checked before anything is decoded; nothing is cut to 8 bits; a file appears whole or not at all; what cannot be kept is
refused.

What changes: JPEG is written at quality 95 without chroma subsampling, WebP and TIFF without loss; palettes become RGB;
CMYK becomes RGB and loses its profile, of the wrong kind then; a TIFF keeps only profile and orientation of its tags.

Pillow holds at most 8 bits of a colour channel, but unpacks either byte of 16: RGB is read twice, high and low bytes.
"""

import io
import secrets
import struct
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from mcir.data.decode import is_too_large, too_large
from mcir.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")

ORIENTATION = 0x0112  # EXIF and TIFF tag: 1 upright, 2 to 8 turned or mirrored
OTHER_BYTE = {"16L": "16B", "16B": "16L", "16N": "16B" if sys.byteorder == "little" else "16L"}


@dataclass(frozen=True)
class Picture:
    """A decoded file: upright pixels, and what it takes to write the like."""

    pixels: np.ndarray
    """(H, W, C), uint8 or uint16; C: grey, grey + alpha, RGB or RGB + alpha."""
    format: str
    """Pillow's name: PNG, JPEG, WEBP or TIFF."""
    orientation: int = 1
    exif: bytes | None = None
    icc_profile: bytes | None = None
    dpi: tuple[float, float] | None = None
    """Pixels of an inch, across and down, as the file says."""


def open_header(path: Path) -> ImageFile.ImageFile:
    """The file with its header read and its size checked. Raises UserError; the caller closes it."""
    try:
        image = Image.open(path, formats=("PNG", "JPEG", "WEBP", "TIFF"))
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: no PNG, JPEG, WebP or TIFF image, of a kind not supported, or damaged") from error
    except Image.DecompressionBombError as error:
        raise too_large(str(path)) from error
    except Exception as error:  # decoders raise whatever they like on bad bytes
        raise UserError(f"{path}: cannot be opened: {error}") from error
    problem = None
    if is_too_large(image.height, image.width):
        problem = too_large(str(path))
    elif getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a JPEG with a thumbnail behind it
        problem = UserError(f"{path}: has several frames or pages; split it first")
    if problem:
        image.close()
        raise problem
    return image


def read(path: Path) -> Picture:
    """Decodes a PNG, JPEG, WebP or TIFF. Raises UserError: unreadable, truncated, too large, a kind not supported."""
    with open_header(path) as image:
        try:
            profile = None if image.mode == "CMYK" else image.info.get("icc_profile")
            if image.format == "TIFF":  # Pillow turns these upright and forgets the tag
                orientation = image.getexif().get(ORIENTATION, 1)
                pixels = decode(path, image)
            else:  # of a PNG the EXIF data may stand behind the pixels
                stored = decode(path, image)
                orientation = image.getexif().get(ORIENTATION, 1)
                pixels = turn(stored, orientation)
            kind = "JPEG" if image.format == "MPO" else str(image.format)
            dpi = image.info.get("dpi")
            dpi = (float(dpi[0]), float(dpi[1])) if dpi and min(dpi) > 0 else None
            return Picture(np.ascontiguousarray(pixels), kind, orientation, image.info.get("exif"), profile, dpi)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path}: the image is truncated or corrupt: {error}") from error


def decode(path: Path, image: ImageFile.ImageFile) -> np.ndarray:
    """The pixels as they lie in the file, (H, W, C)."""
    key = image.info.get("transparency")  # a colour that means transparent
    if any(";16" in str(tile.args) for tile in image.tile):
        pixels = decode_16_bit(path, image)
        if key is not None:
            visible = (pixels != np.array(key, dtype=np.uint16)).any(2, keepdims=True)
            pixels = np.concatenate([pixels, visible * np.uint16(65535)], axis=2)
        return pixels
    bits = image.tag_v2.get(258, (8,)) if image.format == "TIFF" else (8,)  # type: ignore[attr-defined]
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr") or max(bits) > 8:
        raise UserError(f"{path}: pixels of this kind ({image.mode}, {max(bits)} bits) are not supported")
    grey = image.mode in ("1", "L", "LA")
    mode = ("LA" if grey else "RGBA") if image.has_transparency_data else ("L" if grey else "RGB")
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def decode_16_bit(path: Path, image: ImageFile.ImageFile) -> np.ndarray:
    """(H, W, C) uint16 of a PNG or TIFF with 16 bits a channel."""
    packing = {args if isinstance(args, str) else str(args and args[0]) for args in (tile.args for tile in image.tile)}
    name, _, order = packing.pop().partition(";")
    separate = image.format == "TIFF" and image.tag_v2.get(284) == 2  # type: ignore[attr-defined]
    if packing or separate or not (image.mode.startswith("I;16") or name in ("LA", "RGB", "RGBA", "RGBX")):
        raise UserError(f"{path}: 16-bit pixels packed as {name}{' planes' * separate} are not supported; save as RGB")
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)[..., None]
    if name == "LA":  # four bytes a pixel, read as they are
        repack(image, "LA;16B", "RGBA")
        raw = np.asarray(image).astype(np.uint16)
        return raw[..., 0::2] << 8 | raw[..., 1::2]
    with open_header(path) as other:
        repack(other, f"{name};{order}", f"{name};{OTHER_BYTE[order]}")
        low = np.asarray(other)
    return np.asarray(image).astype(np.uint16) << 8 | low


def repack(image: ImageFile.ImageFile, old: str, new: str) -> None:
    """Has the pixels unpacked as `new` where the file says `old`."""
    for i, tile in enumerate(image.tile):
        args = new if isinstance(tile.args, str) else tuple(new if arg == old else arg for arg in tile.args or ())
        image.tile[i] = tile._replace(args=args)


def turn(pixels: np.ndarray, orientation: int, back: bool = False) -> np.ndarray:
    """From as stored to upright, by the EXIF orientation, or back. An unknown orientation turns nothing."""
    transposed = orientation in (5, 6, 7, 8)
    if transposed and not back:
        pixels = pixels.swapaxes(0, 1)
    upside_down, mirrored = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    pixels = pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
    return pixels.swapaxes(0, 1) if transposed and back else pixels


def to_rgb(picture: Picture) -> Tensor:
    """What the network sees: (3, H, W) in [0, 1], float32; grey three times, alpha left out."""
    pixels = torch.from_numpy(picture.pixels.astype(np.float32) / np.iinfo(picture.pixels.dtype).max)
    colours = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].expand(-1, -1, 3)
    return colours.permute(2, 0, 1).contiguous()


def with_rgb(picture: Picture, restored: Tensor) -> Picture:
    """The picture with these colours, (3, s * H, s * W), clamped and rounded: grey is their mean, alpha is resized."""
    grey, alpha = picture.pixels.shape[2] < 3, picture.pixels.shape[2] in (2, 4)
    channels = [restored.mean(0, keepdim=True) if grey else restored]
    peak, dtype = np.iinfo(picture.pixels.dtype).max, picture.pixels.dtype
    if alpha:
        opacity = torch.from_numpy(picture.pixels[..., -1].astype(np.float32) / peak)[None, None]
        if opacity.shape[2:] != restored.shape[1:]:
            opacity = F.interpolate(opacity, restored.shape[1:], mode="bicubic")
        channels.append(opacity[0].to(restored))
    pixels = torch.cat(channels).float().clamp_(0, 1).mul_(peak).round_().permute(1, 2, 0)
    new = replace(picture, pixels=pixels.cpu().numpy().astype(dtype))
    if new.exif and new.pixels.shape[:2] != picture.pixels.shape[:2]:
        new = replace(new, exif=resized_exif(new.exif, *turn(new.pixels, new.orientation, back=True).shape[:2]))
    return new


def resized_exif(exif: bytes, height: int, width: int) -> bytes:
    """EXIF data whose sizes are those of the picture as stored; a thumbnail, which shows the old one, is left out."""
    data = Image.Exif()
    data.load(exif)
    for tags, sizes in (
        (data, {0x0100: width, 0x0101: height}),
        (data.get_ifd(0x8769), {0xA002: width, 0xA003: height}),
    ):
        tags.update({tag: size for tag, size in sizes.items() if tag in tags})
    return data.tobytes()


def write(path: Path, picture: Picture) -> None:
    """Writes the file whole or not at all. OSError: no room, no permission; ValueError: more than the format takes."""
    data = encode(picture)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # short: the name itself may be as long as they get
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def encode(picture: Picture) -> bytes:
    """The file's bytes."""
    pixels = np.ascontiguousarray(turn(picture.pixels, picture.orientation, back=True))
    if pixels.dtype == np.uint16:
        return (encode_png_16_bit if picture.format == "PNG" else encode_tiff_16_bit)(pixels, picture)
    formats: dict[str, dict[str, Any]] = {
        "PNG": {},
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True, "exact": True},
        "TIFF": {"compression": "tiff_adobe_deflate", "tiffinfo": {ORIENTATION: picture.orientation}},
    }
    options = formats[picture.format]
    if picture.icc_profile:
        options["icc_profile"] = picture.icc_profile
    if picture.dpi and picture.format != "WEBP":
        options["dpi"] = picture.dpi
    if picture.exif and picture.format != "TIFF":
        options["exif"] = picture.exif
    buffer = io.BytesIO()
    try:
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, picture.format, **options)
    except OSError as error:  # an encoder's, not the disk's
        raise ValueError(str(error)) from error
    return buffer.getvalue()


def encode_png_16_bit(pixels: np.ndarray, picture: Picture) -> bytes:
    """PNG (ISO/IEC 15948) with 16 bits a channel, which Pillow writes only of grey; rows filtered by Sub."""
    height, width, num_channels = pixels.shape
    rows = pixels.astype(">u2").view(np.uint8).reshape(height, -1)
    filtered = np.ones((height, 1 + rows.shape[1]), np.uint8)  # each row: filter type 1, then differences
    filtered[:, 1:] = rows
    filtered[:, 1 + 2 * num_channels :] -= rows[:, : -2 * num_channels]
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[num_channels]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))]
    if picture.icc_profile:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(picture.icc_profile)))
    if picture.dpi:
        chunks.append((b"pHYs", struct.pack(">IIB", *(round(dpi / 0.0254) for dpi in picture.dpi), 1)))
    if picture.exif:
        chunks.append((b"eXIf", picture.exif.removeprefix(b"Exif\0\0")))
    chunks += [(b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def encode_tiff_16_bit(pixels: np.ndarray, picture: Picture) -> bytes:
    """TIFF with 16 bits a channel, grey, RGB or RGBA, deflated; Pillow writes only grey."""
    import tifffile  # needed for this alone

    num_channels = pixels.shape[2]
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        pixels[..., 0] if num_channels == 1 else pixels,
        photometric="rgb" if num_channels >= 3 else "minisblack",
        planarconfig="contig" if num_channels > 1 else None,
        extrasamples=["unassalpha"] if num_channels == 4 else None,
        compression="zlib",
        iccprofile=picture.icc_profile,
        resolution=picture.dpi,
        resolutionunit="INCH" if picture.dpi else None,
        extratags=[(ORIENTATION, "H", 1, picture.orientation, True)],
        metadata=None,
        software=False,
    )
    return buffer.getvalue()
