import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from torchvision.transforms.functional import center_crop

from mcir.data import pack as pack_module
from mcir.data.card import checksums
from mcir.data.decode import decode
from mcir.data.degrade import Bicubic, Haze
from mcir.data.encode import encode
from mcir.data.layouts import find_pairs
from mcir.data.options import Options
from mcir.data.pack import pack
from mcir.data.pairs import Pair, Pairs, pair_folders, with_columns
from mcir.data.parquet import open_parquet
from mcir.data.resize import imresize
from mcir.data.spool import crop_positions
from mcir.errors import UserError
from tests.distributed.launch import python_path


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(image: dict) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))


def rows_of(folder: Path) -> list[dict]:
    return [row for shard in sorted(folder.glob("*.parquet")) for row in pq.read_table(shard).to_pylist()]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


@pytest.fixture
def photographs(tmp_path):
    """Twelve pairs at scale 2, in two formats; degraded is every second pixel of clean, so crops can be checked."""
    for i in range(12):
        clean = noise(40 + 2 * i, 61, i)
        save(tmp_path / f"clean/{i:02}.{'bmp' if i == 7 else 'png'}", clean)
        save(tmp_path / f"degraded/{i:02}.png", clean[:-1:2, :-1:2])
    return pair_folders(tmp_path / "clean", tmp_path / "degraded", scale=2)


def test_whole_images_keep_their_bytes(photographs, tmp_path):
    shards = pack(photographs, tmp_path / "out", Options(num_shards=5))
    assert [shard.name for shard in shards] == [f"train-{i:05}-of-00005.parquet" for i in range(5)]
    assert [pq.read_metadata(shard).num_rows for shard in shards] == [2, 2, 3, 2, 3]
    rows = {row["key"]: row for row in rows_of(tmp_path / "out")}
    assert sorted(rows) == [f"{i:02}" for i in range(12)]
    for pair in photographs.samples:
        assert rows[pair.key]["clean"] == {"bytes": pair.clean.read_bytes(), "path": pair.clean.name}
        assert rows[pair.key]["degraded"] == {"bytes": pair.degraded.read_bytes(), "path": pair.degraded.name}


def test_rows_are_shuffled_by_the_seed(photographs, tmp_path):
    orders = []
    for name, seed in [("a", 0), ("b", 0), ("c", 1), ("d", None)]:
        pack(photographs, tmp_path / name, Options(seed=seed))
        orders.append([row["key"] for row in rows_of(tmp_path / name)])
    assert orders[0] == orders[1] != orders[2]
    assert orders[3] == sorted(orders[0]) != orders[0]


def test_clean_images_alone_have_no_degraded_column(photographs, tmp_path):
    pack(pair_folders(tmp_path / "clean"), tmp_path / "out", Options(shard_bytes=20_000))
    assert set(rows_of(tmp_path / "out")[0]) == {"clean", "key"}
    assert len(list((tmp_path / "out").glob("*.parquet"))) == -(-sum(
        p.stat().st_size for p in (tmp_path / "clean").iterdir()
    ) // 20_000)  # fmt: skip


def test_crops_cover_as_the_published_sub_images_do():
    # DIV2K's 0001.png is 1404 x 2040 and has the sub-images 0001_s001 to 0001_s040 (480 pixels, 240 apart).
    rows, columns = crop_positions(1404, 480, 240), crop_positions(2040, 480, 240)
    assert rows == [0, 240, 480, 720, 924]
    assert columns == [0, 240, 480, 720, 960, 1200, 1440, 1560]
    assert crop_positions(960, 480, 240) == [0, 240, 480]
    assert crop_positions(480, 480, 240) == [0]
    assert crop_positions(300, 480, 240) == [0]


@pytest.mark.parametrize("crop_format", ["png", "webp"])
def test_crops_are_cut_from_both_halves_at_the_same_place(photographs, tmp_path, crop_format):
    options = Options(crop_size=24, crop_step=16, num_shards=3, crop_format=crop_format)
    pack(photographs, tmp_path / "out", options)
    rows = rows_of(tmp_path / "out")
    found = {row["key"]: row for row in rows}
    assert len(found) == len(rows)
    num_expected = 0
    for pair in photographs.samples:
        clean = np.array(Image.open(pair.clean).convert("RGB"))
        clean = clean[: len(clean) // 2 * 2, :60]
        corners = [(y, x) for y in crop_positions(len(clean), 24, 16) for x in crop_positions(60, 24, 16)]
        num_expected += len(corners)
        for number, (y, x) in enumerate(corners, start=1):
            row = found[f"{pair.key}_s{number:03}"]
            np.testing.assert_array_equal(pixels(row["clean"]), clean[y : y + 24, x : x + 24])
            np.testing.assert_array_equal(pixels(row["degraded"]), clean[y : y + 24 : 2, x : x + 24 : 2])
            assert row["clean"]["path"] == f"{pair.key}_s{number:03}.{crop_format}"
    assert len(rows) == num_expected
    assert not (tmp_path / "out/.spool").exists()


def test_an_image_smaller_than_the_crop_is_one_row(tmp_path):
    save(tmp_path / "clean/a.png", noise(20, 70, 0))
    pack(pair_folders(tmp_path / "clean"), tmp_path / "out", Options(crop_size=32))
    assert {row["key"]: pixels(row["clean"]).shape[:2] for row in rows_of(tmp_path / "out")} == {
        "a_s001": (20, 32),
        "a_s002": (20, 32),
        "a_s003": (20, 32),
    }


def test_reside_clear_images_are_cut_to_their_centre(tmp_path):
    clear = noise(48, 65, 0)
    save(tmp_path / "clear/1.png", clear)
    save(tmp_path / "hazy/1_1_0.9.png", noise(46, 62, 1))
    save(tmp_path / "hazy/1_2_0.8.png", noise(48, 65, 2))
    pack(find_pairs("reside-its", tmp_path), tmp_path / "out", Options())
    rows = {row["key"]: row for row in rows_of(tmp_path / "out")}
    expected = center_crop(torch.from_numpy(clear).permute(2, 0, 1), [46, 62]).permute(1, 2, 0)  # as FFA-Net reads it
    np.testing.assert_array_equal(pixels(rows["1_1_0.9"]["clean"]), expected)
    assert rows["1_2_0.8"]["clean"]["bytes"] == (tmp_path / "clear/1.png").read_bytes()


@pytest.fixture
def prepared(photographs, tmp_path):
    """The photographs with two further images each: one named as they are, one in another format."""
    for pair in photographs.samples:
        clean = np.asarray(Image.open(pair.clean))
        save(tmp_path / f"dcp/{pair.key}.png", 255 - clean)
        save(tmp_path / f"aod/{pair.key}.bmp", clean // 2)
    return {"dcp": tmp_path / "dcp", "aod": tmp_path / "aod"}


def test_further_images_are_packed_and_cut_with_the_clean_one(photographs, prepared, tmp_path):
    pairs = with_columns(photographs, prepared)
    pack(pairs, tmp_path / "whole", Options())
    for row in rows_of(tmp_path / "whole"):
        assert list(row) == ["clean", "degraded", "dcp", "aod", "key"]
        assert row["dcp"]["bytes"] == (prepared["dcp"] / f"{row['key']}.png").read_bytes()
    pack(pairs, tmp_path / "crops", Options(crop_size=24, crop_step=12))
    rows = rows_of(tmp_path / "crops")
    assert len(rows) > 12
    for row in rows:
        clean = pixels(row["clean"])
        assert np.array_equal(pixels(row["dcp"]), 255 - clean)
        assert np.array_equal(pixels(row["aod"]), clean // 2)
    card = (tmp_path / "crops" / "README.md").read_text()
    assert "| `aod` | Image | a further image of the size of `clean` |" in card
    assert "rows from 12 pairs of images" in card
    alone = with_columns(pair_folders(tmp_path / "clean"), prepared)
    pack(alone, tmp_path / "made", Options(degradation=Bicubic(scale=2)))
    for row in rows_of(tmp_path / "made"):
        assert np.array_equal(pixels(row["dcp"]), 255 - pixels(row["clean"]))
        assert pixels(row["degraded"]).shape[0] * 2 == pixels(row["clean"]).shape[0]


def test_further_images_of_many_degraded_ones_go_by_their_names(tmp_path):
    for scene, haze in [("0001", "0.8_0.1"), ("0001", "0.9_0.2"), ("0002", "0.8_0.1")]:
        save(tmp_path / f"clean/{scene}.png", noise(8, 8, 0))
        save(tmp_path / f"hazy/{scene}_{haze}.png", noise(8, 8, 1))
        save(tmp_path / f"ffa/{scene}_{haze}.png", noise(8, 8, 2))
    pairs = pair_folders(tmp_path / "clean", tmp_path / "hazy", pattern="{key}_*_*")
    found = with_columns(pairs, {"ffa": tmp_path / "ffa"})
    assert [pair.further[0].name for pair in found.samples] == [pair.degraded.name for pair in pairs.samples]


def test_haze_is_packed_over_the_depth_of_a_column(photographs, tmp_path):
    clean = pair_folders(tmp_path / "clean", None)
    for pair in clean.samples:
        height, width = pixels({"bytes": pair.clean.read_bytes()}).shape[:2]
        save(tmp_path / f"depth/{pair.key}.png", np.full((height, width), 10 * int(pair.key), np.uint8))
    options = Options(degradation=Haze(beta=1.2, airlight=1.0, depth="depth"))
    with pytest.raises(UserError, match="needs a column depth: give --column depth=FOLDER"):
        pack(clean, tmp_path / "out", options)
    pack(with_columns(clean, {"depth": tmp_path / "depth"}), tmp_path / "out", options)
    for row in rows_of(tmp_path / "out"):
        t = np.exp(-1.2 * 10 * int(row["key"]) / 255)
        expected = pixels(row["clean"]) * t + 255 * (1 - t)
        np.testing.assert_allclose(pixels(row["degraded"]), expected, atol=0.501)


def test_further_images_that_do_not_fit_are_named(photographs, prepared, tmp_path):
    (prepared["dcp"] / "03.png").rename(prepared["dcp"] / "other.png")
    with pytest.raises(UserError, match=r"dcp: .* these keys: 03; column dcp: .*belong to no sample: other\.png"):
        with_columns(photographs, prepared)
    (prepared["dcp"] / "other.png").rename(prepared["dcp"] / "03.png")
    save(prepared["dcp"] / "04.png", noise(24, 30, 0))
    with pytest.raises(UserError, match=r"dcp/04\.png is 24 x 30, and .*clean/04\.png 48 x 61: it must have that size"):
        pack(with_columns(photographs, prepared), tmp_path / "out", Options())
    with pytest.raises(UserError, match="cannot be called 'clean'"):
        with_columns(photographs, {"clean": tmp_path / "dcp"})


def test_what_a_disk_changes_in_a_further_image_is_seen_where_it_is_read(photographs, prepared, tmp_path):
    """The row groups' own checksums cover clean and degraded images alone."""
    (shard,) = pack(with_columns(photographs, prepared), tmp_path / "out", Options())
    changed, image = bytearray(shard.read_bytes()), (prepared["dcp"] / "05.png").read_bytes()
    changed[changed.index(image) + len(image) // 2] ^= 1
    shard.write_bytes(changed)
    assert len(list(open_parquet([str(shard)], "out"))) == 12
    with pytest.raises(UserError, match=r"cannot be read: .*changed after it was packed"):
        list(open_parquet([str(shard)], "out", extra={"dcp": "the test"}))


def test_row_groups_stay_small(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "ROW_GROUP_BYTES", 30_000)
    pack(photographs, tmp_path / "out", Options())
    metadata = pq.read_metadata(next((tmp_path / "out").glob("*.parquet")))
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    assert len(groups) > 2
    assert all(30_000 <= group.total_byte_size < 50_000 for group in groups[:-1])


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class Killed(BaseException):
    pass


@pytest.mark.parametrize("crop_size", [None, 24])
def test_a_pack_stopped_anywhere_continues_to_the_same_bytes(photographs, tmp_path, monkeypatch, crop_size):
    options = Options(num_shards=4, crop_size=crop_size)
    pack(photographs, tmp_path / "whole", options)
    expected = digests(tmp_path / "whole")
    fsync, calls = os.fsync, []

    def stop_at(count: int) -> None:
        calls.clear()

        def counted(handle: int) -> None:
            calls.append(handle)
            if len(calls) == count:
                raise Killed  # before the rename: the half-written file is left behind
            fsync(handle)

        monkeypatch.setattr(os, "fsync", counted)

    for stop in (2, 4, 6, 20):
        output = tmp_path / f"stopped-{stop}"
        stop_at(stop)
        try:
            pack(photographs, output, options)
        except Killed:
            assert list(output.rglob("*.part"))
        monkeypatch.setattr(os, "fsync", fsync)
        written = {shard: shard.stat().st_mtime_ns for shard in output.glob("*.parquet")}
        pack(photographs, output, options)
        assert digests(output) == expected
        assert not list(output.rglob("*.part"))
        assert all(shard.stat().st_mtime_ns == before for shard, before in written.items())  # kept, not rewritten
    assert pack(photographs, tmp_path / "whole", options) == sorted(
        (tmp_path / "whole").glob("*.parquet")
    )  # nothing to do


@pytest.mark.slow
def test_a_killed_pack_of_several_processes_continues_to_the_same_bytes(tmp_path):
    for i in range(60):
        save(tmp_path / f"clean/{i:03}.png", noise(150, 150, i))
    pack(pair_folders(tmp_path / "clean"), tmp_path / "whole", Options(crop_size=50, num_shards=20))
    program = (
        "import sys; from pathlib import Path; from mcir.data.pairs import pair_folders;"
        "from mcir.data.options import Options; from mcir.data.pack import pack\n"
        "if __name__ == '__main__':\n"
        "    pack(pair_folders(Path(sys.argv[1])), Path(sys.argv[2]), Options(crop_size=50, num_shards=20), 2)\n"
    )
    (tmp_path / "program.py").write_text(program)
    output = tmp_path / "out"
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "clean"), str(output)]
    environment = os.environ | {"PYTHONPATH": python_path()}
    kills = 0
    for wanted in (".spool/*.arrow", "*.parquet"):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        while not list(output.glob(wanted)) and process.poll() is None:
            time.sleep(0.01)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 60
        while group_lives(process.pid):
            assert time.monotonic() < deadline, "its workers outlive it"
            time.sleep(0.1)
    assert kills >= 1
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert digests(output) == digests(tmp_path / "whole")


def test_the_card_is_read_by_datasets_and_lists_the_checksums(photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    output = tmp_path / "out"
    pack(photographs, output, Options(num_shards=2, split="test"))
    card = (output / "README.md").read_text()
    front = YAML(typ="safe").load(card.split("---\n")[1])
    assert front["configs"][0]["data_files"] == [{"split": "test", "path": "test-*.parquet"}]
    assert front["dataset_info"]["splits"][0]["num_examples"] == 12
    assert front["dataset_info"]["download_size"] == sum(p.stat().st_size for p in output.glob("*.parquet"))
    assert front["size_categories"] == ["n<1K"]
    listed = checksums(card)
    for shard in output.glob("*.parquet"):
        sha256 = hashlib.sha256(shard.read_bytes()).hexdigest()
        assert listed[shard.name] == (pq.read_metadata(shard).num_rows, shard.stat().st_size, sha256)
        rows = [
            [row["key"].encode(), row["clean"]["bytes"], row["degraded"]["bytes"]]
            for row in pq.read_table(shard).to_pylist()
        ]
        in_footer = json.loads(pq.read_metadata(shard).metadata[b"mcir.crc32"])
        assert in_footer == [zlib.crc32(b"".join(b"".join(row) for row in rows))]  # small: one row group
    for arguments in ({"path": str(output)}, {"path": "parquet", "data_dir": str(output)}):
        dataset = load_dataset(**arguments, cache_dir=str(tmp_path / "cache"))["test"]
        assert dataset.num_rows == 12
        assert all(isinstance(dataset.features[name], ImageFeature) for name in ("clean", "degraded"))
        assert dataset[0]["clean"].size[0] == 61


def test_what_cannot_be_packed_is_refused_with_its_file(photographs, tmp_path):
    save(tmp_path / "other/clean/a.png", noise(20, 20, 0))
    save(tmp_path / "other/degraded/a.png", noise(10, 9, 0))
    pairs = pair_folders(tmp_path / "other/clean", tmp_path / "other/degraded", scale=2)
    with pytest.raises(UserError, match=r"clean/a.png is 20 x 20 and .*degraded/a.png 10 x 9: .* should be 10 x 10"):
        pack(pairs, tmp_path / "out-a", Options())
    (tmp_path / "other/clean/a.png").write_bytes((tmp_path / "other/clean/a.png").read_bytes()[:300])
    with pytest.raises(UserError, match=r"clean/a.png: the PNG image is truncated"):
        pack(pairs, tmp_path / "out-b", Options())
    deep = tmp_path / "deep/a.png"
    deep.parent.mkdir()
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(deep)
    (deep.parent / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"^1 of 2 samples cannot be packed: .*deep/b.png: the image is empty"):
        pack(pair_folders(deep.parent), tmp_path / "out-c", Options())


@pytest.mark.parametrize("crop_size", [None, 8])
@pytest.mark.parametrize("degradation", [None, Bicubic(scale=2)])
def test_16_bits_stay_16_bits(tmp_path, crop_size, degradation):
    """Whole images keep their bytes; what is cut or made of them is PNG with 16 bits, WebP or not."""
    deep = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    (tmp_path / "deep").mkdir()
    Image.fromarray(deep).save(tmp_path / "deep/a.png")
    options = Options(crop_size=crop_size, crop_format="webp", degradation=degradation, seed=None)
    pack(pair_folders(tmp_path / "deep"), tmp_path / "out", options)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == (1 if crop_size is None else 4)
    clean = decode(rows[-1]["clean"]["bytes"], "clean")
    whole = torch.from_numpy(deep.astype(np.float32) / 65535).expand(3, -1, -1)
    assert torch.equal(clean, whole[:, -clean.shape[1] :, -clean.shape[2] :])
    if degradation is not None:
        expected = imresize(whole, 1 / 2).clamp(0, 1)
        made = decode(rows[-1]["degraded"]["bytes"], "degraded")
        assert made.dtype == torch.float32
        expected = expected[:, -made.shape[1] :, -made.shape[2] :]
        torch.testing.assert_close(made, expected, rtol=0, atol=0.5 / 65535 + 1e-6)


@pytest.mark.parametrize("crop_size", [None, 24])
def test_bad_images_are_named_at_once_and_the_same_command_goes_on_without_them(photographs, tmp_path, crop_size):
    bad = {"clean/03.png": b"", "degraded/05.png": b"no image"}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    options, output = Options(num_shards=3, crop_size=crop_size), tmp_path / "out"

    def again():
        return pack(pair_folders(tmp_path / "clean", tmp_path / "degraded", scale=2), output, options)

    with pytest.raises(UserError) as caught:
        again()
    assert str(caught.value).startswith("2 of 12 samples cannot be packed: ")
    assert all(str(tmp_path / name) in str(caught.value) for name in bad)
    assert not list(output.glob("*.parquet"))
    spooled = {file.name: file.stat().st_mtime_ns for file in (output / ".spool").iterdir()}
    assert len(spooled) == 10
    for name in bad:
        for half in ("clean", "degraded"):
            (tmp_path / half / Path(name).name).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module, "spool", None)  # nothing is decoded again
        again()
    pack(pair_folders(tmp_path / "clean", tmp_path / "degraded", scale=2), tmp_path / "fresh", options)
    assert digests(output) == digests(tmp_path / "fresh")
    assert not (output / ".spool").exists()


def test_an_image_that_is_mended_is_looked_at_again_and_no_shard_of_before_stays(photographs, tmp_path):
    options, output = Options(num_shards=3), tmp_path / "out"
    mended = (tmp_path / "clean/03.png").read_bytes()
    (tmp_path / "clean/03.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 12 samples"):
        pack(photographs, output, options)
    (output / "train-00000-of-00003.parquet").write_bytes(b"of other samples")
    (tmp_path / "clean/03.png").write_bytes(mended)
    pack(photographs, output, options)
    pack(photographs, tmp_path / "fresh", options)
    assert digests(output) == digests(tmp_path / "fresh")


def test_where_every_image_is_bad_not_all_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "_ALL_BAD", 4)
    for i in range(9):
        (tmp_path / "clean").mkdir(exist_ok=True)
        (tmp_path / f"clean/{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"^4 of 9 samples"):
        pack(pair_folders(tmp_path / "clean"), tmp_path / "out", Options())


def test_two_packs_into_one_folder_at_once(photographs, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    program = (
        "import fcntl, sys\nlock = open(sys.argv[1], 'a')\nfcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(output / ".pack.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"another `mcir data pack` writes into .*out; wait, or choose another"):
            pack(photographs, output, Options())
        other.kill()  # a lock dies with its process
    assert len(pack(photographs, output, Options())) == 1


def test_a_finished_pack_mends_its_missing_and_damaged_shards(photographs, tmp_path):
    output, options = tmp_path / "out", Options(num_shards=4)
    shards = pack(photographs, output, options)
    expected = digests(output)
    data = bytearray(shards[1].read_bytes())
    data[len(data) // 2] ^= 1
    shards[1].write_bytes(data)
    shards[2].unlink()
    kept = shards[3].stat().st_mtime_ns
    (output / ".spool").mkdir()  # of a kill at the very end
    assert pack(photographs, output, options) == shards
    assert digests(output) == expected
    assert shards[3].stat().st_mtime_ns == kept
    assert not (output / ".spool").exists()


def test_images_that_changed_are_not_taken_for_those_of_before(photographs, tmp_path):
    """A BMP of the same size in pixels has the same size in bytes."""
    pack(photographs, tmp_path / "out", Options())
    save(tmp_path / "clean/07.bmp", noise(54, 61, 99))
    with pytest.raises(UserError, match="of other images, or they were changed since"):
        pack(photographs, tmp_path / "out", Options())


def test_a_pack_killed_at_its_first_file_starts_again(photographs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".pack.json.123.part").write_text("{")
    pack(photographs, tmp_path / "out", Options())
    (tmp_path / "out" / ".pack.json").write_text("{")
    with pytest.raises(UserError, match=r"\.pack\.json is damaged"):
        pack(photographs, tmp_path / "out", Options())


def test_another_pack_or_other_files_in_the_folder_are_refused(photographs, tmp_path):
    pack(photographs, tmp_path / "out", Options())
    with pytest.raises(UserError, match="holds a pack with other options"):
        pack(photographs, tmp_path / "out", Options(seed=1))
    with pytest.raises(UserError, match="holds a pack of other images"):
        pack(pair_folders(tmp_path / "clean", scale=2), tmp_path / "out", Options())
    with pytest.raises(UserError, match="is not empty"):
        pack(photographs, tmp_path / "clean", Options())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(crop_size=25), "crop_size must be a positive multiple of the scale 2, not 25"),
        (Options(crop_size=24, crop_step=0), "crop_step must be a positive multiple"),
        (Options(crop_step=24), "crop_step is given without crop_size"),
        (Options(num_shards=13), "13 shards for 12 rows"),
        (Options(num_shards=0), "at least 1"),
    ],
)
def test_options_that_cannot_be_meant(photographs, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        pack(photographs, tmp_path / "out", options)


@pytest.mark.parametrize("crop_size", [None, 8])
def test_degraded_images_are_made_of_clean_ones(tmp_path, crop_size):
    """The stored degraded image is MATLAB's bicubic of the whole clean one, cropped to a multiple of the scale."""
    (tmp_path / "clean").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (17, 18, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "clean" / "a.png")
    options = Options(degradation=Bicubic(scale=2), crop_size=crop_size)
    pack(pair_folders(tmp_path / "clean"), tmp_path / "out", options)
    rows = [row for file in (tmp_path / "out").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    expected = imresize(torch.from_numpy(pixels).permute(2, 0, 1)[:, :16], 1 / 2)
    whole = torch.zeros(3, 8, 9, dtype=torch.uint8)
    for row, (top, left) in zip(sorted(rows, key=lambda row: row["key"]), crops_of(crop_size), strict=True):
        degraded = decode(row["degraded"]["bytes"], row["key"])
        whole[:, top : top + degraded.shape[1], left : left + degraded.shape[2]] = degraded
    assert torch.equal(whole, expected)
    with pytest.raises(UserError, match="pairs already"):
        options.check(Pairs((Pair("a", tmp_path / "a.png", tmp_path / "a.png"),)))


def crops_of(crop_size):
    """Corners, in degraded pixels, of what is cut from 16 x 18 clean pixels, in order."""
    return [(0, 0)] if crop_size is None else [(y, x) for y in (0, 4) for x in (0, 4, 5)]


def test_a_place_that_takes_nothing_is_a_sentence(photographs, tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot be made \(.*\): choose another folder"):
            pack(photographs, place, Options())
    script = (
        "import resource, sys; from pathlib import Path; from mcir.data.options import Options; from mcir.data.pack "
        "import pack; from mcir.data.pairs import pair_folders; resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512)); "
        "pack(pair_folders(Path(sys.argv[1])), Path(sys.argv[2]), Options())"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "clean"), str(tmp_path / "full")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "UserError: " in done.stderr
    assert "File too large; make room, and the same command goes on" in done.stderr
    assert len(pack(pair_folders(tmp_path / "clean"), tmp_path / "full", Options())) == 1


def test_what_webp_cannot_hold_is_png():
    wide = torch.zeros(3, 2, 16384, dtype=torch.uint8)
    assert encode(wide, "webp")[1] == "png"
    assert encode(wide[..., 1:], "webp")[1] == "webp"
