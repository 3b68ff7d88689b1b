"""Parquet, local or on the Hub, through Hugging Face `datasets`: one row group a unit, checksums verified.

Footers are read once, by the main process; a file is opened when one of its row groups is read."""

import atexit
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from glob import escape
from typing import TYPE_CHECKING

import numpy as np
from imagecodecs import zlibng_crc32

from mcir.data.rows import Row, Units
from mcir.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import IterableDataset

CHECKSUMS = b"mcir.crc32"
"""In a Parquet footer: a JSON list of the row groups' `checksum`s. Verifying Parquet's own, those of its pages, takes
15 times as long, a tenth of the time that decoding uncompressed images takes; that is done where these are missing."""


def checksum(rows: Iterable[Row]) -> int:
    """CRC-32 of the keys and images, one after the other."""
    value = 0
    for row in rows:
        for data in (row.key.encode(), row.clean, row.degraded or b""):
            value = zlibng_crc32(data, value)  # type: ignore[arg-type]  # any buffer
    return value


def open_parquet(files: list[str], name: str) -> Units:
    """The row groups of `files`; `name` is what messages call them. UserError: an unreadable footer, other columns."""
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar
    from pyarrow.dataset import ParquetFragmentScanOptions

    with ThreadPoolExecutor(16) as pool:  # on the Hub a footer is two round trips
        footers = list(pool.map(_footer, files))
    columns = set(footers[0][0])
    for file, (names, _, _) in zip(files, footers, strict=True):
        if missing := {"clean", "key"} - set(names):
            raise UserError(
                f"{name} has no column {', '.join(sorted(missing))} (it has {', '.join(sorted(names))}); "
                "a dataset has `clean`, `key` and, where paired, `degraded`"
            )
        if ("degraded" in names) != ("degraded" in columns):
            raise UserError(f"{file} and {files[0]} differ in the column degraded; pack all of {name} in one go")
    groups: list[_Group] = []
    for i, (_, lengths, checksums) in enumerate(footers):
        first = 0
        for j, (length, value) in enumerate(zip(lengths, checksums, strict=True)):
            if length:
                groups.append(_Group(i, j, first, length, value))
            first += length
    if not groups:
        raise UserError(f"{name} is empty")
    disable_progress_bar()
    dataset = load_dataset(
        "parquet",
        data_files=[escape(file) for file in files],  # `datasets` takes names for patterns
        split="train",
        streaming=True,
        storage_options={"hf": {"block_size": 2**16}},  # what is read ahead; 5 MiB would be a third of a row group
        columns=[name for name in footers[0][0] if name in ("key", "clean", "degraded")],  # as stored: spares a copy
        fragment_scan_options=ParquetFragmentScanOptions(
            page_checksum_verification=any(group.checksum is None for group in groups)
        ),
    ).with_format("arrow")  # which leaves the images encoded
    assert dataset.num_shards == len(files)
    return Units(tuple(group.length for group in groups), partial(_read_group, dataset, files, groups))


@dataclass(frozen=True)
class _Group:
    """One row group: its file, its place in it, its first row there, how many there are, and what `checksum` gives."""

    file: int
    index: int
    first: int
    length: int
    checksum: int | None


def _footer(file: str) -> tuple[list[str], list[int], list[int | None]]:
    """Columns, lengths and checksums of the row groups of a Parquet file."""
    import fsspec
    import pyarrow.parquet as pq

    try:
        with fsspec.open(file, "rb") as handle:
            metadata = pq.read_metadata(handle)
        checksums = json.loads((metadata.metadata or {}).get(CHECKSUMS, b"[]"))
    except Exception as error:
        way_out = "check the network, or pack the dataset again" if "://" in file else "pack the dataset again"
        raise UserError(f"{file} is not a readable Parquet file ({error}); {way_out}") from error
    lengths = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    known = isinstance(checksums, list) and len(checksums) == len(lengths)  # not where a copy was cut differently
    return metadata.schema.to_arrow_schema().names, lengths, checksums if known else [None] * len(lengths)


@lru_cache(maxsize=512)
def _row_groups(dataset: "IterableDataset", file: int) -> "IterableDataset":
    """One file of the dataset with a row group a shard. Resharding opens the files: not all of them in all workers."""
    return dataset.shard(num_shards=dataset.num_shards, index=file).reshard()


@lru_cache(maxsize=1)
def _let_arrow_finish() -> None:
    """Arrow's threads let go of Python's files a little after the last row is out. Where Python has ended by then they
    abort the process, or hang it: apache/arrow#34314, #50482."""
    atexit.register(time.sleep, 0.1)


def _read_group(
    dataset: "IterableDataset", files: list[str], groups: list[_Group], unit: int, start: int
) -> Iterator[Row | UserError]:
    group = groups[unit]
    file = files[group.file]
    _let_arrow_finish()
    try:
        shard = _row_groups(dataset, group.file)
        shard = shard.shard(num_shards=shard.num_shards, index=group.index)
        # .iter and not __iter__: the latter would divide the row group among DataLoader workers
        (table,) = shard.iter(batch_size=group.length)
        columns = zip(table["key"].to_pylist(), _bytes(table, "clean"), _bytes(table, "degraded"), strict=True)
        read = [
            Row(str(key), clean or b"", degraded, f"{file}, row {number} (key {key})")
            for number, (key, clean, degraded) in enumerate(columns, group.first)
        ]
        if group.checksum is not None and checksum(read) != group.checksum:
            raise ValueError("its checksum is wrong")
        rows: Sequence[Row | UserError] = read
    except Exception as error:  # the readers below raise OSError, ArrowInvalid, network errors...
        lost = f"rows {group.first} to {group.first + group.length - 1} (row group {group.index})"
        if isinstance(error, ConnectionError):  # after some ten minutes of trying again
            way_out = "the network or the Hub fails: start again later to continue"
        else:
            way_out = "the file was changed after it was packed, or the disk fails: copy or pack it again"
        rows = [UserError(f"{file}, {lost} cannot be read: {_first_line(error)}; {way_out}")] * group.length
    yield from rows[start:]


def _bytes(table: "pa.Table", column: str) -> list[memoryview | None]:
    """The image files of a column, which are not copied: its memory lives until the last of them is gone."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column not in table.column_names:
        return [None] * len(table)
    files: list[memoryview | None] = []
    for chunk in pc.struct_field(table[column], "bytes").chunks:
        _, offsets, images = chunk.buffers()
        images = memoryview(images or b"").cast("B")
        width = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
        ends = np.frombuffer(offsets, width, len(chunk) + 1, chunk.offset * width().itemsize).tolist()
        present = chunk.is_valid().to_pylist()
        files += [images[ends[i] : ends[i + 1]] if there else None for i, there in enumerate(present)]
    return files


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
