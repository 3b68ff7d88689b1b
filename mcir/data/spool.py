"""A sample on disk to the rows that shards hold of it: decoded once, checked, cut and degraded, in a file of its own.

A spool file is named after what decides its contents (key, files with their sizes and times, options), so that a pack
that goes on after images were mended or removed finds again what it has done. Images that keep their original bytes are
not copied: the spool notes that they are good, and whoever writes the shard reads them from their own files.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from mcir.data.decode import decode
from mcir.data.encode import centre, encode
from mcir.data.options import Options
from mcir.data.pairs import Pair, Pairs
from mcir.errors import UserError

_NUM_BYTES = b"num_bytes"


def spool_name(pair: Pair, pairs: Pairs, options: Options) -> str:
    """UserError where a file cannot be looked at."""
    try:
        seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in pair.files]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
    decides = pair.key, seen, pairs.scale, pairs.centre_crop, pairs.columns, repr(options)
    return hashlib.sha256(repr(decides).encode()).hexdigest()[:32] + ".arrow"


def spool(file: Path, pair: Pair, pairs: Pairs, options: Options) -> None:
    """Write the rows of a sample to `file`. UserError: a bad image, or halves of unequal sizes (file named)."""
    rows = _rows(pair, pairs, options)
    own = _files(pair, pairs)
    images = [(name, image) for row in rows for name, image in row.items() if name != "key"]
    num_bytes = sum(own[name].stat().st_size if i["bytes"] is None else len(i["bytes"]) for name, i in images)
    table = pa.Table.from_pylist(rows, schema([name for name in rows[0] if name != "key"])).replace_schema_metadata(
        {_NUM_BYTES: str(num_bytes)}
    )

    def save(part: Path) -> None:
        with pa.ipc.new_file(part, table.schema) as writer:
            writer.write_table(table)

    write(file, save, sync=False)  # written again where a power cut damages it


def measure(file: Path) -> tuple[int, int]:
    """(rows, bytes of images) of a sample that was spooled. OSError or pa.ArrowInvalid: none, or damaged."""
    table = _spooled(file)
    return table.num_rows, int(table.schema.metadata[_NUM_BYTES])


def spooled_row(file: Path, number: int, pair: Pair, pairs: Pairs) -> dict[str, Any]:
    """A row in the shards' columns, with all its bytes."""
    (row,) = _spooled(file).slice(number, 1).to_pylist()
    for name, path in _files(pair, pairs).items():
        if row[name]["bytes"] is None:
            row[name]["bytes"] = path.read_bytes()
    return row


def schema(names: Sequence[str]) -> pa.Schema:
    """Columns with the metadata from which `datasets` knows that they are images."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {name: {"_type": "Image"} for name in names} | {"key": {"dtype": "string", "_type": "Value"}}
    columns = pa.schema([*((name, image) for name in names), ("key", pa.string())])
    return columns.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write(path: Path, data: bytes | Callable[[Path], None], sync: bool = True) -> None:
    """Write a file so that it is whole or absent, whatever happens meanwhile (but a power cut without `sync`)."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    if callable(data):
        data(part)
    else:
        part.write_bytes(data)
    if sync:
        with part.open("rb+") as file:
            os.fsync(file.fileno())
    part.replace(path)


def crop_positions(side: int, size: int, step: int) -> list[int]:
    """Where crops begin along a side: every `step`, and one flush with the end. [0] where the side is not larger."""
    starts = list(range(0, side - size + 1, step)) or [0]
    if starts[-1] + size < side:
        starts.append(side - size)
    return starts


def _files(pair: Pair, pairs: Pairs) -> dict[str, Path]:
    """The sample's files by their columns."""
    return dict(zip(["clean", *(["degraded"] if pair.degraded else []), *pairs.columns], pair.files, strict=True))


def _spooled(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()  # maps, reads nothing yet


def _row(key: str, images: Mapping[str, tuple[bytes | None, str]]) -> dict[str, Any]:
    return {name: {"bytes": data, "path": file} for name, (data, file) in images.items()} | {"key": key}


def _rows(pair: Pair, pairs: Pairs, options: Options) -> list[dict[str, Any]]:
    """A sample as one row, without bytes where they are those of its files, or as one row for each crop."""
    files = _files(pair, pairs)
    try:
        images = {name: decode(path.read_bytes(), str(path)) for name, path in files.items()}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
    whole = images["clean"].shape
    if pair.degraded:
        images["clean"] = _fitting(images["clean"], images["degraded"], pair, pairs)
    for name in pairs.columns:
        _require_size_of_clean(images[name], images["clean"], files[name], pair)
    scale = options.scale(pairs)
    if options.degradation is not None:
        full = ["clean", *pairs.columns]
        images |= {name: images[name][:, : whole[1] // scale * scale, : whole[2] // scale * scale] for name in full}
        rng = np.random.default_rng([options.seed or 0, zlib.crc32(pair.key.encode())])
        images["degraded"] = options.degradation.of(images["clean"], rng, images)
        files["degraded"] = pair.clean
    if options.crop_size is None:
        named: dict[str, tuple[bytes | None, str]] = {name: (None, path.name) for name, path in files.items()}
        changed = {"degraded"} if options.degradation is not None else set[str]()
        if images["clean"].shape != whole:
            changed |= {"clean"} | (set(pairs.columns) if options.degradation is not None else set())
        named |= {name: _encoded(images[name], files[name].stem, options) for name in changed}
        return [_row(pair.key, named)]
    step = options.crop_step or options.crop_size
    height, width = (side // scale * scale for side in images["clean"].shape[-2:])
    corners = [
        (top, left)
        for top in crop_positions(height, options.crop_size, step)
        for left in crop_positions(width, options.crop_size, step)
    ]
    rows = []
    for number, (top, left) in enumerate(corners, start=1):
        crops = {}
        for name, image in images.items():
            ratio = scale if name == "degraded" else 1
            size = options.crop_size // ratio
            y, x, bottom, right = top // ratio, left // ratio, height // ratio, width // ratio
            crop = image[:, y : min(y + size, bottom), x : min(x + size, right)]
            crops[name] = _encoded(crop, f"{files[name].stem}_s{number:03}", options)
        rows.append(_row(f"{pair.key}_s{number:03}", crops))
    return rows


def _require_size_of_clean(image: Tensor, clean: Tensor, path: Path, pair: Pair) -> None:
    if image.shape[-2:] != clean.shape[-2:]:
        sides = (f"{size[-2]} x {size[-1]}" for size in (image.shape, clean.shape))
        raise UserError(f"{path} is {next(sides)}, and {pair.clean} {next(sides)}: it must have that size")


def _fitting(clean: Tensor, degraded: Tensor, pair: Pair, pairs: Pairs) -> Tensor:
    """The part of `clean` that `degraded` shows: all of it, or its centre. UserError where the sizes do not fit."""
    sides, expected = clean.shape[-2:], degraded.shape[-2:]
    if [side // pairs.scale for side in sides] == list(expected):
        return clean
    if pairs.centre_crop and all(side >= wanted for side, wanted in zip(sides, expected, strict=True)):
        return centre(clean, *expected)
    raise UserError(
        f"{pair.clean} is {sides[0]} x {sides[1]} and {pair.degraded} {expected[0]} x {expected[1]}: "
        f"at scale {pairs.scale} it should be {sides[0] // pairs.scale} x {sides[1] // pairs.scale}"
    )


def _encoded(image: Tensor, stem: str, options: Options) -> tuple[bytes, str]:
    data, kind = encode(image, options.crop_format)
    return data, f"{stem}.{kind}"
