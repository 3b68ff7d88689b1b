"""Parquet: one row group a unit, checksums verified. What is on the Hub or in a store comes through Hugging Face
`datasets`, a file of this machine straight through pyarrow, in a tenth of the processor time.

Footers are read once, by the main process; a file is opened when one of its row groups is read."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from mcir.data import storage
from mcir.data.rows import Row, Units, checksum
from mcir.data.storage import RowGroups, first_line, is_of_the_network, retried, row_groups_of_urls
from mcir.errors import UserError
from mcir.section import Section, is_url

if TYPE_CHECKING:
    import pyarrow as pa

CHECKSUMS = b"mcir.crc32"
"""In a Parquet footer: a JSON list of the row groups' `checksum`s. Verifying Parquet's own, those of its pages, takes
15 times as long, a tenth of the time that decoding uncompressed images takes; that is done where these are missing."""


class Columns(Section):
    """Which columns hold what. An image is bytes, a struct of `bytes` and `path`, or the path of a file beside."""

    clean: str = "clean"
    degraded: str | None = "degraded"
    """Absent, or null, where degraded images are made on the fly."""
    key: str | None = "key"
    """Absent, or null, where rows are named after their file and number."""


COLUMNS = Columns()
NONE: Mapping[str, str] = MappingProxyType({})
EXTRA = "extra:"
"""Before the names of further columns, among the parts of a row."""


def open_parquet(
    files: list[str],
    name: str,
    columns: Columns = COLUMNS,
    faults: list[str] | None = None,
    extra: Mapping[str, str] = NONE,
) -> Units:
    """The row groups of `files`; `name` is what messages call them; `extra` are further columns of images, each
    with the field that names it.

    UserError: an unreadable footer, columns that are not there or hold no images, and, in local files, a key twice (of
    the Hub it would take a request for each row group to know). Where `faults` are given it goes there, and the rest of
    the files is read.
    """
    with ThreadPoolExecutor(16) as pool:  # on the Hub a footer is two round trips
        looked = list(pool.map(partial(_footer, name=name, columns=columns, extra=extra), files))
    found = [str(footer) for footer in looked if isinstance(footer, UserError)]
    footers = [footer for footer in looked if isinstance(footer, _Footer)]
    for footer in footers[1:]:
        if footer.stored != footers[0].stored:
            column = next(iter(footer.stored.items() ^ footers[0].stored.items()))[1]
            found.append(
                f"{footer.file} and {footers[0].file} differ in the column {column}; pack all of {name} in one go"
            )
    footers = [footer for footer in footers if footer.stored == footers[0].stored]
    found += _repeated_keys(footers)
    if faults is None and found:
        raise UserError(
            found[0] + f" (and {len(found) - 1} more faults; `mcir data inspect` lists them)" * (len(found) > 1)
        )
    if faults is not None:
        faults += found
    groups: list[_Group] = []
    for i, footer in enumerate(footers):
        first = 0
        for j, (length, value) in enumerate(zip(footer.lengths, footer.checksums, strict=True)):
            if length:
                groups.append(_Group(i, j, first, length, value if columns == COLUMNS else None))
            first += length
    if not groups and faults is not None:
        faults += [f"{name} is empty"] if footers else []
        return Units((), lambda unit, start: iter(()))
    if not groups:
        raise UserError(f"{name} is empty")
    files = [footer.file for footer in footers]
    stored = footers[0].stored
    wanted = [column for column in footers[0].columns if column in stored.values()]  # as stored: spares a copy
    pages = bool(extra) or any(group.checksum is None for group in groups)
    read = (row_groups_of_urls if is_url(files[0]) else _row_groups)(files, wanted, pages)
    lengths = tuple(group.length for group in groups)
    return Units(lengths, partial(_read_group, read, files, groups, stored))


@dataclass(frozen=True)
class _Group:
    """One row group: its file, its place in it, its first row there, how many there are, and what `checksum` gives."""

    file: int
    index: int
    first: int
    length: int
    checksum: int | None


@dataclass(frozen=True)
class _Footer:
    """What is known of a file before its images are read; lengths and checksums are those of its row groups."""

    file: str
    columns: list[str]
    stored: dict[str, str]
    """What of a row is there -> the column that holds it."""
    lengths: list[int]
    checksums: list[int | None]
    keys: list[str | None]
    """Of local files."""


def _footer(file: str, name: str, columns: Columns, extra: Mapping[str, str]) -> _Footer | UserError:
    import fsspec
    import pyarrow.parquet as pq

    def read() -> tuple[Any, list[str | None]]:
        with fsspec.open(file, "rb") as handle:
            metadata = pq.read_metadata(handle)
            if is_url(file) or columns.key not in metadata.schema.to_arrow_schema().names:
                return metadata, []
            return metadata, _keys(pq.read_table(handle, columns=[columns.key])[columns.key])

    try:
        metadata, keys = retried(read, file, storage.PAUSES_S if _is_of_a_store(file) else ())
        schema = metadata.schema.to_arrow_schema()
        checksums = json.loads((metadata.metadata or {}).get(CHECKSUMS, b"[]"))
        stored = _stored(schema, file, name, columns, extra)
    except UserError as error:
        return error
    except Exception as error:
        if _is_of_a_store(file) and is_of_the_network(error):
            return UserError(storage.sentence(file, error))
        if isinstance(error, ConnectionError):
            raise
        way_out = "check the network, or pack the dataset again" if is_url(file) else "pack the dataset again"
        return UserError(f"{file} is not a readable Parquet file ({first_line(error)}); {way_out}")
    lengths = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    known = isinstance(checksums, list) and len(checksums) == len(lengths)  # not where a copy was cut differently
    return _Footer(file, schema.names, stored, lengths, checksums if known else [None] * len(lengths), keys)


def _is_of_a_store(file: str) -> bool:
    """The Hub is none: `datasets` tries it again by itself, for some ten minutes."""
    return is_url(file) and not file.startswith("hf://")


def _stored(schema: "pa.Schema", file: str, name: str, columns: Columns, extra: Mapping[str, str]) -> dict[str, str]:
    """UserError: a column is not there, or holds no images."""
    there = {}
    for part, column in columns:
        if column in schema.names:
            there[part] = column
        elif column is not None and (part == "clean" or column != part):
            has = ", ".join(sorted(schema.names))
            raise UserError(
                f"{name} has no column {column} (it has {has}); a dataset has `clean`, `key` and, where paired, "
                "`degraded`, or says what they are called, such as columns: {clean: hr, degraded: lr, key: id}"
            )
    for column, field in extra.items():
        if column not in schema.names:
            has = ", ".join(sorted(schema.names))
            raise UserError(f"{name} has no column {column}, which {field} names (it has {has})")
        there[EXTRA + column] = column
    for part, column in there.items():
        if part != "key" and not _holds_images(schema.field(column).type):
            kind = str(schema.field(column).type).partition("<")[0]
            raise UserError(
                f"{file}: the column {column} is of type {kind} and holds no images: those are bytes or structs of "
                "`bytes` and `path`, as cast_column(…, Image()) of `datasets` makes"
            )
    return there


def _holds_images(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    flat = "binary", "large_binary", "binary_view", "string", "large_string", "string_view", "null"
    if not pa.types.is_struct(kind):
        return str(kind) in flat
    fields = [field for field in kind if field.name in ("bytes", "path")]
    return bool(fields) and all(str(field.type) in flat for field in fields)


def _repeated_keys(footers: Iterable[_Footer]) -> list[str]:
    seen: dict[str, str] = {}
    faults = []
    for footer in footers:
        for number, key in enumerate(footer.keys):
            where = f"{footer.file}, row {number}"
            if key is not None and seen.setdefault(key, where) is not where:
                faults.append(
                    f"{where} has the key {key}, as {seen[key]} has: a key names one sample; name another column, "
                    "columns: {key: …}, or null, which numbers the rows"
                )
    return faults


def _row_groups(files: list[str], columns: list[str], check_pages: bool) -> RowGroups:
    return partial(_row_group, files, columns, check_pages)


def _row_group(
    files: list[str], columns: list[str], check_pages: bool, file: int, index: int, length: int
) -> "pa.Table":
    import pyarrow.parquet as pq

    # no threads: worker processes are parallel enough
    with pq.ParquetFile(files[file], pre_buffer=False, page_checksum_verification=check_pages) as opened:
        return opened.read_row_group(index, columns, use_threads=False)


def _read_group(
    read: RowGroups, files: list[str], groups: list[_Group], stored: dict[str, str], unit: int, start: int
) -> Iterator[Row | UserError]:
    group = groups[unit]
    file = files[group.file]
    try:
        pauses_s = storage.PATIENT_S if _is_of_a_store(file) else ()
        table = retried(lambda: read(group.file, group.index, group.length), file, pauses_s)
        nothing: list[Any] = [None] * group.length
        columns = {part: _files(table[column]) for part, column in stored.items() if part != "key"}
        keys = _keys(table[stored["key"]]) if "key" in stored else nothing
        further = [part for part in columns if part.startswith(EXTRA)]
        images = zip(columns["clean"], columns.get("degraded", nothing), *map(columns.get, further), strict=True)
        names = [part.removeprefix(EXTRA) for part in further]
        if None in keys:
            name = os.path.relpath(file, os.path.commonpath([os.path.dirname(file) for file in files]))
        rows: Sequence[Row | UserError]
        rows = [
            _row(f"{name.removesuffix('.parquet')}-{number}" if key is None else key, image, names, file, number)
            for number, key, image in zip(count(group.first), keys, images, strict=False)
        ]
        if group.checksum is not None and checksum(row for row in rows if isinstance(row, Row)) != group.checksum:
            raise ValueError("its checksum is wrong")
    except Exception as error:  # the readers below raise OSError, ArrowInvalid, network errors...
        lost = f"rows {group.first} to {group.first + group.length - 1} (row group {group.index})"
        if isinstance(error, ConnectionError) or (is_url(file) and is_of_the_network(error)):
            what = "Hub" if file.startswith("hf://") else "store"
            way_out = f"the network or the {what} fails: start again later to continue"
        else:
            way_out = "the file was changed after it was packed, or the disk fails: copy or pack it again"
        rows = [UserError(f"{file}, {lost} cannot be read: {first_line(error)}; {way_out}")] * group.length
    yield from rows[start:]


_File = memoryview | str
"""An image file, or where it is."""


def _row(key: str, images: tuple[_File | None, ...], further: Sequence[str], file: str, number: int) -> Row | UserError:
    """`images`: clean, degraded, those of `further` columns."""
    where = f"{file}, row {number} (key {key})"
    if images[0] is None:
        return UserError(f"{where} has no clean image")
    for column, image in zip(further, images[2:], strict=True):
        if image is None:
            return UserError(f"{where} has no image in its column {column}")
    halves: list[Any] = [*images]
    for i, half in enumerate(halves):
        if isinstance(half, str):
            path = Path(file).parent / half
            if "://" in file or not path.is_file():
                there = "" if "://" in file else ", where no file is,"
                return UserError(f"{where} holds the path {half}{there} and no bytes; embed the images in the dataset")
            try:
                halves[i] = path.read_bytes()
            except OSError as error:
                return UserError(f"{where}: {path} cannot be read: {error.strerror}")
    return Row(key, halves[0], halves[1], where, dict(zip(further, halves[2:], strict=True)))


def _keys(column: "pa.ChunkedArray") -> list[str | None]:
    return [None if key is None else str(key) for key in column.to_pylist()]


def _files(column: "pa.ChunkedArray") -> list[_File | None]:
    """The image files of a column, which are not copied (but for types that Parquet does not know: its memory lives
    until the last of them is gone), or their paths."""
    import pyarrow as pa

    files: list[_File | None]
    if pa.types.is_struct(column.type):
        fields = dict(zip((field.name for field in column.type), column.flatten(), strict=True))
        files = _files(fields["bytes"]) if "bytes" in fields else [None] * len(column)
        if None in files and "path" in fields:
            paths = fields["path"].to_pylist()
            files = [path if file is None else file for file, path in zip(files, paths, strict=True)]
        return files
    if "string" in str(column.type):
        return column.to_pylist()
    if column.type not in (pa.binary(), pa.large_binary()):
        column = column.cast(pa.large_binary())
    files = []
    for chunk in column.chunks:
        if not len(chunk):
            continue
        _, offsets, images = chunk.buffers()
        images = memoryview(images or b"").cast("B")
        width = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
        ends = np.frombuffer(offsets, width, len(chunk) + 1, chunk.offset * width().itemsize).tolist()
        present = chunk.is_valid().to_pylist()
        files += [images[ends[i] : ends[i + 1]] if there else None for i, there in enumerate(present)]
    return files
