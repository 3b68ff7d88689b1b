"""Where images come from: every format as a list of units of known length whose rows can be read from any row on.

The rows are undecoded: `clean` and `degraded` are the bytes of image files. In Parquet a row group is a unit, and page
checksums are verified; Hugging Face `datasets` finds the files on the Hub and opens them, there with retries (its own
iteration costs a millisecond a row group, and reads the footer each time). `open` reads what there is once (footers,
tar headers, folder listings) and every process of a rank works from that; a file is opened when one of its units is
read.

What cannot be opened (no files, a damaged footer, halves without a partner, a name twice) is an error at once, since
without it nobody knows how many rows there are. A unit that turns out unreadable later raises UserError from its first
unreadable row on.
"""

import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mcir.data.layouts import IMAGE_SUFFIXES, Pair, pair_folders
from mcir.errors import UserError

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData

ROWS_AT_ONCE = 16
FILES_IN_A_UNIT = 16


@dataclass(frozen=True)
class Row:
    """One undecoded sample. `where` names it in messages."""

    key: str
    clean: bytes
    degraded: bytes | None
    where: str


@dataclass(frozen=True)
class Units:
    """`lengths[u]` rows in unit u; `rows(u, start)` yields them from row `start` on. Worker processes get a copy."""

    lengths: tuple[int, ...]
    rows: Callable[[int, int], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        for unit in range(len(self.lengths)):
            yield from self.rows(unit, 0)


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
            files = sorted(str(file) for file in path.glob("**/*.parquet"))
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
            raise UserError(
                f"the Hub dataset {self.repo} cannot be opened ({error}); check name, network and HF_HUB_OFFLINE"
            ) from error
        if self.split not in splits:
            raise UserError(f"the Hub dataset {self.repo} has no split {self.split}; it has {', '.join(splits)}")
        files = [str(file) for file in splits[self.split]]
        if other := [file for file in files if not file.endswith(".parquet")]:
            raise UserError(f"the Hub dataset {self.repo} is not stored as Parquet: split {self.split} has {other[0]}")
        return _parquet(files, self.repo)


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
    with ThreadPoolExecutor(16) as pool:  # on the Hub a footer is two round trips
        footers = list(pool.map(_footer, files))
    names = [footer.schema.to_arrow_schema().names for footer in footers]
    columns = ["key", "clean", *({"degraded"} & set(names[0]))]
    for file, has in zip(files, names, strict=True):
        if missing := {"clean", "key"} - set(has):
            raise UserError(
                f"{name} has no column {', '.join(sorted(missing))} (it has {', '.join(sorted(has))}); "
                "a dataset has `clean`, `key` and, where paired, `degraded`"
            )
        if ("degraded" in has) != ("degraded" in columns):
            raise UserError(f"{file} and {files[0]} differ in the column degraded; pack all of {name} in one go")
    groups: list[_Group] = []
    for file, footer in zip(files, footers, strict=True):
        first = 0
        for i in range(footer.num_row_groups):
            groups.append(_Group(file, footer, i, first, footer.row_group(i).num_rows))
            first += groups[-1].length
    if not sum(group.length for group in groups):
        raise UserError(f"{name} is empty")
    return Units(tuple(group.length for group in groups), partial(_read_group, columns, groups))


@dataclass(frozen=True)
class _Group:
    """One row group: its file and the file's footer, its place in it, its first row there and how many there are."""

    file: str
    footer: "FileMetaData"
    index: int
    first: int
    length: int


def _footer(file: str) -> "FileMetaData":
    import pyarrow.parquet as pq
    from datasets.utils.file_utils import xopen

    try:
        with xopen(file, "rb") as handle:
            return pq.read_metadata(handle)
    except Exception as error:
        raise UserError(f"{file} is not a readable Parquet file ({error}); pack the dataset again") from error


def _read_group(columns: list[str], groups: list[_Group], unit: int, start: int) -> Iterator[Row]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from datasets.utils.file_utils import xopen

    group = groups[unit]
    number = group.first + start
    try:
        # Opened anew for each group: a run may have more shards than a process may have open files. The footer is not
        # read again, which on the Hub is two round trips.
        with xopen(group.file, "rb") as handle:
            reader = pq.ParquetFile(handle, metadata=group.footer, pre_buffer=True, page_checksum_verification=True)
            for table in reader.iter_batches(ROWS_AT_ONCE, [group.index], columns, use_threads=False):
                keys = table["key"].slice(start).to_pylist()
                images = [pc.struct_field(table[name].slice(start), "bytes").to_pylist() for name in columns[1:]]
                for key, clean, *degraded in zip(keys, *images, strict=True):
                    where = f"{group.file}, row {number} (key {key})"
                    yield Row(str(key), clean or b"", degraded[0] if degraded else None, where)
                    number += 1
                start = max(0, start - len(table))
    except Exception as error:  # the readers below raise OSError, ArrowInvalid, network errors...
        rows = f"rows {group.first} to {group.first + group.length - 1} (row group {group.index})"
        raise UserError(
            f"{group.file}, {rows} cannot be read: {_first_line(error)}; the file was changed after it was packed, "
            "or the disk fails: copy or pack it again"
        ) from error


def _read_files(pairs: tuple[Pair, ...], unit: int, start: int) -> Iterator[Row]:
    for pair in pairs[unit * FILES_IN_A_UNIT + start : (unit + 1) * FILES_IN_A_UNIT]:
        try:
            degraded = pair.degraded.read_bytes() if pair.degraded else None
            yield Row(pair.key, pair.clean.read_bytes(), degraded, str(pair.clean))
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


_Place = tuple[int, int]  # offset and size of a member in its tar
_Tar = tuple[Path, list[tuple[str, dict[str, _Place]]]]  # the file, and for each key the places of clean and degraded


def _read_tar(tars: list[_Tar], unit: int, start: int) -> Iterator[Row]:
    file, members = tars[unit]
    try:
        with file.open("rb") as tar:
            for key, parts in islice(members, start, None):
                halves = {}
                for part, (offset, size) in parts.items():
                    tar.seek(offset)
                    halves[part] = tar.read(size)
                yield Row(key, halves["clean"], halves.get("degraded"), f"{file}, {key}")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


def _tar_members(file: Path) -> dict[str, dict[str, _Place]]:
    """key -> part (`clean`, `degraded`) -> where in the tar its image is."""
    index: dict[str, dict[str, _Place]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if not member.isfile() or Path(member.name).suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                key, part, *_ = *member.name.rsplit(".", 2)[:-1], ""
                if part not in ("clean", "degraded"):
                    raise UserError(f"{file}: {member.name} is called neither KEY.clean.EXT nor KEY.degraded.EXT")
                if part in index.setdefault(key, {}):
                    raise UserError(f"{file} has {key}.{part} twice; remove one")
                index[key][part] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{file} is not a readable tar file ({error})") from error
    alone = [key for key, parts in index.items() if "clean" not in parts]
    if alone or not index:
        raise UserError(f"{file}: {f'{alone[0]} has no .clean member' if alone else 'no KEY.clean.EXT members'}")
    return index


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
