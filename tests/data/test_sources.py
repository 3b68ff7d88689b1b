"""Every kind of source: its exact rows from any row on, and one clear sentence where it cannot be read."""

import io
import json
import os
import tarfile
import zlib
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcir.data.loader import Loader
from mcir.data.rows import Row
from mcir.data.sources import FILES_IN_A_UNIT, FolderSource, ParquetSource, Source, TarSource
from mcir.data.stream import DataConfig
from mcir.errors import UserError
from tests.runs import write_dataset


def expected_rows(folder: Path) -> list[tuple[str, bytes, bytes | None]]:
    """(key, clean, degraded), read with pyarrow alone."""
    rows = [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return [(row["key"], row["clean"]["bytes"], row.get("degraded", {}).get("bytes")) for row in rows]


def unpack(folder: Path, root: Path) -> Path:
    """The rows of a dataset as two folders of pictures, some below a subfolder."""
    for key, clean, degraded in expected_rows(folder):
        for name, data in (("clean", clean), ("degraded", degraded)):
            if data:
                path = root / name / ("night" if int(key) % 2 else ".") / f"{key}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    return root


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def plain(row: Row) -> tuple[str, bytes, bytes | None]:
    return row.key, row.clean, row.degraded


def outcome(row: Row | UserError) -> tuple[str, bytes, bytes | None] | str:
    return str(row) if isinstance(row, UserError) else plain(row)


@pytest.fixture(scope="module", params=[None, 2], ids=["clean", "pairs"])
def dataset(request, tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("parquet"), num_rows=21, num_shards=3, scale=request.param)


def tars_of(folder: Path, root: Path) -> Path:
    rows = expected_rows(folder)
    for shard in range(3):
        members = {"notes.json": b"{}"}  # what is no image is left alone
        for key, clean, degraded in rows[shard * 7 : shard * 7 + 7]:
            members[f"{key}.clean.png"] = clean
            members |= {f"{key}.degraded.png": degraded} if degraded else {}
        tar(root / f"{shard}.tar", members)
    return root


@pytest.mark.parametrize("kind", ["parquet", "folders", "tars"])
def test_every_source_gives_the_exact_rows_from_any_row_on(kind, dataset, tmp_path):
    expected = expected_rows(dataset)
    paired = expected[0][2] is not None
    source: Source
    if kind == "folders":
        root = unpack(dataset, tmp_path)
        source = FolderSource(
            format="folders", clean=str(root / "clean"), degraded=str(root / "degraded") if paired else None
        )
        named = {key: ("night/" if int(key) % 2 else "") + key for key, _, _ in expected}
        expected = sorted((named[key], clean, degraded) for key, clean, degraded in expected)
    elif kind == "tars":
        source = TarSource(format="tars", path=str(tars_of(dataset, tmp_path)))
    else:
        source = ParquetSource(path=str(dataset))
    units = source.open()
    assert list(map(plain, units)) == expected
    first = 0
    for unit, length in enumerate(units.lengths):
        for start in range(length + 1):
            assert list(map(plain, units.rows(unit, start))) == expected[first + start : first + length]
        first += length
    assert first == len(expected)
    if kind == "parquet":
        assert units.lengths == (4, 3) * 3  # one row group a unit
    if kind == "folders":
        assert units.lengths == (FILES_IN_A_UNIT, 5)


@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary()])
def test_images_are_views_of_the_column_and_some_may_be_missing(binary, tmp_path):
    image = pa.struct({"bytes": binary, "path": pa.string()})
    files = [b"one", b"", b"seven..", None, None, b"four"]
    images = [{"bytes": file, "path": None} for file in files]
    images[4] = None
    columns = {"key": list("abcdef"), "clean": [{"bytes": b"c" * 5, "path": None}] * 6, "degraded": images}
    schema = pa.schema({"key": pa.string(), "clean": image, "degraded": image})
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns, schema), file, row_group_size=4)
    rows = list(ParquetSource(path=str(file)).open())
    assert [row.degraded for row in rows] == files
    addresses = [np.frombuffer(row.clean, np.uint8).ctypes.data for row in rows]
    for group in (addresses[:4], addresses[4:]):
        assert set(np.diff(group).tolist()) == {5}


@pytest.mark.parametrize("kind", ["folders", "tars"])
def test_a_run_resumes_inside_a_unit(kind, dataset, tmp_path):
    expected = {key: clean for key, clean, _ in expected_rows(dataset)}
    if kind == "folders":
        source = {"format": "folders", "clean": str(unpack(dataset, tmp_path) / "clean")}
    else:
        source = {"format": "tars", "path": str(tars_of(dataset, tmp_path))}
    paired = expected_rows(dataset)[0][2] is not None
    if kind == "folders" and paired:
        source["degraded"] = str(tmp_path / "degraded")
    train = {"source": source, "degradation": None if paired else {"name": "bicubic", "scale": 2}}
    data = DataConfig.model_validate({"train": [train], "crop_size": 16, "num_workers": 0, "shuffle_buffer": 4})

    def keys(position: int, count: int) -> list[str]:
        loader = Loader(data, scale=2, batch_size=1, seed=0)
        loader.position = position
        batches = iter(loader)
        return [next(batches).key[0] for _ in range(count)]

    whole = keys(0, 42)
    for stop in (1, 5, 20, 21, 30):
        assert keys(stop, 42 - stop) == whole[stop:]
    for epoch in (whole[:21], whole[21:]):
        assert Counter(key.removeprefix("night/") for key in epoch) == Counter(expected.keys())


def test_folders_that_do_not_pair(dataset, tmp_path):
    root = unpack(dataset, tmp_path)
    if not (root / "degraded").exists():
        pytest.skip("clean images only")

    def opened() -> Any:
        return FolderSource(format="folders", clean=str(root / "clean"), degraded=str(root / "degraded")).open()

    (root / "degraded" / "000.png").rename(root / "degraded" / "other.png")
    with pytest.raises(UserError, match=r"without their clean half in .*clean: other\.png"):
        opened()
    (root / "degraded" / "other.png").unlink()
    with pytest.raises(UserError, match=r"without a degraded half in .*degraded: 000\.png"):
        opened()
    (root / "degraded" / "000.png").write_bytes(b"x")
    (root / "clean" / "002.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"two images of one name: .*002\.jpg and .*002\.png"):
        opened()
    with pytest.raises(UserError, match="nowhere is not a folder"):
        FolderSource(format="folders", clean=str(root / "nowhere")).open()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.clean.png": b"x", "b.degraded.png": b"x"}, "b has no .clean member"),
        ({"a.clean.png": b"x", "a.degraded.png": b"x", "b.clean.png": b"x"}, "some keys have a .degraded member"),
        ({"a.clean.png": b"x", "a.clean.jpg": b"x"}, "a.clean twice"),
        ({"a.clean.png": b"x", "b.png": b"x"}, "b.png is called neither KEY.clean.EXT nor KEY.degraded.EXT"),
        ({"a.json": b"x"}, "no KEY.clean.EXT members"),
    ],
)
def test_tars_whose_members_do_not_pair(members, message, tmp_path):
    with pytest.raises(UserError, match=message):
        TarSource(format="tars", path=str(tar(tmp_path / "a.tar", members))).open()


def test_tars_that_repeat_a_key_or_are_none(tmp_path):
    for name in ("1.tar", "2.tar"):
        tar(tmp_path / name, {"a.clean.png": b"x"})
    with pytest.raises(UserError, match=r"2\.tar and .*1\.tar both have the key a"):
        TarSource(format="tars", path=str(tmp_path)).open()
    (tmp_path / "1.tar").write_bytes(b"garbage" * 100)
    with pytest.raises(UserError, match=r"1\.tar is not a readable tar file"):
        TarSource(format="tars", path=str(tmp_path)).open()
    with pytest.raises(UserError, match="no tar files"):
        TarSource(format="tars", path=str(tmp_path / "nowhere")).open()


@pytest.mark.parametrize("listed", ["[1, 2]", "7", '{"a": 1}'])
def test_checksums_that_are_not_of_these_row_groups(listed, tmp_path):
    """As where a shard was written again in other row groups: its pages are verified instead."""
    (file,) = with_checksums(tmp_path, num_rows=12, packed=False)
    table = pq.read_table(file).replace_schema_metadata({"mcir.crc32": listed})
    pq.write_table(table, file, row_group_size=4, compression="none", use_dictionary=False, write_page_checksum=True)
    assert len(list(ParquetSource(path=str(file)).open())) == 12
    flip_a_byte(file, group=1)
    with pytest.raises(UserError, match=r"row group 1\) cannot be read: .*checksum"):
        list(ParquetSource(path=str(file)).open())


def test_an_empty_row_group_is_no_unit(tmp_path):
    (file,) = with_checksums(tmp_path, num_rows=4)
    table = pq.read_table(file)
    with pq.ParquetWriter(file, table.schema) as writer:
        for part in (table.slice(0, 0), table, table.slice(0, 0)):
            writer.write_table(part)
    units = ParquetSource(path=str(file)).open()
    assert units.lengths == (4,)
    assert [row.key for row in units] == ["000", "001", "002", "003"]


def test_shards_that_differ_in_their_columns(tmp_path):
    write_dataset(tmp_path, num_rows=4, num_shards=1)
    paired = write_dataset(tmp_path / "pairs", num_rows=4, num_shards=1, scale=2)
    (paired / "00000.parquet").rename(tmp_path / "00001.parquet")
    with pytest.raises(UserError, match=r"00001\.parquet and .*00000\.parquet differ in the column degraded"):
        ParquetSource(path=str(tmp_path)).open()


def with_checksums(folder: Path, num_rows: int = 24, num_shards: int = 1, packed: bool = True) -> list[Path]:
    """Shards of row groups of 4: with a checksum for each in the footer as `mcir data pack` writes them, or otherwise
    with those of Parquet's pages alone."""
    write_dataset(folder, num_rows, num_shards)
    files = sorted(folder.glob("*.parquet"))
    for file in files:
        table = pq.read_table(file)
        with pq.ParquetWriter(
            file, table.schema, compression="none", use_dictionary=False, write_page_checksum=not packed
        ) as writer:
            writer.write_table(table, row_group_size=4)
            rows = [row["key"].encode() + row["clean"]["bytes"] for row in table.to_pylist()]
            if packed:
                groups = [zlib.crc32(b"".join(rows[i : i + 4])) for i in range(0, len(rows), 4)]
                writer.add_key_value_metadata({"mcir.crc32": json.dumps(groups)})
    return files


def flip_a_byte(file: Path, group: int) -> None:
    """Change one byte in the middle of the images of a row group."""
    column = pq.read_metadata(file).row_group(group).column(1)
    assert column.path_in_schema == "clean.bytes"
    data = bytearray(file.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["folders", "tars", "parquet"])
def test_what_cannot_be_read_is_the_same_wherever_reading_begins(kind, tmp_path):
    """A run that resumes behind a bad row gets what it would have got."""
    folder = write_dataset(tmp_path / "parquet", num_rows=21, num_shards=3)
    if kind == "folders":
        clean = unpack(folder, tmp_path) / "clean"
        units = FolderSource(format="folders", clean=str(clean)).open()
        (clean / "004.png").unlink()  # the third of unit 0
        lost = {2}
    elif kind == "tars":
        units = TarSource(format="tars", path=str(tars_of(folder, tmp_path / "tars"))).open()
        (tmp_path / "tars" / "1.tar").unlink()
        lost = set(range(7, 14))
    else:
        units = ParquetSource(path=str(folder)).open()
        (folder / "00002.parquet").unlink()
        lost = set(range(14, 21))
    whole = [[outcome(row) for row in units.rows(unit, 0)] for unit in range(len(units.lengths))]
    assert [len(rows) for rows in whole] == list(units.lengths)
    assert {i for i, row in enumerate(chain(*whole)) if isinstance(row, str)} == lost
    for unit, rows in enumerate(whole):
        for start in range(len(rows) + 1):
            assert [outcome(row) for row in units.rows(unit, start)] == rows[start:]
    with pytest.raises(UserError, match="cannot be read"):
        list(units)


@pytest.mark.parametrize("name", ["runs[1]", "a*b?", "{c,d}", "h#i%20j k"])
def test_a_path_is_not_a_pattern(name, tmp_path):
    """`runs[1]` as a pattern is the folder runs1."""
    folder = write_dataset(tmp_path / name, num_rows=4, num_shards=1)
    write_dataset(tmp_path / "runs1", num_rows=4, num_shards=1, side=16)
    assert list(map(plain, ParquetSource(path=str(folder)).open())) == expected_rows(folder)


def test_files_behind_links_to_folders_take_part(tmp_path):
    folder = write_dataset(tmp_path / "here" / "a", num_rows=4, num_shards=1)
    clean = unpack(folder, tmp_path / "elsewhere") / "clean"
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "parquet").symlink_to(folder)
    (tmp_path / "all" / "pictures").symlink_to(clean)
    assert sum(ParquetSource(path=str(tmp_path / "all")).open().lengths) == 4
    assert sum(FolderSource(format="folders", clean=str(tmp_path / "all")).open().lengths) == 4
    (clean / "back").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="back is a link to a folder above it"):
        FolderSource(format="folders", clean=str(tmp_path / "all")).open()


def test_names_that_lead_nowhere_or_are_no_text(tmp_path):
    (tmp_path / "a.png").symlink_to("nothing")
    with pytest.raises(UserError, match=r"a\.png leads to no file"):
        FolderSource(format="folders", clean=str(tmp_path)).open()
    (tmp_path / "a.png").unlink()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(b"")
    with pytest.raises(UserError, match=r"not UTF-8, b'\\xff\.png'"):
        FolderSource(format="folders", clean=str(tmp_path)).open()


@pytest.mark.parametrize("damage", ["header", "in a header", "between members", "two in one"])
def test_a_tar_that_ends_too_early_is_an_error(damage, tmp_path):
    file = tar(tmp_path / "a.tar", {f"{i}.clean.png": b"." * 700 for i in range(8)})
    with tarfile.open(file) as archive:
        third = archive.getmembers()[3].offset
    data = bytearray(file.read_bytes())
    if damage == "header":
        data[third] ^= 1
    end = {"in a header": third + 100, "between members": third}.get(damage)
    file.write_bytes(data[:end] + (data if damage == "two in one" else b""))
    with pytest.raises(UserError, match=r"a\.tar is cut off or damaged at byte \d+, or several tars in one"):
        TarSource(format="tars", path=str(file)).open()


def test_links_in_a_tar_are_refused(tmp_path):
    (tmp_path / "0.clean.png").write_bytes(b"one")
    (tmp_path / "1.clean.png").hardlink_to(tmp_path / "0.clean.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(2):
            archive.add(tmp_path / f"{i}.clean.png", f"{i}.clean.png")
    with pytest.raises(UserError, match=r"1\.clean\.png is a link"):
        TarSource(format="tars", path=str(tmp_path / "a.tar")).open()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_flipped_byte_names_file_and_rows(num_workers, packed, tmp_path):
    (file,) = with_checksums(tmp_path, packed=packed)
    flip_a_byte(file, group=3)
    keys: list[str] = []
    with pytest.raises(UserError) as caught:
        keys.extend(key for batch in loader(tmp_path, "fail", num_workers, batch_size=2) for key in batch.key)
    assert f"{file}, rows 12 to 15 (row group 3) cannot be read" in str(caught.value)
    assert "checksum" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not {"012", "013", "014", "015"} & set(keys)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_an_unreadable_unit_counts_each_of_its_rows_and_loses_no_other(num_workers, tmp_path):
    files = with_checksums(tmp_path, num_shards=2)
    flip_a_byte(files[0], group=2)  # rows 8 to 11
    made = loader(tmp_path, "skip", num_workers)
    batches = iter(made)
    for epoch in (1, 2):
        keys = [key for _ in range(2) for key in next(batches).key]
        assert sorted(keys) == [f"{i:03d}" for i in range(24) if i not in range(8, 12)]
        assert made.num_skipped == 4 * epoch
        assert made.position == 24 * epoch


def test_a_shard_that_vanishes_in_the_middle_of_an_epoch(tmp_path):
    files = with_checksums(tmp_path, num_shards=4)
    batches = iter(loader(tmp_path, "fail", batch_size=1))
    next(batches)
    for file in files:
        file.unlink()
    with pytest.raises(UserError, match=r"\.parquet, rows \d+ to \d+ \(row group \d\) cannot be read"):
        list(islice(batches, 24))


def loader(folder: Path, on_error: str, num_workers: int = 0, batch_size: int = 12) -> Loader:
    source = {"format": "parquet", "path": str(folder)}
    data = DataConfig.model_validate(
        {
            "train": [{"source": source, "degradation": {"name": "bicubic", "scale": 2}}],
            "crop_size": 16,
            "num_workers": num_workers,
            "shuffle_buffer": 8,
            "on_error": on_error,
        }
    )
    return Loader(data, scale=2, batch_size=batch_size, seed=0)
