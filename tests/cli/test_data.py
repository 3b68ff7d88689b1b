"""`mcir data …` as a user types it: what it says, what it writes; every mistake one sentence and nothing written."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.cli.test_cli import run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two photographs, and the same at half the size."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for half, side in (("clean", 64), ("degraded", 32)):
        (tmp_path / half).mkdir()
        for name in "ab":
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / half / f"{name}.png")
    return tmp_path


def test_pairs_are_packed_and_inspected(folder, monkeypatch, capsys):
    pack = ["data", "pack", "clean", "out", "--degraded", "degraded", "--scale", "2", "--num-workers", "0"]
    pack += ["--crop-size", "32", "--crop-step", "32", "--split", "test"]
    for _ in range(2):  # the second finds it done
        code, said, _ = run(monkeypatch, capsys, *pack)
        assert (code, said) == (0, "out: 8 samples in 1 shard\n")
    assert pq.read_table(folder / "out/test-00000-of-00001.parquet").column_names == ["clean", "degraded", "key"]
    code, said, _ = run(monkeypatch, capsys, "data", "inspect", "out", "--sheet", "new/sheet")
    assert code == 0
    assert "8 (8 pairs)" in said
    assert Image.open(folder / "new/sheet").format == "PNG"


def test_further_images_are_packed_and_inspected(folder, monkeypatch, capsys):
    for name in "ab":
        (folder / "ffa").mkdir(exist_ok=True)
        Image.open(folder / f"clean/{name}.png").save(folder / f"ffa/{name}.png")
    pairs = ["--degraded", "degraded", "--scale", "2", "--column", "ffa=ffa", "--num-workers", "0"]
    assert run(monkeypatch, capsys, "data", "pack", "clean", "out", *pairs)[0] == 0
    for inspected in (["clean", *pairs[:-2]], ["out"]):
        code, said, _ = run(monkeypatch, capsys, "data", "inspect", *inspected)
        assert (code, "column ffa" in said, "2 of the clean image's size" in said) == (0, True, True)
    Image.open(folder / "degraded/b.png").save(folder / "ffa/b.png")
    code, said, _ = run(monkeypatch, capsys, "data", "inspect", "clean", *pairs[:-2])
    assert (code, "ffa/b.png: it is 32 x 32, and clean 64 x 64" in said) == (1, True)
    (folder / "ffa/b.png").unlink()
    code, _, said = run(monkeypatch, capsys, "data", "pack", "clean", "out2", *pairs)
    assert (code, "column ffa: ffa holds no image of these keys: b" in said) == (1, True)


def test_a_fault_is_printed_and_the_exit_code_is_1(folder, monkeypatch, capsys):
    (folder / "degraded/b.png").write_bytes(b"no picture")
    code, said, _ = run(monkeypatch, capsys, "data", "inspect", "clean", "--degraded", "degraded", "--scale", "2")
    assert code == 1
    assert "degraded/b.png" in said.replace("\n", "")


def test_the_valid_part_of_a_layout_is_what_the_hub_calls_validation(folder, monkeypatch, capsys):
    (folder / "clean").rename(folder / "DIV2K_valid_HR")
    code, *_ = run(monkeypatch, capsys, "data", "pack", ".", "out", "--layout", "div2k", "--split", "valid")
    assert code == 0
    assert [shard.name for shard in folder.glob("out/*.parquet")] == ["validation-00000-of-00001.parquet"]


def test_names_by_a_pattern_test_sets_and_left_over_files(folder, monkeypatch, capsys):
    for image in sorted((folder / "degraded").iterdir()):
        image.rename(image.with_name(f"{image.stem}x2.png"))
    (folder / "clean/.trash").mkdir()
    (folder / "clean/.trash/old.png").write_bytes(b"")
    pairs = ["--degraded", "degraded", "--scale", "2"]
    code, printed, said = run(monkeypatch, capsys, "data", "pack", "clean", "out", *pairs)
    assert code == 1
    assert "--pattern '{key}x2' (in a config pattern: '{key}x2') pairs all of them" in said
    code, printed, _ = run(monkeypatch, capsys, "data", "inspect", "clean", *pairs)
    assert code == 1
    assert printed.count("half in") == 4
    pairs += ["--pattern", "{key}x2.png"]
    code, printed, _ = run(monkeypatch, capsys, "data", "inspect", "clean", *pairs)
    assert (code, "left out: 1 hidden, or left over by a file manager (clean/.trash/old.png)" in printed) == (0, True)
    code, printed, _ = run(monkeypatch, capsys, "data", "pack", "clean", "out", *pairs, "--num-workers", "0")
    assert (code, printed.splitlines()[-1]) == (0, "out: 2 samples in 1 shard")
    (folder / "Set5/HR").mkdir(parents=True)
    (folder / "clean/a.png").rename(folder / "Set5/HR/a.png")
    code, printed, _ = run(
        monkeypatch, capsys, "data", "pack", "Set5", "set5", "--layout", "set5", "--num-workers", "0"
    )
    assert (code, [shard.name for shard in folder.glob("set5/*.parquet")]) == (0, ["test-00000-of-00001.parquet"])
    assert run(monkeypatch, capsys, "data", "inspect", "Set5", "--layout", "set5")[0] == 0  # a subset is no fault
    code, printed, _ = run(monkeypatch, capsys, "data", "inspect", "set5", "--columns", "{clean: hr}")
    assert (code, "set5 has no column hr (it has clean, key)" in printed) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pack missing out", "missing is not a folder"),
        ("pack clean out --split half", "--split half: choose train, validation or test"),
        ("pack clean out --layout none", "there is no layout 'none'; there are div2k, "),
        ("pack clean out --layout div2k --split test", "give the split, train or valid, not test"),
        ("pack clean out --layout set5 --degraded degraded", "--degraded goes with plain folders"),
        ("pack clean out --layout set5 --pattern {key}x2", "--pattern goes with plain folders"),
        ("pack clean out --pattern {key}x2", "goes with pairs"),
        ("pack clean out --column ffa", "--column ffa: write NAME=FOLDER"),
        ("pack clean out --column a=clean --column a=degraded", "a name is given twice"),
        ("pack clean out --column ffa=missing", "missing is not a folder"),
        ("pack clean out --private", "--private goes with --push"),
        ("inspect clean --columns {clean:hr}", "--columns goes with Parquet files"),
        ("pack clean out --crop-format jpg", "--crop-format jpg: choose png or webp"),
        ("pack clean out --crop-size 0", "crop_size must be a positive multiple"),
        ("pack clean out --degradation bicubic", "--degradation bicubic: Input should be a valid dictionary"),
        ("pack clean out --degradation {name:fog}", "--degradation {name:fog}: "),
        ("pack clean degraded", "degraded is not empty"),
        ("inspect clean --split test", "--split goes with a --layout"),
        ("inspect clean --sheet degraded", "degraded: is a folder"),
        ("inspect clean --sheet clean/a.png/sheet.png", "clean/a.png/sheet.png: cannot be written there"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(folder, monkeypatch, capsys, arguments, message):
    before = sorted(folder.rglob("*"))
    code, printed, said = run(monkeypatch, capsys, "data", *arguments.split())
    assert code == 1
    assert message in said
    assert said.startswith("mcir: ")
    assert said.count("\n") == 1
    assert not printed
    assert sorted(folder.rglob("*")) == before


def test_scale_is_not_asked_of_shards(folder, monkeypatch, capsys):
    run(monkeypatch, capsys, "data", "pack", "clean", "out")
    for option, value in (("--scale", "2"), ("--pattern", "{key}x2")):
        code, _, said = run(monkeypatch, capsys, "data", "inspect", "out", option, value)
        assert code == 1
        assert f"{option} goes with folders" in said
