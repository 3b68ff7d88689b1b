"""Where images come from: every format as a list of units of known length whose rows can be read from any row on.

The rows are undecoded: `clean` and `degraded` are the bytes of image files. Parquet, local or on the Hub, goes through
Hugging Face `datasets`, one row group a unit, checksums verified. `open` reads what there is once (footers, tar
headers, folder listings) and every process of a rank works from that; a file is opened when one of its units is read.

What cannot be opened (no files, a damaged footer, halves without a partner, a name twice) is an error at once, since
without it nobody knows how many rows there are. Later each row has one outcome, wherever reading began: the row, or a
UserError in its place. What cannot be read alone (a row group) is an error for all its rows.
"""

import atexit
import json
import tarfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from glob import escape
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from imagecodecs import zlibng_crc32
from pydantic import BaseModel, ConfigDict, Field

from mcir.data.layouts import IMAGE_SUFFIXES, Pair, files_below, pair_folders
from mcir.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import IterableDataset

FILES_IN_A_UNIT = 16
CHECKSUMS = b"mcir.crc32"
"""In a Parquet footer: a JSON list of the row groups' `checksum`s. Verifying Parquet's own, those of its pages, takes
15 times as long, a tenth of the time that decoding uncompressed images takes; that is done where these are missing."""


@dataclass(frozen=True)
class Row:
    """One undecoded sample. `where` names it in messages."""

    key: str
    clean: bytes | memoryview
    degraded: bytes | memoryview | None
    where: str


def checksum(rows: Iterable[Row]) -> int:
    """CRC-32 of the keys and images, one after the other."""
    value = 0
    for row in rows:
        for data in (row.key.encode(), row.clean, row.degraded or b""):
            value = zlibng_crc32(data, value)  # type: ignore[arg-type]  # any buffer
    return value


@dataclass(frozen=True)
class Units:
    """`lengths[u]` rows in unit u; `rows(u, start)` yields them from row `start` on, in place of an unreadable one an
    error. Worker processes get a copy."""

    lengths: tuple[int, ...]
    rows: Callable[[int, int], Iterator[Row | UserError]]

    def __iter__(self) -> Iterator[Row]:
        """All rows. UserError at the first that cannot be read."""
        for unit in range(len(self.lengths)):
            for row in self.rows(unit, 0):
                if isinstance(row, UserError):
                    raise row
                yield row


class Source(BaseModel, ABC):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @abstractmethod
    def open(self) -> Units:
        """Find the units. UserError where nothing is found or a column is missing."""


class ParquetSource(Source):
    """Parquet shards as `mcir data pack` writes them: columns `clean`, `key` and, where paired, `degraded`."""

    format: Literal["parquet"] = "parquet"
    path: str
    """A folder of *.parquet files, one file, or a glob."""

    def open(self) -> Units:
        path = Path(self.path)
        if path.is_dir():
            files = [str(file) for file in files_below(path, [".parquet"])]
        else:
            files = sorted(str(file) for file in Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        if not files:
            raise UserError(
                f"no Parquet files at {self.path}: give a folder of *.parquet files (`mcir data pack` makes them)"
            )
        return _parquet(files, self.path)


class HubSource(Source):
    """A dataset repository of the Hugging Face Hub with Parquet files, streamed; HF_HUB_OFFLINE is respected."""

    format: Literal["hub"]
    repo: str
    """`owner/name`."""
    split: str = "train"
    revision: str | None = None

    def open(self) -> Units:
        from datasets import load_dataset_builder

        try:
            splits = load_dataset_builder(self.repo, revision=self.revision).config.data_files or {}
        except Exception as error:
            raise self._unreachable(error) from error
        if self.split not in splits:
            there = ", ".join(map(str, splits))
            raise UserError(f"the Hub dataset {self.repo} has no split {self.split}; it has {there}")
        files = [str(file) for file in splits[self.split]]
        if other := [file for file in files if not file.endswith(".parquet")]:
            raise UserError(f"the Hub dataset {self.repo} is not stored as Parquet: split {self.split} has {other[0]}")
        try:
            return _parquet(files, self.repo)
        except ConnectionError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> UserError:
        return UserError(
            f"the Hub dataset {self.repo} cannot be opened ({error}); check name, network and HF_HUB_OFFLINE"
        )


class FolderSource(Source):
    """Image folders. Pairs have the same path below both folders, up to the file name's suffix."""

    format: Literal["folders"]
    clean: str
    degraded: str | None = None

    def open(self) -> Units:
        pairs = pair_folders(Path(self.clean), Path(self.degraded) if self.degraded else None).samples
        lengths = tuple(len(pairs[i : i + FILES_IN_A_UNIT]) for i in range(0, len(pairs), FILES_IN_A_UNIT))
        return Units(lengths, partial(_read_files, pairs))


class TarSource(Source):
    """WebDataset tars on a local disk with members `KEY.clean.png` and, where paired, `KEY.degraded.png`; members that
    are no images (KEY.json) are left alone."""

    format: Literal["tars"]
    path: str
    """A folder of *.tar files, one file, or a glob."""

    def open(self) -> Units:
        path = Path(self.path)
        files = sorted(path.glob("*.tar")) if path.is_dir() else sorted(path.parent.glob(path.name))
        if not files:
            raise UserError(f"no tar files at {self.path}")
        tars: list[_Tar] = []
        where: dict[str, Path] = {}
        for file in files:
            tars.append((file, list(_tar_members(file).items())))
            for key, _ in tars[-1][1]:
                if key in where:
                    raise UserError(f"{file} and {where[key]} both have the key {key}; rename or remove one")
                where[key] = file
        halves = {len(parts) for _, members in tars for _, parts in members}
        if len(halves) > 1:
            raise UserError(
                f"{self.path}: some keys have a .degraded member and others none; pack pairs or clean alone"
            )
        return Units(tuple(len(members) for _, members in tars), partial(_read_tar, tars))


AnySource = Annotated[ParquetSource | HubSource | FolderSource | TarSource, Field(discriminator="format")]


def _parquet(files: list[str], name: str) -> Units:
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


def _read_files(pairs: tuple[Pair, ...], unit: int, start: int) -> Iterator[Row | UserError]:
    for pair in pairs[unit * FILES_IN_A_UNIT + start : (unit + 1) * FILES_IN_A_UNIT]:
        try:
            degraded = pair.degraded.read_bytes() if pair.degraded else None
            row: Row | UserError = Row(pair.key, pair.clean.read_bytes(), degraded, str(pair.clean))
        except OSError as error:
            row = UserError(f"{error.filename} cannot be read: {error.strerror}")
        yield row


_Place = tuple[int, int]  # offset and size of a member in its tar
_Tar = tuple[Path, list[tuple[str, dict[str, _Place]]]]  # the file, and for each key the places of clean and degraded


def _read_tar(tars: list[_Tar], unit: int, start: int) -> Iterator[Row | UserError]:
    file, members = tars[unit]
    try:
        tar = file.open("rb")
    except OSError as error:
        yield from repeat(UserError(f"{file} cannot be read: {error.strerror}"), len(members) - start)
        return
    with tar:
        for key, parts in islice(members, start, None):
            halves = {}
            try:
                for part, (offset, size) in parts.items():
                    tar.seek(offset)
                    halves[part] = tar.read(size)
                row: Row | UserError = Row(key, halves["clean"], halves.get("degraded"), f"{file}, {key}")
            except OSError as error:
                row = UserError(f"{file}, {key} cannot be read: {error.strerror}")
            yield row


def _tar_members(file: Path) -> dict[str, dict[str, _Place]]:
    """key -> part (`clean`, `degraded`) -> where in the tar its image is."""
    index: dict[str, dict[str, _Place]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if member.isdir() or Path(member.name).suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                if not member.isfile() or member.issparse():
                    raise UserError(f"{file}: {member.name} is a link: use tar's --dereference --hard-dereference")
                key, part, *_ = *member.name.rsplit(".", 2)[:-1], ""
                if part not in ("clean", "degraded"):
                    raise UserError(f"{file}: {member.name} is called neither KEY.clean.EXT nor KEY.degraded.EXT")
                if part in index.setdefault(key, {}):
                    raise UserError(f"{file} has {key}.{part} twice; remove one")
                index[key][part] = (member.offset_data, member.size)
            end = tar.offset
        _require_end(file, end)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{file} is not a readable tar file ({error})") from error
    alone = [key for key, parts in index.items() if "clean" not in parts]
    if alone or not index:
        raise UserError(f"{file}: {f'{alone[0]} has no .clean member' if alone else 'no KEY.clean.EXT members'}")
    return index


def _require_end(file: Path, end: int) -> None:
    """tarfile takes a header it cannot read for the archive's end, which is zeros up to the file's end."""
    with file.open("rb") as tar:
        tar.seek(end)
        rest = tar.read(tarfile.BLOCKSIZE)
        whole = bool(rest)
        while whole and rest:
            whole, rest = not any(rest), tar.read(2**20)
    if not whole:
        raise UserError(f"{file} is cut off or damaged at byte {end}, or several tars in one: copy or pack it again")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
