import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from torchvision.io import ImageReadMode, decode_png

from mcir.errors import UserError
from mcir.restoration import images
from mcir.restoration.images import open_header, read, to_rgb, with_rgb, write

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
rng = np.random.default_rng(0)


def noise(channels, dtype=np.uint8, height=6, width=9):
    return rng.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


def exif(orientation):
    tags = Image.Exif()
    tags[images.ORIENTATION], tags[0x010F] = orientation, "Maker"
    return tags.tobytes()


def png_16(pixels, path, **extra):
    """An independent, unfiltered 16-bit PNG: what the specification says, chunk by chunk."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [(b"IHDR", header), *((name.encode(), data) for name, data in extra.items())]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    framed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))


def png_16_pixels(path):
    """16-bit PNG by torchvision's decoder, (H, W, C)."""
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    return decode_png(data, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()


def pass_through(path, tmp_path):
    """What an identity network would write."""
    picture = read(path)
    target = tmp_path / "out" / path.name
    write(target, with_rgb(picture, to_rgb(picture)))
    return picture, target


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_network_sees_upright_and_file_stays_as_it_lay(tmp_path, suffix, orientation):
    path = tmp_path / f"a{suffix}"
    smooth = np.linspace(0, 255, 24 * 16).reshape(16, 24).astype(np.uint8)
    pixels = np.stack([smooth, smooth[::-1], smooth[:, ::-1]], 2)
    options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(pixels).save(path, exif=exif(orientation), icc_profile=PROFILE, **options)
    picture, target = pass_through(path, tmp_path)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert picture.pixels.shape == upright.shape
    assert (picture.pixels == upright).all()
    with Image.open(path) as before, Image.open(target) as after:
        assert after.format == before.format
        assert after.getexif()[images.ORIENTATION] == orientation
        assert suffix == ".tif" or after.getexif()[0x010F] == "Maker"
        assert after.info["icc_profile"] == PROFILE
        assert after.size == before.size
        difference = np.abs(np.asarray(before).astype(int) - np.asarray(after))
    assert difference.max() <= (3 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_grey_and_alpha_come_back_exactly(tmp_path, suffix, mode):
    path = tmp_path / f"a{suffix}"
    options = {"lossless": True, "exact": True} if suffix == ".webp" else {}
    Image.fromarray(noise(4)).convert(mode).save(path, **options)
    picture, target = pass_through(path, tmp_path)
    assert to_rgb(picture).shape == (3, 6, 9)
    with Image.open(path) as before, Image.open(target) as after:
        assert after.mode == {"1": "L"}.get(before.mode, before.mode)
        assert (np.asarray(before.convert(after.mode)) == np.asarray(after)).all()


def test_palette_and_key_colour_become_rgb_and_alpha(tmp_path):
    palette = Image.fromarray(noise(3)).quantize(4)
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "pa.png", transparency=1)
    Image.fromarray(noise(3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert read(tmp_path / "p.png").pixels.shape[2] == 3
    for name in ("pa.png", "key.png"):
        _, target = pass_through(tmp_path / name, tmp_path)
        expected = Image.open(tmp_path / name).convert("RGBA")
        assert (np.asarray(Image.open(target)) == np.asarray(expected)).all()


def test_cmyk_becomes_rgb_without_its_profile(tmp_path):
    Image.fromarray(noise(3)).convert("CMYK").save(tmp_path / "a.jpg", icc_profile=PROFILE)
    _, target = pass_through(tmp_path / "a.jpg", tmp_path)
    with Image.open(target) as after:
        assert after.mode == "RGB"
        assert "icc_profile" not in after.info


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_without_metadata_is_exact(tmp_path, channels):
    pixels = noise(channels, np.uint16)
    png_16(pixels, tmp_path / "a.png")
    picture, target = pass_through(tmp_path / "a.png", tmp_path)
    assert picture.pixels.dtype == np.uint16
    assert (picture.pixels == pixels).all()
    assert (png_16_pixels(target) == pixels).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_is_exact(tmp_path, channels):
    pixels = noise(channels, np.uint16)
    metadata = {"iCCP": b"ICC Profile\0\0" + zlib.compress(PROFILE), "eXIf": exif(6).removeprefix(b"Exif\0\0")}
    png_16(pixels, tmp_path / "a.png", **metadata)
    picture, target = pass_through(tmp_path / "a.png", tmp_path)
    assert picture.pixels.dtype == np.uint16
    assert (picture.pixels == np.rot90(pixels, -1)).all()  # orientation 6: turned right to be upright
    assert (png_16_pixels(target) == pixels).all()
    with Image.open(target) as after:
        after.load()
        assert after.info["icc_profile"] == PROFILE
        assert after.getexif()[images.ORIENTATION] == 6


def test_16_bit_key_colour_becomes_alpha(tmp_path):
    pixels = noise(3, np.uint16)
    png_16(pixels, tmp_path / "a.png", tRNS=pixels[2, 3].astype(">u2").tobytes())
    alpha = read(tmp_path / "a.png").pixels[..., 3]
    assert alpha[2, 3] == 0
    assert (alpha == 65535).sum() == alpha.size - 1


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_16_bit_tiff_is_exact(tmp_path, channels, byteorder, compression):
    tifffile = pytest.importorskip("tifffile")
    pixels = noise(channels, np.uint16, 40, 70)
    tifffile.imwrite(
        tmp_path / "a.tif",
        pixels if channels > 1 else pixels[..., 0],
        photometric="rgb" if channels > 1 else "minisblack",
        extrasamples=["unassalpha"] if channels == 4 else None,
        byteorder=byteorder,
        compression=compression,
        rowsperstrip=8,
        iccprofile=PROFILE,
        extratags=[(images.ORIENTATION, "H", 1, 3, True)],
    )
    picture, target = pass_through(tmp_path / "a.tif", tmp_path)
    assert (picture.pixels == pixels[::-1, ::-1]).all()
    assert (tifffile.imread(target).reshape(pixels.shape) == pixels).all()
    with Image.open(target) as after:
        assert after.info["icc_profile"] == PROFILE
        assert after.getexif()[images.ORIENTATION] == 3


def test_16_bit_planes_are_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    planes = noise(3, np.uint16).transpose(2, 0, 1)
    for compression in (None, "zlib"):
        tifffile.imwrite(
            tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate", compression=compression
        )
        with pytest.raises(UserError, match="not supported"):
            read(tmp_path / "a.tif")


def test_super_resolution_resizes_alpha_and_averages_grey(tmp_path):
    Image.fromarray(noise(2)).save(tmp_path / "la.png")
    picture = read(tmp_path / "la.png")
    colours = torch.rand(3, 12, 18) * 1.2 - 0.1
    restored = with_rgb(picture, colours).pixels
    assert restored.shape == (12, 18, 2)
    assert (restored[..., 0] == colours.mean(0).clamp(0, 1).mul(255).round().numpy()).all()
    flat = Image.new("RGBA", (9, 6), (10, 20, 30, 77))
    flat.save(tmp_path / "flat.png")
    assert (with_rgb(read(tmp_path / "flat.png"), colours).pixels[..., 3] == 77).all()


def test_bad_files_are_one_sentence(tmp_path, monkeypatch):
    good = io.BytesIO()
    Image.fromarray(noise(3, height=64, width=64)).save(good, "PNG")
    files = {
        "text.png": b"not an image",
        "empty.jpg": b"",
        "cut.png": good.getvalue()[:-3000],
        "flipped.png": good.getvalue()[:2000] + b"\xff" + good.getvalue()[2001:],
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}: .*(damaged|corrupt)"):
            read(tmp_path / name)
    with pytest.raises(UserError, match=r"none\.png: cannot be opened"):
        read(tmp_path / "none.png")

    frames = [Image.fromarray(noise(3)) for _ in range(2)]
    for name in ("anim.webp", "anim.png", "pages.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(UserError, match="several frames"):
            read(tmp_path / name)
    for name, dtype in (("float.tif", np.float32), ("int.tif", np.int32)):
        Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / name)
        with pytest.raises(UserError, match="not supported"):
            read(tmp_path / name)

    bomb = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", bomb), (b"IDAT", b""), (b"IEND", b""))
    data = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    with pytest.raises(UserError, match="decompression bomb"):
        open_header(tmp_path / "bomb.png")
    monkeypatch.setattr("mcir.data.decode.MAX_PIXELS", 50)
    Image.fromarray(noise(3)).save(tmp_path / "big.png")
    with pytest.raises(UserError, match=r"more than 50 pixels \(a decompression bomb\?\); --max-pixels raises"):
        read(tmp_path / "big.png")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    Image.fromarray(noise(3)).save(tmp_path / "a.png")
    picture, before = read(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()

    def full_disk(self, data):
        self.open("wb").write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "a.png", with_rgb(picture, 1 - to_rgb(picture)))
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_sizes_in_exif_are_the_new_ones_and_the_resolution_stays(tmp_path):
    data = Image.Exif()
    data[0x0100], data[0x010F] = 8, "Maker"
    data.get_ifd(0x8769).update({0xA002: 8, 0xA003: 6, 0x9003: "2026:01:01 00:00:00"})
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (8, 6), "red").save(tmp_path / name, exif=data, dpi=(300, 300))
        picture = images.read(tmp_path / name)
        images.write(tmp_path / name, images.with_rgb(picture, torch.rand(3, 12, 16)))
        with Image.open(tmp_path / name) as after:
            found = after.getexif()
            assert (found[0x0100], found[0x010F]) == (16, "Maker")
            assert dict(found.get_ifd(0x8769)) == {0xA002: 16, 0xA003: 12, 0x9003: "2026:01:01 00:00:00"}
            assert tuple(round(dpi) for dpi in after.info["dpi"]) == (300, 300)
