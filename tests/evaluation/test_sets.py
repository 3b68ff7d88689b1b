"""What each way to point at a dataset means, and what must be said."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from mcir.data.degrade import Bicubic, Noise
from mcir.data.sources import FolderSource, ParquetSource
from mcir.errors import UserError
from mcir.evaluation.sets import open_sets
from tests.distributed.launch import write_config
from tests.runs import tiny_config, write_dataset


@pytest.fixture
def images(tmp_path):
    for folder, side in (("clean", 24), ("degraded", 12)):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / folder / f"{name}.png")
    return tmp_path


def test_folders_and_pairs(images):
    alone, pair = open_sets([str(images / "clean"), f"pair={images}/clean,{images}/degraded"], 2).values()
    assert alone.data.source == FolderSource(format="folders", clean=str(images / "clean"))
    assert alone.data.degradation == Bicubic(scale=2)
    assert (alone.data.protocol, alone.num_images) == ("sr", 2)
    assert str(alone) == "2 images, clean images degraded on the fly: bicubic (scale 2), protocol sr"
    assert pair.data.source.degraded == f"{images}/degraded"
    assert pair.data.degradation is None
    assert "pairs as stored" in str(pair)


def save(root, *names, side=8):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(root / name)


def test_a_published_set_is_recognised_by_its_root(tmp_path):
    save(tmp_path / "Set5", "HR/a.png", "HR/b.png")
    save(tmp_path / "Set5", "LR_bicubic/X2/ax2.png", "LR_bicubic/X2/bx2.png", side=4)
    (test,) = open_sets([f"{tmp_path}/Set5"], 2).values()
    assert str(test) == "2 images, pairs as stored (layout set5), protocol sr"
    assert [row.degraded is None for row in test.data.source.open()] == [False, False]
    (test,) = open_sets([f"Set5={tmp_path}/Set5/HR,{tmp_path}/Set5/LR_bicubic/X2"], 2).values()
    assert str(test) == "2 images, pairs as stored (names {key}x2), protocol sr"
    (test,) = open_sets([f"{tmp_path}/Set5"], 4).values()  # no LR of that scale: made of HR, and shown
    assert str(test) == "2 images, clean images degraded on the fly: bicubic (scale 4), protocol sr"
    with pytest.raises(UserError, match=r"holds the degraded images of Set5, and .*Set5/HR their clean ones; give the"):
        open_sets([f"{tmp_path}/Set5/LR_bicubic/X2"], 2)
    source = {"format": "folders", "clean": f"{tmp_path}/Set5/LR_bicubic/X2"}
    assert open_sets([f"x={json.dumps({'source': source})}"], 2)["x"].num_images == 2  # said in so many words


def test_the_test_half_is_taken_and_what_reads_as_several_sets_is_asked_about(tmp_path):
    save(
        tmp_path / "GoPro",
        *(
            f"{split}/{scene}/{half}/1.png"
            for split in ("train", "test")
            for scene in "ab"
            for half in ("blur", "sharp")
        ),
    )
    (test,) = open_sets([f"{tmp_path}/GoPro"], 1, "nafnet").values()
    assert (test.num_images, test.data.source.split) == (2, "test")
    save(tmp_path / "sets", "A/1.png", "B/1.png")
    with pytest.raises(UserError, match=r"in several folders \(A, B\), which may be pairs or several sets"):
        open_sets([f"{tmp_path}/sets"], 2)


def test_reside_is_cut_to_its_centre_as_packed(tmp_path):
    rng = np.random.default_rng(0)
    clear = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    for name, image in (("gt/1.png", clear), ("hazy/1_1.png", clear[1:47, 1:63])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    (test,) = open_sets([f"SOTS={tmp_path}"], 1, "ffanet").values()
    (row,) = test.data.source.open()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(row.clean))), clear[1:47, 1:63])


def test_parquet(tmp_path):
    write_dataset(tmp_path / "x4", num_rows=3, num_shards=1, scale=4)
    sets = open_sets([str(tmp_path / "x4"), f"glob={tmp_path}/x4/*.parquet"], 4, "rgb")
    assert list(sets) == ["x4", "glob"]
    for test in sets.values():
        assert isinstance(test.data.source, ParquetSource)
        assert (test.data.degradation, test.data.protocol, test.num_images) == (None, "rgb", 3)


def test_a_config_and_a_mapping(images):
    source = {"format": "folders", "clean": str(images / "clean")}
    described = {"source": source, "degradation": {"name": "noise", "sigma": 5}, "protocol": "nafnet"}
    values = tiny_config(
        images / "run", arch={"name": "nafnet"}, validation={"every": 1, "tile": 32, "sets": {"v": described}}
    )
    values["data"]["train"][0]["degradation"] = {"name": "noise"}
    config = write_config(images / "config.yaml", values)
    from_config = open_sets([str(config)], 1)["v"]
    inline = open_sets([f"v={json.dumps(described)}"], 1)["v"]
    assert from_config.data == inline.data
    assert from_config.data.degradation == Noise(sigma=5)
    assert (from_config.tile, inline.tile) == (32, None)
    assert open_sets([str(config)], 1, "rgb")["v"].data.protocol == "rgb"


@pytest.mark.parametrize(
    ("places", "scale", "protocol", "message"),
    [
        (["{clean}"], 2, "srr", "protocol srr: there is sr, rgb"),
        (["{clean}"], 1, None, "clean: give --protocol, one of sr, rgb"),
        (["{clean}"], 1, "sr", "protocol sr is for super-resolution"),
        (["{clean}"], 1, "rgb", "clean images only, and nothing says how to degrade"),
        (["{clean}", "{clean}"], 2, None, "two sets are called clean"),
        (["{clean},{degraded}"], 2, None, "give the pair of folders a name"),
        (["x={clean},/nowhere"], 2, None, "/nowhere is not a folder"),
        (["x=/nowhere"], 2, None, "nothing there that can be read"),
        (["x=/nowhere.yaml"], 2, None, "/nowhere.yaml cannot be read"),
        (["x={{source: {{format: folders, clean: {clean}}}, degradation: {{name: noise}}}}"], 2, None, "to scale 1"),
        (["x={{source: {{format: folders, clen: {clean}}}}}"], 2, None, "clen: Extra inputs"),
        (["x={{source: ["], 2, None, "--data x, line 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(images, places, scale, protocol, message):
    places = [place.format(clean=images / "clean", degraded=images / "degraded") for place in places]
    with pytest.raises(UserError, match=message):
        open_sets(places, scale, protocol)
