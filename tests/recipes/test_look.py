"""What a folder is found to hold, and what has to be asked."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mcir.errors import UserError
from mcir.recipes.look import look
from tests.runs import write_dataset


def save(root, *names, side=16):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((side, side + 2, 3), np.uint8)).save(root / name)


@pytest.mark.parametrize(
    ("clean", "degraded"),
    [("hr", "lr"), ("HR", "LR_bicubic"), ("gt", "lq"), ("sharp", "blur"), ("target", "input"), ("clean", "noisy_x2")],
)
def test_pairs_by_the_names_of_their_folders(tmp_path, clean, degraded):
    save(tmp_path, f"{clean}/a.png", f"{clean}/b.png")
    save(tmp_path, f"{degraded}/a.png", f"{degraded}/b.png", side=8)  # 8 x 10 of 16 x 18: no whole scale
    with pytest.raises(UserError, match="clean is 16 x 18 and degraded 8 x 10, which is no whole scale"):
        look(tmp_path, (2,))
    for path in (tmp_path / degraded).glob("*"):
        Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(path)
    found = look(tmp_path, (2,))
    folders = {"clean": str(tmp_path / clean), "degraded": str(tmp_path / degraded)}
    assert found.train == {"format": "folders", **folders}
    assert (found.scale, found.num_samples, found.sides, found.held_out) == (2, 2, (16, 16), None)


def test_names_that_differ_by_a_pattern_and_what_is_beside_train(tmp_path):
    save(tmp_path, "mine/train/gt/a.png", "mine/train/gt/b.png", "mine/train/lq/a_1.png", "mine/train/lq/b_1.png")
    save(tmp_path, "mine/test/gt/c.png", "mine/test/lq/c.png", "mine/valid/gt/d.png", "mine/valid/lq/d.png")
    for place in ("mine", "mine/train"):  # the folder above, and the one itself
        found = look(tmp_path / place, (1,))
        assert found.train["pattern"] == "{key}_1"
        assert found.train["clean"] == str(tmp_path / "mine/train/gt")
        assert found.held_out["degraded"] == str(tmp_path / "mine/valid/lq")
    assert look(tmp_path / "mine/test", (1,)).held_out is None


def test_what_is_to_validate_on_is_of_the_same_scale(tmp_path):
    save(tmp_path, "train/gt/a.png", "train/lq/a.png", "val/gt/b.png", side=32)
    (tmp_path / "val/lq").mkdir()
    Image.new("RGB", (17, 16)).save(tmp_path / "val/lq/b.png")
    with pytest.raises(UserError, match=r"gt/b\.png: lies beside what is to be trained on and has another scale"):
        look(tmp_path, (1,))


def test_shards_and_their_splits(tmp_path):
    write_dataset(tmp_path / "x4/train", scale=4)
    write_dataset(tmp_path / "x4/test", scale=4)
    found = look(tmp_path / "x4", (1, 2, 3, 4))
    assert (found.train["path"], found.held_out["path"]) == (f"{tmp_path}/x4/train", f"{tmp_path}/x4/test")
    assert (found.scale, found.num_samples, found.num_looked_at) == (4, 24, 24)
    write_dataset(tmp_path / "hub/data")  # one folder with all splits, as the Hub has them
    for number, split in enumerate(("train", "train", "validation")):
        (tmp_path / f"hub/data/{number:05d}.parquet").rename(tmp_path / f"hub/data/{split}-{number:05d}.parquet")
    found = look(tmp_path / "hub", (2,))
    assert (found.scale, found.num_samples) == (None, 16)
    assert found.held_out["path"].endswith("**/validation-*.parquet")


def test_a_published_dataset_as_it_unpacks(tmp_path):
    halves = [f"{scene}/{half}/1.png" for scene in "ab" for half in ("blur", "sharp")]
    save(tmp_path / "GoPro", *(f"{split}/{half}" for split in ("train", "test") for half in halves))
    found = look(tmp_path / "GoPro", (1,))
    layout = {"format": "layout", "layout": "gopro", "path": str(tmp_path / "GoPro")}
    assert (found.train, found.held_out) == (layout | {"split": "train"}, layout | {"split": "test"})
    assert (found.scale, found.num_samples) == (1, 2)
    for scale, side in ((2, 8), (4, 4)):
        save(tmp_path / "DIV2K", f"DIV2K_train_LR_bicubic/X{scale}/0001x{scale}.png", side=side)
    for scale in (2, 4):
        path = tmp_path / f"DIV2K/DIV2K_train_LR_bicubic/X{scale}/0001x{scale}.png"
        Image.fromarray(np.zeros((16 // scale, 18 // scale, 3), np.uint8)).save(path)
    save(tmp_path / "DIV2K", "DIV2K_train_HR/0001.png")
    with pytest.raises(UserError, match="may be read as div2k train 2; div2k train 4: say which with --scale"):
        look(tmp_path / "DIV2K", (2, 3, 4))
    assert look(tmp_path / "DIV2K", (4,)).train["scale"] == 4
    save(tmp_path / "Set5", "HR/a.png")
    (tmp_path / "Set5/LR_bicubic/X2").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tmp_path / "Set5/LR_bicubic/X2/ax2.png")
    assert look(tmp_path / "Set5", (2,)).train["degraded"].endswith("LR_bicubic/X2")  # anybody's hr and lr
    save(tmp_path / "Rain100L", "target/norain-1.png", "input/rain-1.png")
    assert look(tmp_path / "Rain100L", (1,)).train["clean_pattern"] == "no{key}"


def test_clean_images_and_what_may_be_meant_otherwise(tmp_path):
    save(tmp_path / "flat", "a.png", "b.png")
    save(tmp_path / "one", "HR/a.png")
    save(tmp_path / "many", "cats/a.png", "dogs/b.png")
    assert look(tmp_path / "flat", (2,)).train == {"format": "folders", "clean": str(tmp_path / "flat")}
    assert look(tmp_path / "one", (2,)).train["clean"] == str(tmp_path / "one/HR")
    assert look(tmp_path / "one", (2,)).scale is None
    with pytest.raises(UserError, match=r"several folders \(cats, dogs\), of which not just two are called"):
        look(tmp_path / "many", (2,))
    assert look(tmp_path / "many", (1,), all_clean=True).num_samples == 2


def test_what_cannot_be_trained_on_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "bad", "hr/a.png", "lr/a.png")
    (tmp_path / "bad/hr/a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    save(tmp_path / "odd", "hr/a.png", "hr/b.png", "lr/a.png")
    save(tmp_path / "two", "hr/a.png", "lr/a.png", "hr/b.png")
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tmp_path / "two/lr/b.png")
    for place, said in {
        "nowhere": "is not a folder",
        "empty": "holds no images, no Parquet files and no tars",
        "bad": r"a\.png, clean: ",
        "odd": "clean images without a degraded half",
        "two": r"the pairs have several scales \(x1, x2\)",
    }.items():
        with pytest.raises(UserError, match=said) as caught:
            look(tmp_path / place, (1, 2))
        assert "\n" not in str(caught.value)


def test_a_shard_that_is_damaged(tmp_path):
    shard = write_dataset(tmp_path / "data") / "00000.parquet"
    table = pq.read_table(shard)
    pq.write_table(table.drop_columns("key"), shard)
    with pytest.raises(UserError, match="key"):
        look(tmp_path / "data", (2,))
