"""Where images come from: every format as a list of units of known length whose rows can be read from any row on.

The rows are undecoded: `clean` and `degraded` are the bytes of image files. `open` reads what there is once (Parquet
footers, tar headers, folder listings) and every process of a rank works from that; a file is opened when one of its
units is read.

What cannot be opened (no files, a damaged footer, halves without a partner, a name twice) is an error at once, since
without it nobody knows how many rows there are. Later each row has one outcome, wherever reading began: the row, or a
UserError in its place. What cannot be read alone (a row group) is an error for all its rows.
"""

import re
import tarfile
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice, repeat
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from mcir.data.decode import decode, image_size
from mcir.data.encode import centre, encode
from mcir.data.files import IMAGE_SUFFIXES, LeftOut, files_at, is_left_over, why_left_out
from mcir.data.layouts import find_pairs
from mcir.data.pairs import Pair, Pairs, pair_folders
from mcir.data.parquet import NONE, Columns, open_parquet
from mcir.data.rows import Row, Units
from mcir.data.storage import urls_at
from mcir.errors import UserError
from mcir.section import PathText, Section, is_url

FILES_IN_A_UNIT = 16
_CONVERTED = "refs/convert/parquet"


class Source(Section, ABC):
    @abstractmethod
    def open(self, extra: Mapping[str, str] = NONE) -> Units:
        """Find the units; `extra` are further columns of images, each with the field that names it. UserError where
        nothing is found or a column is missing."""

    def open_at(self, place: str, extra: Mapping[str, str] = NONE) -> Units:
        """`open`, where errors begin with the field of the config, below `place`, whose value they are about."""
        try:
            return self.open(extra)
        except UserError as error:
            given = {name: value for name, value in self if name != "format" and value and str(value) in str(error)}
            field = max(given, key=lambda name: len(str(given[name])), default="")
            raise UserError(f"{place}.{field}: {error}" if field else f"{place}: {error}") from error


class ParquetSource(Source):
    """Parquet shards with columns `clean`, `key` and, where paired, `degraded`, as `mcir data pack` writes them, or
    others."""

    format: Literal["parquet"] = "parquet"
    path: PathText
    """A folder of *.parquet files, one file, or a glob; also of a store, such as s3://bucket/folder."""
    columns: Columns = Columns()

    def open(self, extra: Mapping[str, str] = NONE) -> Units:
        left_out = LeftOut()
        if is_url(self.path):
            files = [
                url for url in urls_at(self.path, ".parquet") if not is_left_over(PurePosixPath(urlsplit(url).path[1:]))
            ]
        else:
            files = [str(file) for file in files_at(self.path, ".parquet", left_out)]
        if not files:
            raise UserError(
                f"no Parquet files at {self.path}: give a folder of *.parquet files (`mcir data pack` makes them)"
            )
        return replace(open_parquet(files, self.path, self.columns, extra=extra), left_out=left_out)


class HubSource(Source):
    """A dataset repository of the Hugging Face Hub with Parquet files, streamed; HF_HUB_OFFLINE is respected."""

    format: Literal["hub"]
    repo: str
    """`owner/name`."""
    config: str | None = None
    """Its configuration (the Hub's word is subset), where it has several."""
    split: str = "train"
    revision: str | None = None
    """A branch, tag or commit. `refs/convert/parquet` holds the Hub's own Parquet copy of most datasets that are stored
    otherwise; its configuration is `default` where it has no name, and the split of the first part of a large one is
    `partial-train`."""
    columns: Columns = Columns()

    def open(self, extra: Mapping[str, str] = NONE) -> Units:
        from datasets import load_dataset_builder

        where: dict[str, Any] = {"name": self.config}
        if self.revision == _CONVERTED:  # which holds no card that says where they are
            where = {"data_files": {"train": f"{self.config or 'default'}/{self.split}/*.parquet"}}
        try:
            splits = load_dataset_builder(self.repo, revision=self.revision, **where).config.data_files or {}
        except Exception as error:
            raise self._unreachable(error) from error
        split = "train" if "data_files" in where else self.split
        if split not in splits:
            there = ", ".join(map(str, splits))
            raise UserError(f"the Hub dataset {self.repo} has no split {split}; it has {there}")
        files = [str(file) for file in splits[split]]
        if other := [file for file in files if not file.lower().endswith(".parquet")]:
            raise UserError(
                f"the Hub dataset {self.repo} is not stored as Parquet: split {self.split} has {other[0]}; "
                f"the Hub may hold a Parquet copy of it: revision: {_CONVERTED}"
            )
        try:
            return open_parquet(files, self.repo, self.columns, extra=extra)
        except ConnectionError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> UserError:
        said = " ".join(str(error).split())
        if found := re.search(
            r"Config name is missing. Please pick one among the available configs: (\[[^]]*\])", said
        ):
            return UserError(
                f"the Hub dataset {self.repo} has several configurations: give `config`, one of {found[1]}"
            )
        if found := re.search(r"BuilderConfig (\S+) not found. Available: (\[[^]]*\])", said):
            return UserError(f"the Hub dataset {self.repo} has no configuration {found[1]}; it has {found[2]}")
        if "scripts are no longer supported" in said:
            return UserError(
                f"the Hub dataset {self.repo} is a script, which is not run; the Hub may hold a Parquet copy of it: "
                f"revision: {_CONVERTED}"
            )
        return UserError(
            f"the Hub dataset {self.repo} cannot be opened ({said}); check name, network and HF_HUB_OFFLINE"
        )


class FolderSource(Source):
    """Image folders. Pairs have the same path below both folders up to the file name's suffix, or fit a pattern."""

    format: Literal["folders"]
    clean: PathText
    degraded: PathText | None = None
    pattern: str = "{key}"
    """Names of degraded images, where they differ from the clean ones: `{key}x4.png`; with `*`, such as `{key}_*`, many
    belong to one clean image."""
    clean_pattern: str = "{key}"
    """Names of clean images."""

    def open(self, extra: Mapping[str, str] = NONE) -> Units:
        _refuse(extra, self.format)
        degraded = Path(self.degraded) if self.degraded else None
        found = pair_folders(Path(self.clean), degraded, pattern=self.pattern, clean_pattern=self.clean_pattern)
        return _units(found)


class LayoutSource(Source):
    """A published dataset as it unpacks: what `mcir data pack --layout` packs."""

    format: Literal["layout"]
    layout: str
    """Its name, such as set5; a wrong one lists them all."""
    path: PathText
    """The folder where it was unpacked."""
    split: str | None = None
    """Where it has several."""
    scale: int | None = None
    """Of super-resolution sets; without one only their clean half is read."""

    def open(self, extra: Mapping[str, str] = NONE) -> Units:
        _refuse(extra, self.format)
        return _units(find_pairs(self.layout, Path(self.path), self.split, self.scale))


class TarSource(Source):
    """WebDataset tars on a local disk with members `KEY.clean.png` and, where paired, `KEY.degraded.png`; members that
    are no images (KEY.json) are left alone."""

    format: Literal["tars"]
    path: PathText
    """A folder of *.tar files, one file, or a glob."""

    def open(self, extra: Mapping[str, str] = NONE) -> Units:
        _refuse(extra, self.format)
        left_out = LeftOut()
        files = files_at(self.path, ".tar", left_out)
        if not files:
            raise UserError(f"no tar files at {self.path}")
        tars: list[_Tar] = []
        where: dict[str, Path] = {}
        for file in files:
            tars.append((file, list(_tar_members(file, left_out).items())))
            for key, _ in tars[-1][1]:
                if key in where:
                    raise UserError(f"{file} and {where[key]} both have the key {key}; rename or remove one")
                where[key] = file
        halves = {len(parts) for _, members in tars for _, parts in members}
        if len(halves) > 1:
            raise UserError(
                f"{self.path}: some keys have a .degraded member and others none; pack pairs or clean alone"
            )
        return Units(tuple(len(members) for _, members in tars), partial(_read_tar, tars), left_out)


def _refuse(extra: Mapping[str, str], kind: str) -> None:
    for column, field in extra.items():
        raise UserError(
            f"{field} names {column}, and a source of {kind} has clean and degraded "
            "images alone: make Parquet shards with this column (mcir data pack --column NAME=FOLDER)"
        )


AnySource = Annotated[
    ParquetSource | HubSource | FolderSource | LayoutSource | TarSource, Field(discriminator="format")
]


def _units(pairs: Pairs) -> Units:
    samples = pairs.samples
    lengths = tuple(len(samples[i : i + FILES_IN_A_UNIT]) for i in range(0, len(samples), FILES_IN_A_UNIT))
    return Units(lengths, partial(_read_files, samples, pairs.centre_crop), pairs.left_out)


def _read_files(pairs: tuple[Pair, ...], centre_crop: bool, unit: int, start: int) -> Iterator[Row | UserError]:
    for pair in pairs[unit * FILES_IN_A_UNIT + start : (unit + 1) * FILES_IN_A_UNIT]:
        try:
            degraded = pair.degraded.read_bytes() if pair.degraded else None
            clean = pair.clean.read_bytes()
            if centre_crop and degraded is not None:
                clean = _centre(clean, degraded, pair)
            row: Row | UserError = Row(pair.key, clean, degraded, str(pair.clean))
        except OSError as error:
            row = UserError(f"{error.filename} cannot be read: {error.strerror}")
        except UserError as error:
            row = error
        yield row


def _centre(clean: bytes, degraded: bytes, pair: Pair) -> bytes:
    """The part of the clean image that the degraded one shows."""
    height, width = image_size(degraded, str(pair.degraded))
    sides = image_size(clean, str(pair.clean))
    if sides == (height, width) or sides[0] < height or sides[1] < width:
        return clean
    return encode(centre(decode(clean, str(pair.clean)), height, width), "png")[0]


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


def _tar_members(file: Path, left_out: LeftOut) -> dict[str, dict[str, _Place]]:
    """key -> part (`clean`, `degraded`) -> where in the tar its image is."""
    index: dict[str, dict[str, _Place]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                if reason := why_left_out(PurePosixPath(member.name), IMAGE_SUFFIXES):
                    left_out.add(reason, f"{file}, {member.name}")
                    continue
                if not member.isfile() or member.issparse():
                    raise UserError(f"{file}: {member.name} is a link: use tar's --dereference --hard-dereference")
                key, part, *_ = *member.name.rsplit(".", 2)[:-1], ""
                key, part = unicodedata.normalize("NFC", key), part.lower()
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
