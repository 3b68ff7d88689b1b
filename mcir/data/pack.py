"""Image folders to Parquet shards with the columns `clean`, `degraded` and `key`: the one format every run streams.

Invariants: what a shard holds is a function of the samples and the options alone, so any number of processes, and a
pack that was killed and started again, write the same bytes. A shard appears under its name only when it is whole
(written beside it, synced, renamed); the dataset card, which lists the checksums, comes last. Every image is decoded
once here, so that a truncated file or a pair of unequal sizes ends the packing and not a training run.

Rows are shuffled before they are cut into shards. Cropping is done first, image by image, into a spool folder inside
the output (as large as the result, removed at the end): the crops of one image go to many shards.
"""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mcir.data.card import checksums, dataset_card, file_sha256
from mcir.data.decode import decode
from mcir.data.options import Options
from mcir.data.pairs import Pair, Pairs
from mcir.data.parquet import CHECKSUMS, checksum
from mcir.data.rows import Row
from mcir.errors import UserError

ROW_GROUP_BYTES = 16 * 2**20
"""A row group ends with the row that passes this: what a reader holds in memory at once, and its unit of work. Opening
one costs `datasets` about 2 ms, a tenth of the time of decoding the JPEGs in 4 MiB."""

_SPOOL = ".spool"
_STATE = ".pack.json"
_ENCODERS: dict[str, dict[str, Any]] = {"png": {}, "webp": {"lossless": True, "quality": 80, "exact": True}}


def pack(pairs: Pairs, output: Path, options: Options, num_workers: int = 1) -> list[Path]:
    """Write `pairs` as shards and a README.md (dataset card) into the folder `output`; the shards in order.

    A pack of the same samples and options that was interrupted is continued, and of a finished one the shards that are
    missing or damaged are written again. `num_workers` processes share the work (0 or 1: this one alone). Raises
    UserError: bad or unequal images (file named), something else in `output`.
    """
    options.check(pairs)
    if not pairs.samples:
        raise UserError("there is nothing to pack")
    output.mkdir(parents=True, exist_ok=True)
    state = _state(pairs, options)
    done = _claim(output, state)
    for name, sha256 in done.items():
        if (output / name).exists() and file_sha256(output / name) != sha256:
            (output / name).unlink()
    if done and all((output / name).exists() for name in done):
        shutil.rmtree(output / _SPOOL, ignore_errors=True)
        return [output / name for name in done]
    lean = replace(pairs, samples=())  # what every task needs; the samples themselves are many
    rows: list[tuple[Path, int] | Pair] = list(pairs.samples)
    files = [path for pair in pairs.samples for path in (pair.clean, pair.degraded) if path]
    if options.crop_size is not None:
        files = [output / _SPOOL / f"{i:07}.arrow" for i in range(len(pairs.samples))]
        files[0].parent.mkdir(exist_ok=True)
        crops = [partial(_spool, file, pair, lean, options) for file, pair in zip(files, pairs.samples, strict=True)]
        _run([crop for crop, file in zip(crops, files, strict=True) if not file.exists()], num_workers, "cropping")
        rows = [(file, row) for file in files for row in range(_spooled(file).num_rows)]
    num_shards = options.num_shards or -(-sum(file.stat().st_size for file in files) // options.shard_bytes)
    if num_shards > len(rows):
        raise UserError(f"{num_shards} shards for {len(rows)} rows: lower num_shards or raise shard_bytes")
    order = range(len(rows)) if options.seed is None else np.random.default_rng(options.seed).permutation(len(rows))
    schema = _schema(pairs.samples[0].degraded is not None or options.degradation is not None)
    shards = [output / f"{options.split}-{shard:05}-of-{num_shards:05}.parquet" for shard in range(num_shards)]
    tasks = []
    for shard, path in enumerate(shards):
        part = order[len(rows) * shard // num_shards : len(rows) * (shard + 1) // num_shards]
        if not path.exists():
            tasks.append(partial(_write_shard, path, [rows[i] for i in part], schema, lean, options))
    _run(tasks, num_workers, "packing")
    if not done:
        card = dataset_card(shards, pairs, options)
        _write(output / "README.md", card.encode())
        done = {name: sha256 for name, (_, _, sha256) in checksums(card).items()}
        _write(output / _STATE, json.dumps(state | {"shards": done}, indent=1).encode())
    shutil.rmtree(output / _SPOOL, ignore_errors=True)
    return shards


def crop_positions(side: int, size: int, step: int) -> list[int]:
    """Where crops begin along a side: every `step`, and one flush with the end. [0] where the side is not larger."""
    starts = list(range(0, side - size + 1, step)) or [0]
    if starts[-1] + size < side:
        starts.append(side - size)
    return starts


def _state(pairs: Pairs, options: Options) -> dict[str, Any]:
    digest = hashlib.sha256()
    for pair in pairs.samples:
        files = [path for path in (pair.clean, pair.degraded) if path]
        seen = [(file.name, file.stat()) for file in files]
        digest.update(repr((pair.key, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in seen])).encode())
    return {"samples": digest.hexdigest(), "options": repr((pairs.scale, pairs.centre_crop, options))}


def _claim(output: Path, state: dict[str, Any]) -> dict[str, str]:
    """Make sure that what lies in `output` is this pack, begun earlier, and clear what a kill left half written.

    The names and SHA-256 of its shards where it was complete.
    """
    path = output / _STATE
    if not path.exists():
        if any(not file.match(f"{_STATE}.*.part") for file in output.iterdir()):
            raise UserError(f"{output} is not empty; choose another folder")
        _write(path, json.dumps(state, indent=1).encode())
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove {output}, or choose another folder") from error
    for name, what in (("samples", "of other images, or they were changed since"), ("options", "with other options")):
        if before[name] != state[name]:
            raise UserError(f"{output} holds a pack {what}; choose another folder, or remove it")
    for left_over in output.rglob("*.part"):
        left_over.unlink()
    return before.get("shards", {})


def _write(path: Path, data: bytes | Callable[[Path], None]) -> None:
    """Write a file so that it is whole or absent, whatever happens meanwhile."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    if callable(data):
        data(part)
    else:
        part.write_bytes(data)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _run(tasks: Sequence[Callable[[], None]], num_workers: int, what: str) -> None:
    """Every task, in this process or several, with a progress bar. The first error ends them all."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(what, total=len(tasks))
        if num_workers <= 1 or len(tasks) <= 1:
            for task in tasks:
                task()
                progress.advance(bar)
            return
        server = multiprocessing.get_context("forkserver")  # importing torch once for all; fork alone is unsafe
        server.set_forkserver_preload(["mcir.data.pack"])
        with ProcessPoolExecutor(num_workers, server, initializer=_end_with_parent) as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
                    progress.advance(bar)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _end_with_parent() -> None:
    """A pool's workers outlive a killed parent and wait for ever: watch it."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# Samples: a row is a dictionary in the shards' columns.


def _row(key: str, clean: tuple[bytes, str], degraded: tuple[bytes, str] | None) -> dict[str, Any]:
    images = {"clean": clean} | ({"degraded": degraded} if degraded else {})
    return {name: {"bytes": data, "path": file} for name, (data, file) in images.items()} | {"key": key}


def _rows(pair: Pair, pairs: Pairs, options: Options) -> list[dict[str, Any]]:
    """A sample as one row, in its original bytes where nothing is cut off, or as one row for each crop."""
    files = [path for path in (pair.clean, pair.degraded) if path]
    try:
        original = [path.read_bytes() for path in files]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
    images = [decode(data, str(path)) for data, path in zip(original, files, strict=True)]
    whole = images[0].shape
    if len(images) == 2:
        images[0] = _fitting(images[0], images[1], pair, pairs)
    scale = options.scale(pairs)
    if options.degradation is not None:
        images[0] = images[0][:, : whole[1] // scale * scale, : whole[2] // scale * scale]
        rng = np.random.default_rng([options.seed or 0, zlib.crc32(pair.key.encode())])
        images.append(options.degradation(images[0], rng))
        files.append(pair.clean)
    if options.crop_size is None:
        encoded = [(data, path.name) for data, path in zip(original, files, strict=False)]
        if images[0].shape != whole:
            encoded[0] = _encode(images[0], pair.clean, pair.clean.stem, options.crop_format)
        if options.degradation is not None:
            encoded.append(_encode(images[1], pair.clean, pair.clean.stem, options.crop_format))
        return [_row(pair.key, encoded[0], encoded[1] if len(encoded) == 2 else None)]
    step = options.crop_step or options.crop_size
    height, width = (side // scale * scale for side in images[0].shape[-2:])
    corners = [
        (top, left)
        for top in crop_positions(height, options.crop_size, step)
        for left in crop_positions(width, options.crop_size, step)
    ]
    rows = []
    for number, (top, left) in enumerate(corners, start=1):
        crops = []
        for image, path, ratio in zip(images, files, (1, scale), strict=False):
            size = options.crop_size // ratio
            y, x, bottom, right = top // ratio, left // ratio, height // ratio, width // ratio
            crop = image[:, y : min(y + size, bottom), x : min(x + size, right)]
            crops.append(_encode(crop, path, f"{path.stem}_s{number:03}", options.crop_format))
        rows.append(_row(f"{pair.key}_s{number:03}", crops[0], crops[1] if len(crops) == 2 else None))
    return rows


def _fitting(clean: Tensor, degraded: Tensor, pair: Pair, pairs: Pairs) -> Tensor:
    """The part of `clean` that `degraded` shows: all of it, or its centre. UserError where the sizes do not fit."""
    sides, expected = clean.shape[-2:], degraded.shape[-2:]
    if [side // pairs.scale for side in sides] == list(expected):
        return clean
    if pairs.centre_crop and all(side >= wanted for side, wanted in zip(sides, expected, strict=True)):
        top, left = (round((side - wanted) / 2) for side, wanted in zip(sides, expected, strict=True))
        return clean[:, top : top + expected[0], left : left + expected[1]]
    raise UserError(
        f"{pair.clean} is {sides[0]} x {sides[1]} and {pair.degraded} {expected[0]} x {expected[1]}: "
        f"at scale {pairs.scale} it should be {sides[0] // pairs.scale} x {sides[1] // pairs.scale}"
    )


def _encode(image: Tensor, path: Path, stem: str, kind: str) -> tuple[bytes, str]:
    if image.dtype != torch.uint8:
        raise UserError(f"{path} has 16 bits a channel and cannot be cut losslessly; convert it to 8, or pack it whole")
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(stream, kind, **_ENCODERS[kind])
    return stream.getvalue(), f"{stem}.{kind}"


# Files


def _schema(paired: bool) -> pa.Schema:
    """Columns with the metadata from which `datasets` knows that they are images."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = ["clean", "degraded"] if paired else ["clean"]
    features = {name: {"_type": "Image"} for name in names} | {"key": {"dtype": "string", "_type": "Value"}}
    schema = pa.schema([*((name, image) for name in names), ("key", pa.string())])
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _spool(file: Path, pair: Pair, pairs: Pairs, options: Options) -> None:
    paired = pair.degraded is not None or options.degradation is not None
    table = pa.Table.from_pylist(_rows(pair, pairs, options), _schema(paired))

    def write(part: Path) -> None:
        with pa.ipc.new_file(part, table.schema) as writer:
            writer.write_table(table)

    _write(file, write)


def _spooled(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()  # maps, reads nothing yet


def _write_shard(
    path: Path, rows: Iterable[tuple[Path, int] | Pair], schema: pa.Schema, pairs: Pairs, options: Options
) -> None:
    def write(part: Path) -> None:
        # Images do not compress further; checksums find what a disk or a copy has changed.
        with pq.ParquetWriter(
            part, schema, compression="none", use_dictionary=False, write_statistics=["key"], write_page_checksum=True
        ) as writer:
            checksums = []
            for group in _row_groups(rows, schema, pairs, options):
                writer.write_table(pa.Table.from_pylist(group, schema))
                checksums.append(checksum(map(_undecoded, group)))
            writer.add_key_value_metadata({CHECKSUMS: json.dumps(checksums)})

    _write(path, write)


def _row_groups(
    rows: Iterable[tuple[Path, int] | Pair], schema: pa.Schema, pairs: Pairs, options: Options
) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        if isinstance(row, Pair):
            group += _rows(row, pairs, options)
        else:
            group += _spooled(row[0]).slice(row[1], 1).to_pylist()
        size += sum(len(group[-1][name]["bytes"]) for name in schema.names if name != "key")
        if size >= ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _undecoded(row: dict[str, Any]) -> Row:
    return Row(row["key"], row["clean"]["bytes"], row["degraded"]["bytes"] if "degraded" in row else None, where="")
