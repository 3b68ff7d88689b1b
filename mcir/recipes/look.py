"""What a folder holds to train on, found out by looking: Parquet shards, tars, pairs of folders, a published dataset,
clean images; their scale and sizes; and what lies beside it to validate on.

Nothing is guessed where it matters: what may be meant in two ways is asked for. Of the images at most `NUM_LOOKED_AT`,
at `NUM_PLACES` spread over the whole, are looked at, their headers alone.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mcir.data.decode import image_size
from mcir.data.files import IMAGE_SUFFIXES, files_below
from mcir.data.layouts import recognise, whose_degraded_half
from mcir.data.rows import Row, Units
from mcir.data.sources import AnySource
from mcir.errors import UserError
from mcir.evaluation.sets import pair_source

NUM_LOOKED_AT = 256
NUM_PLACES = 32
CLEAN = re.compile(r"(hr|gt|clean|clear|sharp|target|ground_?truth|high|normal)(_?crops)?", re.IGNORECASE)
DEGRADED = re.compile(
    r"(lr|lq|degraded|input|blur(red|ry)?|nois(e|y)|rain(y)?|haz[ey]|low)(_?bicubic|_?crops)?([_-]?x[234568])?",
    re.IGNORECASE,
)
"""Names of the folders of a pair."""
HELD_OUT = ("valid", "validation", "val", "test", "heldout")
"""Names of what is beside `train`, in the order in which it is taken to validate on."""


@dataclass(frozen=True)
class Found:
    """Sources as values of a config, and what their images are like."""

    train: dict[str, Any]
    held_out: dict[str, Any] | None
    scale: int | None
    """Clean side / degraded side; None for clean images alone."""
    num_samples: int
    num_looked_at: int
    sides: tuple[int, int]
    """The shortest and the longest shorter side of a clean image among those that were looked at."""
    small: int
    """The side below which a twentieth of them are."""

    def __str__(self) -> str:
        what = "clean images" if self.scale is None else "pairs of one size" if self.scale == 1 else "pairs"
        times = f" x{self.scale}" if self.scale and self.scale > 1 else ""
        least, most = self.sides
        sizes = f"{least}" if least == most else f"{least} to {most}"
        seen = "" if self.num_looked_at == self.num_samples else f" ({self.num_looked_at:,} were looked at)"
        return f"{self.num_samples:,} {what}{times}, shorter sides of {sizes} pixels{seen}"


def look(folder: Path, scales: tuple[int, ...], all_clean: bool = False) -> Found:
    """What is in a folder, for a network of one of these scales; `all_clean`: the user says that no image is degraded.

    UserError, a sentence: nothing there, an image that cannot be read, halves that do not fit, several readings.
    """
    if not folder.is_dir():
        raise UserError(f"--data {folder}: is not a folder")
    train, held_out = _sources(folder, scales, all_clean)
    units = _open(train)
    found, sides = set[int | None](), list[int]()
    for row in _spread(units):
        height, width = image_size(row.clean, f"{row.where}, clean")
        found.add(_scale(row, height, width))
        sides.append(min(height, width))
    if not sides:
        raise UserError(f"--data {folder}: holds no images")
    if len(found) > 1:
        listed = ", ".join("none" if scale is None else f"x{scale}" for scale in sorted(found, key=lambda s: s or 0))
        raise UserError(f"--data {folder}: the pairs have several scales ({listed}); mcir data inspect says which")
    (scale,) = found
    if held_out:
        _require_scale(held_out, scale)
    sides.sort()
    return Found(train, held_out, scale, sum(units.lengths), len(sides), (sides[0], sides[-1]), sides[len(sides) // 20])


def _open(source: dict[str, Any]) -> Units:
    return TypeAdapter[Any](AnySource).validate_python(source).open()


def _require_scale(held_out: dict[str, Any], scale: int | None) -> None:
    """UserError where the first image to validate on is not of the scale of those to train on."""
    for row in islice(_open(held_out), 1):
        if _scale(row, *image_size(row.clean, f"{row.where}, clean")) != scale:
            raise UserError(f"{row.where}: lies beside what is to be trained on and has another scale")


def _scale(row: Row, height: int, width: int) -> int | None:
    if row.degraded is None:
        return None
    sides = image_size(row.degraded, f"{row.where}, degraded")
    scale = round(height / sides[0])
    if scale < 1 or (height // scale, width // scale) != sides:
        raise UserError(
            f"{row.where}: clean is {height} x {width} and degraded {sides[0]} x {sides[1]}, which is no whole scale"
        )
    return scale


def _spread(units: Units) -> Iterator[Row]:
    """Rows from the whole of a dataset. UserError at one that cannot be read."""
    num = len(units.lengths)
    chosen = [i * num // min(num, NUM_PLACES) for i in range(min(num, NUM_PLACES))]
    most = NUM_LOOKED_AT // max(1, len(chosen))
    for unit in chosen:
        for row in islice(units.rows(unit, 0), most):
            if isinstance(row, UserError):
                raise row
            yield row


def _sources(folder: Path, scales: tuple[int, ...], all_clean: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """To train on and to validate on."""
    root, beside = _parts(folder)
    if shards := files_below(root, [".parquet"]):
        named = [shard for shard in shards if shard.name.startswith("train-")]
        if named and len(named) < len(shards):  # a repository of the Hub, with all splits in one folder
            others = [name for name in HELD_OUT if any(shard.name.startswith(f"{name}-") for shard in shards)]
            held_out = _parquet(f"{root}/**/{others[0]}-*.parquet") if others else None
            return _parquet(f"{root}/**/train-*.parquet"), held_out
        return _parquet(str(root)), _parquet(str(beside)) if beside and files_below(beside, [".parquet"]) else None
    if files_below(root, [".tar"]):
        held_out = {"format": "tars", "path": str(beside)} if beside and files_below(beside, [".tar"]) else None
        return {"format": "tars", "path": str(root)}, held_out
    if not files_below(root, IMAGE_SUFFIXES):
        raise UserError(f"--data {folder}: holds no images, no Parquet files and no tars")
    if not all_clean and (published := _published(folder, scales)):
        return published
    other = beside if beside and files_below(beside, IMAGE_SUFFIXES) else None
    return _images(root, scales, all_clean), _images(other, scales, all_clean) if other else None


def _parts(folder: Path) -> tuple[Path, Path | None]:
    """`train` inside the folder, or the folder itself, and what is beside `train` under a name of `HELD_OUT`."""
    inside = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    root = inside.get("train", folder)
    names = inside
    if root is folder and folder.name.lower() == "train":
        names = {path.name.lower(): path for path in folder.parent.iterdir() if path.is_dir()}
    elif root is folder:
        names = {}
    return root, next((names[name] for name in HELD_OUT if name in names), None)


def _parquet(path: str) -> dict[str, Any]:
    return {"format": "parquet", "path": path}


def _published(folder: Path, scales: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
    """As a published dataset, where the folder is laid out as one; not where its halves are two folders of images that
    fit as they are, which may be anybody's."""
    recognised = list(_recognised(folder, scales))
    if _halves(_parts(folder)[0]) and not any(centre_crop for _, _, centre_crop in recognised):
        return None
    found = [(source, split) for source, split, _ in recognised]
    train = [source for source, split in found if split == "train"]
    if len(train) > 1:
        named = ([str(v) for k, v in source.items() if k not in ("format", "path")] for source in train)
        listed = "; ".join(map(" ".join, named))
        ask = " with --scale" if len({source.get("scale") for source in train}) == len(train) else ""
        raise UserError(f"--data {folder}: may be read as {listed}: say which{ask or ', or give the folder of one'}")
    if not train and found:
        raise UserError(
            f"--data {folder}: is a test set, {found[0][0]['layout']}, on which nobody trains; give another folder"
        )
    held_out = [source for source, split in found if split != "train" and source["layout"] == train[0]["layout"]]
    return (train[0], held_out[0] if held_out else None) if train else None


def _recognised(folder: Path, scales: tuple[int, ...]) -> Iterator[tuple[dict[str, Any], str, bool]]:
    """Sources of published datasets as which the folder reads, their splits, and whether the centre of the clean images
    is meant."""
    for scale in scales:
        for (layout, split), pairs in recognise(folder, scale).items():
            settings = {"split": split, "scale": scale if scale > 1 else None}
            given = {name: value for name, value in settings.items() if value}
            source = {"format": "layout", "layout": layout, "path": str(folder)} | given
            yield source, pairs.split, pairs.centre_crop


def _images(root: Path, scales: tuple[int, ...], all_clean: bool) -> dict[str, Any]:
    """Two folders whose names say which is which, or clean images."""
    if all_clean:
        return {"format": "folders", "clean": str(root)}
    if halves := _halves(root):
        clean, degraded = halves
        fitting = [path for path in _folders(degraded) if path.name.lower() in {f"x{scale}" for scale in scales}]
        if len(fitting) > 1:
            raise UserError(f"--data {root}: {degraded} holds several scales: say which with --scale")
        return pair_source(clean, fitting[0] if fitting else degraded)
    if whose := whose_degraded_half(root):
        raise UserError(
            f"--data {root}: holds the degraded images of {whose[0]}, and {whose[1]} their clean ones; give the folder "
            "above both"
        )
    inside = _folders(root)
    if len(inside) == 1 and not any(path.suffix.lower() in IMAGE_SUFFIXES for path in root.iterdir()):
        return {"format": "folders", "clean": str(inside[0])}
    if inside:
        names = ", ".join(path.name for path in inside[:5]) + ", …" * (len(inside) > 5)
        raise UserError(
            f"--data {root}: holds images in several folders ({names}), of which not just two are called as the halves "
            "of pairs are (hr and lr, gt and lq, sharp and blur, target and input): rename them so, give one of them, "
            "or say with --degradation how all of these, clean, are to be degraded"
        )
    return {"format": "folders", "clean": str(root)}


def _halves(root: Path) -> tuple[Path, Path] | None:
    """The folders of clean and degraded images, where one each is called so."""
    inside = _folders(root)
    clean, degraded = ([path for path in inside if name.fullmatch(path.name)] for name in (CLEAN, DEGRADED))
    return (clean[0], degraded[0]) if len(clean) == len(degraded) == 1 else None


def _folders(root: Path) -> list[Path]:
    """Those that hold images."""
    return sorted(path for path in root.iterdir() if path.is_dir() and files_below(path, IMAGE_SUFFIXES))
