"""Where images come from: every format as a list of units of known length whose rows can be read from any row on.

The rows are undecoded: `clean` and `degraded` are the bytes of image files. Parquet, local or on the Hub, goes through
Hugging Face `datasets`, one row group a unit.
"""

import logging
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mcir.errors import UserError

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 16
FILES_IN_A_UNIT = 16
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Row:
    """One undecoded sample. `where` names it in messages."""

    key: str
    clean: bytes
    degraded: bytes | None
    where: str


@dataclass(frozen=True)
class Units:
    """`lengths[u]` rows in unit u; `rows(u, start)` yields them from row `start` on."""

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
            builder = load_dataset_builder(self.repo, revision=self.revision)
            files = [str(file) for file in (builder.config.data_files or {}).get(self.split, [])]
        except Exception as error:
            raise UserError(
                f"the Hub dataset {self.repo} cannot be opened ({error}); check name, network and HF_HUB_OFFLINE"
            ) from error
        if not files or not all(file.endswith(".parquet") for file in files):
            raise UserError(f"the Hub dataset {self.repo} has no Parquet files in split {self.split}")
        return _parquet(files, self.repo)


class FolderSource(Source):
    """Image folders. Pairs have the same path below both folders, up to the file name's suffix."""

    format: Literal["folders"]
    clean: str
    degraded: str | None = None

    def open(self) -> Units:
        clean = _images(self.clean)
        degraded = _images(self.degraded) if self.degraded else {}
        if self.degraded and clean.keys() != degraded.keys():
            odd = sorted(clean.keys() ^ degraded.keys())
            raise UserError(
                f"{len(odd)} images of {self.clean} and {self.degraded} have no partner, the first is {odd[0]}"
            )
        keys = list(clean)
        starts = range(0, len(keys), FILES_IN_A_UNIT)

        def rows(unit: int, start: int) -> Iterator[Row]:
            for key in keys[starts[unit] + start : starts[unit] + FILES_IN_A_UNIT]:
                other = degraded[key].read_bytes() if self.degraded else None
                yield Row(key, clean[key].read_bytes(), other, str(clean[key]))

        return Units(tuple(len(keys[s : s + FILES_IN_A_UNIT]) for s in starts), rows)


class TarSource(Source):
    """WebDataset tars on a local disk with members `KEY.clean.png` and, where paired, `KEY.degraded.png`."""

    format: Literal["tars"]
    path: str
    """A folder of *.tar files, one file, or a glob."""

    def open(self) -> Units:
        path = Path(self.path)
        files = sorted(path.glob("*.tar")) if path.is_dir() else sorted(path.parent.glob(path.name))
        if not files:
            raise UserError(f"no tar files at {self.path}")
        index = [_tar_index(file) for file in files]

        def rows(unit: int, start: int) -> Iterator[Row]:
            with files[unit].open("rb") as tar:

                def read(place: tuple[int, int] | None) -> bytes | None:
                    if place is None:
                        return None
                    tar.seek(place[0])
                    return tar.read(place[1])

                for key, members in list(index[unit].items())[start:]:
                    yield Row(
                        key, read(members["clean"]) or b"", read(members.get("degraded")), f"{files[unit]}, {key}"
                    )

        return Units(tuple(len(members) for members in index), rows)


AnySource = Annotated[ParquetSource | HubSource | FolderSource | TarSource, Field(discriminator="format")]


def _parquet(files: list[str], name: str) -> Units:
    import fsspec
    import pyarrow.parquet as pq
    from datasets import Image, load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    lengths: list[int] = []
    places: list[tuple[str, int]] = []  # file and first row of each row group
    columns: set[str] = set()
    for file in files:
        try:
            with fsspec.open(file, "rb") as handle:
                metadata = pq.read_metadata(handle)
        except Exception as error:
            raise UserError(f"{file} is not a readable Parquet file ({error}); pack the dataset again") from error
        columns |= set(metadata.schema.to_arrow_schema().names)
        first = 0
        for group in range(metadata.num_row_groups):
            rows_in_group = metadata.row_group(group).num_rows
            lengths.append(rows_in_group)
            places.append((file, first))
            first += rows_in_group
    missing = {"clean", "key"} - columns
    if missing:
        raise UserError(
            f"{name} has no column {', '.join(sorted(missing))} (it has {', '.join(sorted(columns))}); "
            "a dataset has `clean`, `key` and, where paired, `degraded`"
        )
    if not sum(lengths):
        raise UserError(f"{name} is empty")
    paired = "degraded" in columns
    dataset = load_dataset("parquet", data_files=files, split="train", streaming=True)
    dataset = dataset.select_columns(["key", "clean", *(["degraded"] if paired else [])])
    for column in ["clean", "degraded"] if paired else ["clean"]:
        dataset = dataset.cast_column(column, Image(decode=False))
    dataset = dataset.reshard()
    assert dataset.num_shards == len(lengths)

    def rows(unit: int, start: int) -> Iterator[Row]:
        file, first = places[unit]
        group = dataset.shard(num_shards=len(lengths), index=unit)
        seen = 0
        # .iter and not __iter__: the latter would divide the row group among DataLoader workers
        for batch in group.iter(batch_size=ROWS_AT_ONCE):
            for i in range(max(0, start - seen), len(batch["key"])):
                degraded = (batch["degraded"][i] or {}).get("bytes") if paired else None
                where = f"{file}, row {first + seen + i} (key {batch['key'][i]})"
                yield Row(str(batch["key"][i]), batch["clean"][i]["bytes"] or b"", degraded, where)
            seen += len(batch["key"])

    return Units(tuple(lengths), rows)


def _images(folder: str) -> dict[str, Path]:
    root = Path(folder)
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES) if root.is_dir() else []
    if not files:
        raise UserError(f"no images in {folder}")
    images = {str(file.relative_to(root).with_suffix("")): file for file in files}
    if len(images) < len(files):
        raise UserError(f"{folder} holds two images with one name (only their suffixes differ)")
    return images


def _tar_index(file: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """key -> part (`clean`, `degraded`) -> (offset, size)."""
    index: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                pieces = member.name.rsplit(".", 2)
                if member.isfile() and len(pieces) == 3 and pieces[1] in ("clean", "degraded"):
                    index.setdefault(pieces[0], {})[pieces[1]] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise UserError(f"{file} is not a readable tar file ({error})") from error
    alone = [key for key, parts in index.items() if "clean" not in parts]
    if alone or not index:
        raise UserError(f"{file}: {f'{alone[0]} has no .clean member' if alone else 'no KEY.clean.EXT members'}")
    return index
