import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from mcir.data.decode import MAX_PIXELS, decode, image_size
from mcir.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
SMOOTH = (np.mgrid[0:40, 0:60].sum(0)[..., None] * [1, 2, 1] + 20).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, interlace: int = 0) -> bytes:
    """A PNG written by hand: what Pillow cannot write (16-bit colour) or should not (a bomb)."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def check(data: bytes, expected: np.ndarray, atol: float = 0) -> None:
    image = decode(data, "row 1")
    assert image.dtype == torch.uint8
    assert tuple(image.shape) == (3, *expected.shape[:2])
    assert image_size(data, "row 1") == expected.shape[:2]
    difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= atol


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {}), ("BMP", {}), ("PPM", {})],
)
def test_lossless_formats_give_back_the_pixels(kind, options):
    check(encode(RGB, kind, **options), RGB)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_come_close(kind):
    check(encode(SMOOTH, kind, quality=95), SMOOTH, atol=12)


def test_alpha_is_dropped_and_the_colour_under_it_kept():
    alpha = np.where(RGB[..., :1] > 128, 0, 200).astype(np.uint8)
    check(encode(np.concatenate([RGB, alpha], 2), "PNG"), RGB)
    check(encode(np.concatenate([RGB, alpha], 2), "WEBP", lossless=True, exact=True), RGB)
    check(encode(np.concatenate([RGB[..., :1], alpha], 2), "PNG"), RGB[..., :1].repeat(3, 2))


def test_grey_bilevel_and_palette_become_rgb():
    grey = RGB[..., 0]
    check(encode(grey, "PNG"), grey[..., None].repeat(3, 2))
    check(encode(SMOOTH[..., 0], "JPEG", quality=95), SMOOTH[..., :1].repeat(3, 2), atol=8)
    check(encode(Image.fromarray(grey > 99), "PNG"), ((grey > 99) * 255)[..., None].repeat(3, 2))
    indices = grey % 5
    colours = np.array([[0, 0, 0], [255, 0, 7], [0, 255, 9], [1, 2, 3], [250, 251, 252]], np.uint8)
    palette = Image.fromarray(indices, "L").convert("P")
    palette.putpalette(colours.tobytes())
    check(encode(palette, "PNG"), colours[indices])
    check(encode(palette, "PNG", transparency=1), colours[indices])
    check(encode(palette, "GIF"), colours[indices])
    nibbles = (SMOOTH[:4, :2, 0] // 17).astype(np.uint8)  # grey at 4 bits a pixel
    check(png(2, 4, 4, 0, b"".join(bytes([0, a << 4 | b]) for a, b in nibbles)), (nibbles * 17)[..., None].repeat(3, 2))


def test_cmyk_jpeg_is_converted():
    red, cmyk = np.tile(np.uint8([200, 30, 40]), (32, 32, 1)), Image.new("CMYK", (32, 32), (55, 225, 215, 0))
    check(encode(cmyk, "JPEG", quality=95), red, atol=6)


def test_sixteen_bits_become_float():
    deep = np.random.default_rng(1).integers(0, 65536, (6, 5, 4), dtype=np.uint16)
    for colour, channels, expected in [
        (0, [0], deep[..., [0, 0, 0]]),
        (2, [0, 1, 2], deep[..., :3]),
        (4, [0, 1], deep[..., [0, 0, 0]]),
        (6, [0, 1, 2, 3], deep[..., :3]),
    ]:
        rows = b"".join(b"\0" + row[:, channels].astype(">u2").tobytes() for row in deep)
        image = decode(png(5, 6, 16, colour, rows), "row 1")
        assert image.dtype == torch.float32
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected / 65535, atol=1e-7)
    grey = decode(encode(deep[..., 0], "TIFF"), "row 1")
    np.testing.assert_allclose(grey.permute(1, 2, 0).numpy(), deep[..., [0, 0, 0]] / 65535, atol=1e-7)
    big_endian = io.BytesIO()
    tifffile.imwrite(big_endian, deep[..., 0], byteorder=">")
    assert torch.equal(decode(big_endian.getvalue(), "row 1"), grey)


ORIENTED = {  # EXIF orientation -> how the stored pixels are to be shown
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", ORIENTED)
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    check(encode(SMOOTH, "JPEG", quality=95, exif=exif), ORIENTED[orientation](SMOOTH), atol=12)
    check(encode(RGB, "PNG", exif=exif), ORIENTED[orientation](RGB))
    check(encode(RGB, "WEBP", lossless=True, exact=True, exif=exif), ORIENTED[orientation](RGB))
    check(encode(RGB, "TIFF", tiffinfo=exif), ORIENTED[orientation](RGB))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("bottom", [None, 1])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_truncated_anywhere_is_an_error_never_a_half_picture(kind, bottom):
    data = encode(RGB, kind)
    for end in [1, 8, 20, 40, 60, len(data) // 4, len(data) // 2, len(data) * 3 // 4, len(data) - 20]:
        with pytest.raises(UserError, match="shard 3, row 7"):
            decode(data[:end], "shard 3, row 7", bottom)


@pytest.mark.parametrize("bottom", [None, 10])
def test_the_end_of_a_thumbnail_is_not_that_of_the_jpeg(bottom):
    whole = encode(SMOOTH, "JPEG", quality=95)
    thumbnail = encode(RGB, "JPEG")
    for segment in (b"\xff\xe1" + b"Exif\0\0", b"\xff\xed" + b"Photoshop 3.0\0"):
        body = segment[2:] + thumbnail
        data = whole[:2] + segment[:2] + struct.pack(">H", len(body) + 2) + body + whole[2:]
        assert torch.equal(decode(data, "here")[:, :10], decode(whole, "here")[:, :10])
        assert torch.equal(decode(data + b"more", "here", bottom)[:, :10], decode(whole, "here")[:, :10])
        for end in (len(data) - len(whole) // 3, len(data) - 2):
            for rest in (b"", b"\0" * 99):
                with pytest.raises(UserError, match=r"^here: the JPEG image is truncated or corrupt"):
                    decode(data[:end] + rest, "here", bottom)


def test_a_jpeg_of_unusual_sampling():
    """Colour at a third of the width; all blocks of this picture are alike, so more of them are the same bits."""
    data = bytearray(encode(np.full((16, 16, 3), 128, np.uint8), "JPEG", progressive=True, subsampling=0))
    luma = data.index(b"\xff\xc2") + 11
    assert data[luma] == 0x11
    data[luma] = 0x31
    check(bytes(data), np.full((16, 16, 3), 128))


@pytest.mark.parametrize("bottom", [None, 3])
def test_a_png_is_as_good_in_part_as_in_whole(bottom):
    """Of chunks that say nothing about the pixels the checksums do not count."""
    data = encode(RGB, "PNG")
    time = b"tIME" + bytes(7)
    wrong = data[:33] + struct.pack(">I", 7) + time + b"\0\0\0\0" + data[33:]
    for odd in (wrong, data[:-12]):  # or without IEND
        np.testing.assert_array_equal(decode(odd, "here", bottom)[:, :3].permute(1, 2, 0), RGB[:3])


def interlaced(pixels: np.ndarray) -> bytes:
    """An RGB PNG in the seven passes of Adam7, which Pillow does not write."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [pixels[top::down, left::right] for top, left, down, right in passes]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    return png(pixels.shape[1], pixels.shape[0], 8, 2, rows, interlace=1)


WAYS = [
    *(("PNG", {"mode": mode}) for mode in ("RGB", "L", "RGBA", "LA", "P")),
    ("PNG", {"transparency": (1, 2, 3)}),
    ("interlaced", {}),
    *(("JPEG", {"subsampling": s, "progressive": p}) for s in ("4:4:4", "4:2:2", "4:2:0") for p in (False, True)),
    *(("JPEG", {"mode": "L", "progressive": p}) for p in (False, True)),
    ("JPEG", {"restart_marker_blocks": 3}),
    ("JPEG", {"mode": "CMYK"}),
    *(("WEBP", {"quality": q, "method": m}) for q in (1, 50, 95) for m in (0, 4, 6)),
    ("WEBP", {"mode": "RGBA"}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {}),
]


@pytest.mark.parametrize(("kind", "options"), WAYS)
def test_rows_above_the_bottom_are_those_of_the_whole_image(kind, options, capfd):
    rng = np.random.default_rng(0)
    for height, width in [(1, 1), (17, 40), (83, 70), (160, 96)]:
        coarse = Image.fromarray(rng.integers(0, 256, (2 + height // 9, 2 + width // 9, 3), dtype=np.uint8))
        image = coarse.resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.asarray(image, int) + rng.integers(-9, 9, (height, width, 3))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(options.get("mode", "RGB"))
        for exif in (None, ORIENTED):
            extra: dict = {key: value for key, value in options.items() if key != "mode"}
            if exif:
                extra["exif"] = Image.Exif()
                extra["exif"][0x0112] = 6
            data = interlaced(np.asarray(image)) if kind == "interlaced" else encode(image, kind, **extra)
            whole = decode(data, "here")
            if kind in ("PNG", "interlaced") and not exif and "A" not in image.mode:
                np.testing.assert_array_equal(whole.permute(1, 2, 0), np.asarray(image.convert("RGB")))
            for bottom in {1, height // 3 or 1, height // 2 or 1, height - 1 or 1, height, height + 9}:
                above = decode(data, "here", bottom)
                assert above.shape[2] == whole.shape[2]
                assert above.shape[1] >= min(bottom, whole.shape[1])
                assert torch.equal(above[:, :bottom], whole[:, :bottom])
    assert not any(capfd.readouterr())  # libjpeg likes to warn


def test_a_crop_is_decoded_from_the_rows_above_its_bottom():
    tall = SMOOTH.repeat(9, 0)
    for kind in ("PNG", "JPEG", "WEBP"):
        assert decode(encode(tall, kind), "here", 100).shape[1] < 120


def test_what_is_no_image_is_one_clear_sentence():
    with pytest.raises(UserError, match=r"^here: the image is empty \(0 bytes\)$"):
        decode(b"", "here")
    for junk in [b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 1000]:
        with pytest.raises(UserError, match=r"^here: not an image in a format that is read \(PNG, JPEG"):
            decode(junk, "here")
    with pytest.raises(UserError, match=r"here: .* 32 bits a channel"):
        decode(encode(RGB[..., 0].astype(np.float32), "TIFF"), "here")


@pytest.mark.parametrize("bottom", [None, 3])
@pytest.mark.parametrize("image", [RGB, SMOOTH])
def test_a_flipped_byte_of_a_png_is_found(image, bottom):
    data = encode(image, "PNG")
    for place in range(8, len(data) - 12, max(1, len(data) // 300)):
        flipped = bytearray(data)
        flipped[place] ^= 0xFF
        with pytest.raises(UserError, match=r"^here: "):
            decode(bytes(flipped), "here", bottom)


@pytest.mark.parametrize(
    ("depth", "colour", "rows"),
    [
        (8, 2, b"\0" * 10),  # too short
        (8, 2, b"\7" * 13 * 4),  # no such filter
        (16, 6, b"\7" * 33 * 4),
        (8, 3, b"\0" * 5 * 4),  # no palette
    ],
)
def test_a_png_whose_checksums_are_right_and_whose_pixels_are_wrong(depth, colour, rows):
    """In torchvision 0.29 such files end the process."""
    with pytest.raises(UserError, match=r"^here: the (PNG image is truncated or corrupt|image's header is corrupt)"):
        decode(png(4, 4, depth, colour, rows), "here")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_460, 50_000])
def test_decompression_bombs_are_refused_before_decoding(side):
    assert side * side > MAX_PIXELS
    bomb = png(side, side, 8, 2, b"")  # nothing to decode: only the header can have been looked at
    for look in (decode, image_size):
        with pytest.raises(UserError, match=r"^here: refused, more than 89,478,485 pixels"):
            look(bomb, "here")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_of_other_formats_are_refused_too():
    """A small image whose header was changed to say 16,383 pixels a side."""
    jpeg, lossy = bytearray(encode(SMOOTH, "JPEG")), bytearray(encode(SMOOTH, "WEBP"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 16_383, 16_383)
    lossy[26:30] = struct.pack("<HH", 16_383, 16_383)
    lossless = bytearray(encode(SMOOTH, "WEBP", lossless=True))
    flags = lossless[24] & 0xF0
    lossless[21:25] = (flags << 24 | 16_382 << 14 | 16_382).to_bytes(4, "little")
    for bomb in (jpeg, lossy, lossless):
        with pytest.raises(UserError, match=r"^here: refused, more than 89,478,485 pixels"):
            decode(bytes(bomb), "here")


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_blocks": 1}, {"comment": b"\xff\xc0" * 9}])
def test_every_kind_of_jpeg_header_is_read(options):
    check(encode(SMOOTH, "JPEG", quality=95, **options), SMOOTH, atol=12)
    padded = encode(SMOOTH, "JPEG", quality=95, **options).replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1)
    check(padded, SMOOTH, atol=12)  # a marker may be preceded by fill bytes
