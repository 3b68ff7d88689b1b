"""Parquet that others wrote: read where the meaning is clear, otherwise one true sentence, the same from `inspect`."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mcir.data.inspect import inspect_packed
from mcir.data.parquet import Columns
from mcir.data.sources import ParquetSource
from mcir.errors import UserError
from tests.runs import png

IMAGES = [png(np.full((4, 6, 3), value, np.uint8)) for value in (1, 2, 3)]


def write(file, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    views = "view" in str(table.schema)  # which pyarrow does not cut
    pq.write_table(table, file, row_group_size=None if views else 2)
    return file


def rows(file, **columns):
    return list(ParquetSource(path=str(file), columns=Columns(**columns)).open())


def structs(images, kind, path=pa.string()):  # noqa: B008
    values = [{"bytes": image, "path": None} for image in images]
    return pa.array(values, pa.struct({"bytes": kind, "path": path}))


@pytest.mark.parametrize(
    "column",
    [
        pa.array(IMAGES, pa.binary()),
        pa.array(IMAGES, pa.large_binary()),
        pa.array(IMAGES, pa.binary_view()),
        structs(IMAGES, pa.binary_view(), pa.string_view()),
        structs(IMAGES, pa.large_binary(), pa.large_string()),
        pa.StructArray.from_arrays([pa.array(IMAGES)], ["bytes"]),
    ],
    ids=lambda column: str(column.type),
)
def test_bytes_of_every_type_are_read(tmp_path, column):
    file = write(tmp_path / "a.parquet", clean=column, degraded=column, key=list("abc"))
    assert [(row.key, bytes(row.clean), bytes(row.degraded)) for row in rows(file)] == [
        (key, image, image) for key, image in zip("abc", IMAGES, strict=True)
    ]
    report = inspect_packed(tmp_path)
    assert (report.faults, report.num_samples, report.scales) == ([], 3, {1: 3})


@pytest.mark.parametrize("kind", ["struct", "string"])
def test_paths_are_followed_from_the_file(tmp_path, kind):
    for i, image in enumerate(IMAGES):
        (tmp_path / f"{i}.png").write_bytes(image)
    paths = ["0.png", str(tmp_path / "1.png"), "2.png"]
    column = paths if kind == "string" else [{"bytes": None, "path": path} for path in paths]
    write(tmp_path / "a.parquet", clean=column, key=list("abc"))
    assert [row.clean for row in rows(tmp_path)] == IMAGES
    assert inspect_packed(tmp_path).faults == []
    (tmp_path / "1.png").unlink()
    said = f"{tmp_path}/a.parquet, row 1 (key b) holds the path {tmp_path}/1.png, where no file is, and no bytes; embed"
    with pytest.raises(UserError) as caught:
        rows(tmp_path)
    assert str(caught.value).startswith(said)
    assert [fault.startswith(said) for fault in inspect_packed(tmp_path).faults] == [True]


def test_rows_without_a_key_are_named_after_file_and_number(tmp_path):
    for name in ("train/0", "test/0"):
        write(
            tmp_path / f"{name}.parquet",
            clean=pa.array(IMAGES),
            key=pa.array(["a", None, None]) if "t/" in name else [1, 2, 3],
        )
    assert [row.key for row in rows(tmp_path)] == ["a", "test/0-1", "test/0-2", "1", "2", "3"]
    assert [row.key for row in rows(tmp_path / "train", key=None)] == ["0-0", "0-1", "0-2"]
    assert inspect_packed(tmp_path).faults == []


def test_a_key_twice_is_told_by_both(tmp_path):
    write(tmp_path / "0.parquet", clean=pa.array(IMAGES), key=list("aba"))
    said = f"{tmp_path}/0.parquet, row 2 has the key a, as {tmp_path}/0.parquet, row 0 has: a key names one sample"
    with pytest.raises(UserError) as caught:
        rows(tmp_path)
    assert str(caught.value).startswith(said)
    assert [fault.startswith(said) for fault in inspect_packed(tmp_path).faults] == [True]
    write(tmp_path / "0.parquet", clean=pa.array(IMAGES), key=list("abc"))
    write(tmp_path / "1.parquet", clean=pa.array(IMAGES), key=list("dec"))
    with pytest.raises(UserError, match=r"1\.parquet, row 2 has the key c, as .*0\.parquet, row 2 has"):
        rows(tmp_path)
    assert len(inspect_packed(tmp_path).faults) == 1
    assert len(rows(tmp_path, key=None)) == 6


def test_columns_have_other_names(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "small.png")
    small = [(tmp_path / "small.png").read_bytes()] * 3
    write(tmp_path / "a.parquet", hr=pa.array(IMAGES), lr=pa.array(small), image_id=[1, 2, 3], caption=["", "", ""])
    columns = {"clean": "hr", "degraded": "lr", "key": "image_id"}
    assert [(row.key, row.clean, row.degraded) for row in rows(tmp_path, **columns)] == [
        (str(i + 1), image, small[0]) for i, image in enumerate(IMAGES)
    ]
    assert inspect_packed(tmp_path, Columns(**columns)).scales == {2: 3}
    with pytest.raises(UserError, match=r"no column clean \(it has caption, hr, image_id, lr\)"):
        rows(tmp_path)
    with pytest.raises(UserError, match="no column gt"):
        rows(tmp_path, clean="hr", degraded="gt")


@pytest.mark.parametrize(
    ("column", "kind"),
    [([1, 2, 3], "int64"), ([[b"a"]] * 3, "list"), ([{"data": b"a"}] * 3, "struct"), ([{"bytes": 1}] * 3, "struct")],
)
def test_what_holds_no_images_is_named(tmp_path, column, kind):
    write(tmp_path / "a.parquet", clean=pa.array(column), key=list("abc"))
    said = f"{tmp_path}/a.parquet: the column clean is of type {kind} and holds no images"
    with pytest.raises(UserError, match=said):
        rows(tmp_path)
    assert [fault.startswith(said) for fault in inspect_packed(tmp_path).faults] == [True]


def test_a_missing_image_is_one_row(tmp_path):
    write(tmp_path / "a.parquet", clean=pa.array([IMAGES[0], None, IMAGES[2]]), key=list("abc"))
    units = ParquetSource(path=str(tmp_path)).open()
    read = [row for unit in range(len(units.lengths)) for row in units.rows(unit, 0)]
    assert [isinstance(row, UserError) for row in read] == [False, True, False]
    assert str(read[1]) == f"{tmp_path}/a.parquet, row 1 (key b) has no clean image"
    assert inspect_packed(tmp_path).faults == [str(read[1])]
