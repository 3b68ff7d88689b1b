import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from mcir.data.inspect import contact_sheet, inspect_packed, inspect_pairs
from mcir.data.layouts import find_pairs
from mcir.data.options import Options
from mcir.data.pack import pack
from mcir.data.pairs import pair_folders
from mcir.errors import UserError


def save(path, height, width, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def folders(tmp_path):
    for i in range(6):
        save(tmp_path / f"clean/{i}.png", 32, 40 + 4 * (i // 5), i)
        save(tmp_path / f"degraded/{i}.png", 16, 20 + 2 * (i // 5), i)
    return tmp_path


def packed(folders):
    pack(pair_folders(folders / "clean", folders / "degraded", 2), folders / "out", Options(num_shards=3))
    return folders / "out"


def test_a_good_dataset_is_counted_and_has_no_faults(folders):
    for report in (
        inspect_packed(packed(folders)),
        inspect_pairs(pair_folders(folders / "clean", folders / "degraded", 2)),
    ):
        assert report.faults == []
        assert (report.num_samples, report.num_paired) == (6, 6)
        assert report.clean_sizes == {(32, 40): 5, (32, 44): 1}
        assert report.scales == {2: 6}
        assert report.num_bytes == sum(p.stat().st_size for p in folders.glob("*/*.png"))
        assert len(report.examples) == 12
        console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        report.print(console)
        text = console.export_text()
        assert "6 (6 pairs)" in text
        assert "32 x 40 (5 of 6)" in text
    assert len(inspect_packed(folders / "out", num_examples=2).examples) == 4


def test_all_faults_are_listed_and_the_rest_is_still_counted(folders):
    shard = sorted(packed(folders).glob("*.parquet"))[1]
    rows = pq.read_table(shard).to_pylist()
    schema = pq.read_schema(shard)
    rows[0]["clean"]["bytes"] = rows[0]["clean"]["bytes"][:500]
    rows[1]["degraded"] = rows[1]["clean"]
    rows.append(rows[1] | {"degraded": None})
    pq.write_table(pa.Table.from_pylist(rows, schema), shard)
    report = inspect_packed(folders / "out")
    assert report.num_samples == 7
    faults = "\n".join(report.faults)
    assert f"{shard}: its checksum is not the card's" in faults
    assert f"{shard}, row 0 (key {rows[0]['key']}), clean: the PNG image is truncated" in faults
    assert "the pairs have several scales: 1, 2" in faults
    assert f"{shard}, row 2 has the key {rows[1]['key']}, as {shard}, row 1 has" in faults
    assert f"row 2 (key {rows[1]['key']}), degraded: the image is missing" in faults
    assert len(report.faults) == 5


def test_unreadable_and_missing_shards_are_faults(folders):
    first, second, third = sorted(packed(folders).glob("*.parquet"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-9])
    data = bytearray(third.read_bytes())
    data[len(data) // 3] ^= 0xFF  # inside an image: the page's checksum finds it
    third.write_bytes(data)
    report = inspect_packed(folders / "out")
    faults = "\n".join(report.faults)
    assert f"{first}: listed in the card, but not there" in faults
    assert f"{second} is not a readable Parquet file" in faults
    assert f"{third}: its checksum is not the card's" in faults
    assert f"{third}, rows 0 to 1 (row group 0) cannot be read: its checksum is wrong" in faults
    assert (report.num_samples, len(report.faults)) == (2, 5)


def test_pairs_on_disk_that_do_not_fit(folders):
    save(folders / "degraded/3.png", 16, 19)
    report = inspect_pairs(pair_folders(folders / "clean", folders / "degraded", 2))
    assert report.faults == [
        f"{folders / 'degraded/3.png'}: sizes do not fit at scale 2: clean 32 x 40, degraded 16 x 19"
    ]
    assert report.scales == {2: 5}
    assert len(inspect_pairs(pair_folders(folders / "clean", folders / "degraded", 1)).faults) == 6


def test_a_bad_file_of_a_pair_is_named(folders):
    (folders / "clean/1.png").write_bytes(b"")
    (folders / "degraded/2.png").write_bytes(b"")
    faults = inspect_pairs(pair_folders(folders / "clean", folders / "degraded", 2)).faults
    assert [fault.partition(":")[0] for fault in faults] == [
        str(folders / "clean/1.png"),
        str(folders / "degraded/2.png"),
    ]


def test_a_subset_of_a_published_dataset_is_no_fault(tmp_path):
    save(tmp_path / "clear/1.png", 48, 64)
    save(tmp_path / "hazy/1_1_0.9.png", 46, 62)
    report = inspect_pairs(find_pairs("reside-its", tmp_path))
    assert report.faults == []
    assert report.note == "RESIDE ITS: published with 13,990, found 1"
    assert report.scales == {1: 1}


def test_every_missing_half_and_bad_file_is_listed_in_one_look(folders):
    for i in range(1, 6):
        (folders / f"degraded/{i}.png").unlink()
    save(folders / "degraded/x.png", 16, 20)
    (folders / "clean/0.png").write_bytes(b"")
    (folders / "degraded/0.png").write_bytes(b"x")
    save(folders / "clean/.trash/9.png", 8, 8)
    faults = []
    pairs = pair_folders(folders / "clean", folders / "degraded", 2, faults=faults)
    report = inspect_pairs(pairs, faults)
    for i in range(1, 6):
        assert f"clean images without a degraded half in {folders / 'degraded'}: {i}.png" in "\n".join(report.faults)
    assert f"degraded images without their clean half in {folders / 'clean'}: x.png" in report.faults
    assert sum(str(folders / half / "0.png") in fault for half in ("clean", "degraded") for fault in report.faults) == 2
    assert len(report.faults) == 8
    assert report.left_out.lines() == [f"1 hidden, or left over by a file manager ({folders}/clean/.trash/9.png)"]


def test_nothing_to_inspect(tmp_path):
    with pytest.raises(UserError, match="holds no Parquet files"):
        inspect_packed(tmp_path)


def test_the_contact_sheet_shows_every_image_at_its_place():
    tiles = [(str(i), torch.full((3, 64, 64), value)) for i, value in enumerate([0.0, 0.25, 0.5, 0.75, 1.0])]
    tiles.append(("tiny", torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8).expand(3, 2, 2)))
    sheet = np.array(contact_sheet(tiles, columns=3, side=64))
    assert sheet.shape == (2 * 80, 3 * 64, 3)
    centres = [sheet[16 + 32 + 80 * (i // 3), 32 + 64 * (i % 3), 0] for i in range(5)]
    assert centres == [0, 64, 128, 191, 255]
    assert sheet[96:160, 128:192, 0].reshape(2, 32, 2, 32).max((1, 3)).tolist() == [[0, 255], [255, 0]]  # whole pixels
    wide = np.array(contact_sheet([("wide", torch.zeros(3, 100, 400))], columns=1, side=64))
    assert (wide[16:32, :64] == 0).all()
    assert (wide[33:] == 255).all()
