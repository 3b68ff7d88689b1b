"""Parquet shards of an object store, a real S3 server: the same as on a disk, over a wire that fails."""

from hashlib import sha1
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcir.data import storage
from mcir.data.loader import Loader
from mcir.data.sources import ParquetSource
from mcir.data.stream import DataConfig
from mcir.errors import UserError
from mcir.evaluation.sets import open_sets
from tests import s3
from tests.data.test_sources import expected_rows
from tests.runs import write_dataset


@pytest.fixture(scope="module")
def wire():
    with s3.serve() as wire:
        yield wire


@pytest.fixture
def store(wire, monkeypatch):
    from s3fs import S3FileSystem

    monkeypatch.setattr(storage, "PAUSES_S", (0.01, 0.01))
    monkeypatch.setattr(storage, "PATIENT_S", (0.01, 0.01))
    wire.num_cuts, wire.pause_s, wire.down = 0, 0.0, False
    return S3FileSystem()


def rows(path: str) -> list[Any]:
    return [
        str(row) if isinstance(row, UserError) else (row.key, sha1(row.clean).hexdigest())
        for row in ParquetSource(path=path).open()
    ]


def batches(path: str, num_workers: int) -> list[Any]:
    source = {"source": {"format": "parquet", "path": path}, "degradation": {"name": "bicubic", "scale": 2}}
    values = {"train": [source], "crop_size": 16, "num_workers": num_workers}
    loader = Loader(DataConfig.model_validate(values), scale=2, batch_size=6, seed=0)
    return [(batch.key, sha1(batch.clean.numpy()).hexdigest()) for batch in islice(loader, 7)]


def test_shards_of_a_store_are_the_same_as_on_a_disk(store, wire, tmp_path):
    """Also in workers, which must not share connections, and over a wire that is cut now and then."""
    folder = write_dataset(tmp_path / "data", num_rows=24, num_shards=3, side=96)
    store.put(str(folder), "bucket/same", recursive=True)
    store.pipe("bucket/same/._00000.parquet", b"left over")
    expected = [(key, sha1(clean).hexdigest()) for key, clean, _ in expected_rows(folder)]
    assert rows("s3://bucket/same") == rows("s3://bucket/same/0*.parquet") == expected
    assert rows("s3://bucket/same/00001.parquet") == expected[8:16]
    wire.num_cuts = 3
    assert rows("s3://bucket/same") == expected
    assert wire.num_cuts == 0
    wire.num_cuts, wire.pause_s = 2, 0.02
    assert batches("s3://bucket/same", 2) == batches(str(folder), 0)
    assert wire.num_cuts == 0


def test_a_store_that_falls_silent_is_asked_again(store, wire, tmp_path, monkeypatch):
    """In the middle of a file; s3fs waits for 15 s by default."""
    monkeypatch.setattr("s3fs.S3FileSystem.read_timeout", 1)
    type(store).clear_instance_cache()
    folder = write_dataset(tmp_path / "data", num_rows=8, num_shards=1, side=96)
    store.put(str(folder), "bucket/silent", recursive=True)
    wire.num_stalls = 2
    assert rows("s3://bucket/silent") == [(key, sha1(clean).hexdigest()) for key, clean, _ in expected_rows(folder)]
    assert wire.num_stalls == 0


def test_little_more_than_what_is_read_is_fetched(store, wire, tmp_path):
    rng = np.random.default_rng(0)
    pictures = [{"bytes": rng.bytes(2**20), "path": None} for _ in range(24)]
    file = tmp_path / "train.parquet"
    table = pa.table({"key": [str(i) for i in range(24)], "clean": pictures})
    pq.write_table(table, file, row_group_size=4, compression="none")
    store.put_file(str(file), "bucket/big/train.parquet")
    before = wire.num_bytes
    units = ParquetSource(path="s3://bucket/big").open()
    assert sum(len(list(units.rows(unit, 0))) for unit in (5, 1, 3, 0, 2, 4)) == 24
    assert 1 < (wire.num_bytes - before) / Path(file).stat().st_size < 1.1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/nothing", "no Parquet files at s3://bucket/nothing"),
        ("s3://elsewhere/data", r"^s3://elsewhere/data: is not there$"),
        ("gs://bucket/data", r"^gs://bucket/data: Please install gcsfs"),
        ("abc://bucket/data", "Protocol not known: abc"),
    ],
)
def test_what_is_not_there(store, path, message):
    with pytest.raises(UserError, match=message):
        ParquetSource(path=path).open()


def test_a_store_that_goes_away(store, wire, tmp_path, monkeypatch):
    store.put(str(write_dataset(tmp_path / "data", num_rows=8, num_shards=2)), "bucket/away", recursive=True)
    units = ParquetSource(path="s3://bucket/away").open()
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    monkeypatch.setattr(storage, "PATIENT_S", (0.01,))
    wire.down = True
    failed = [str(row) for row in units.rows(1, 0)]
    assert len(failed) == 4
    assert failed[0].startswith("s3://bucket/away/00001.parquet, rows 0 to 3 (row group 0) cannot be read: ")
    assert failed[0].endswith("the network or the store fails: start again later to continue")
    with pytest.raises(UserError, match=r"^s3://bucket/away: the network or the store fails \(.*\); check the address"):
        ParquetSource(path="s3://bucket/away").open()


def test_a_damaged_shard_is_not_asked_for_again(store, tmp_path, caplog):
    file = write_dataset(tmp_path / "data", num_rows=8, num_shards=1, side=96) / "00000.parquet"
    first = pq.read_metadata(file).row_group(0).column(1)
    data = bytearray(file.read_bytes())
    data[first.data_page_offset : first.data_page_offset + 40] = bytes(40)  # the page's header
    store.pipe_file("bucket/damaged/00000.parquet", bytes(data))
    units = ParquetSource(path="s3://bucket/damaged").open()
    assert "cannot be read" in str(next(units.rows(0, 0)))
    assert str(next(units.rows(0, 0))).endswith("copy or pack it again")
    assert len([row for row in units.rows(1, 0) if not isinstance(row, UserError)]) == 4
    assert "trying again" not in caplog.text


def test_a_set_to_measure_on(store, tmp_path):
    store.put(str(write_dataset(tmp_path / "data", num_rows=3, num_shards=1)), "bucket/set3", recursive=True)
    sets = open_sets(["s3://bucket/set3", "other=s3://bucket/set3/00000.parquet"], scale=2)
    assert {name: test.num_images for name, test in sets.items()} == {"set3": 3, "other": 3}
