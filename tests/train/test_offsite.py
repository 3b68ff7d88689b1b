"""Checkpoints in an object store, a real S3 server behind a wire that fails: copied whole, brought back equal, or a
sentence."""

import json
import shutil
from hashlib import sha256

import pytest
import torch

from mcir.config import validate
from mcir.data import storage
from mcir.errors import UserError
from mcir.train import offsite
from mcir.train.engine import build_engine
from mcir.weights.trained import open_trained
from tests import s3
from tests.runs import tiny_config


@pytest.fixture(scope="module")
def wire():
    with s3.serve() as wire:
        yield wire


@pytest.fixture
def store(wire, tmp_path, monkeypatch):
    from s3fs import S3FileSystem

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(storage, "PAUSES_S", (0.01, 0.01))
    monkeypatch.setattr(storage, "PATIENT_S", (0.01, 0.01, 0.01))
    wire.num_cuts, wire.down = 0, False
    store = S3FileSystem()
    if store.exists("bucket/runs"):
        store.rm("bucket/runs", recursive=True)
    return store


def config(folder, **overrides):
    checkpoint = {"every": 2, "keep_last": 1, "to": "s3://bucket/runs"}
    return validate(tiny_config(folder, checkpoint=checkpoint) | overrides, "test")


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def in_store(store, folder):
    store.invalidate_cache()
    return {name.rsplit("/", 1)[1]: store.cat_file(name) for name in store.find(folder)}


def weights(engine):
    return {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}


@pytest.mark.usefixtures("deterministic")
def test_a_lost_disk(store, wire, tmp_path):
    """Every checkpoint is copied, older ones go as they go here; on an empty disk the run goes on from the copy, to the
    bit, over a wire that is cut; what the store holds can be measured."""
    whole = build_engine(config(tmp_path / "whole", name="whole", checkpoint={"every": 2}))
    assert whole.fit() == 0
    engine = build_engine(config(tmp_path / "one", steps=4))
    wire.num_cuts = 2
    assert engine.fit() == 0
    assert wire.num_cuts == 0
    saved = engine.run_dir / "checkpoints/step-00000004"
    here = files(saved)
    assert in_store(store, "bucket/runs/tiny/step-00000004") == here
    assert {name.rsplit("/", 1)[1] for name in store.ls("bucket/runs/tiny")} == {"config.yaml", "step-00000004"}
    record = (engine.run_dir / "run.json").read_text() + (engine.run_dir / "config.yaml").read_text()
    assert not any(secret in record for secret in ("id-of-tests", "secret-of-tests"))

    wire.num_cuts = 2
    again = build_engine(config(tmp_path / "two"), resume="auto")
    assert again.run_dir == tmp_path / "two/runs/tiny"
    assert (again.state.step, wire.num_cuts) == (4, 0)
    assert files(again.run_dir / "checkpoints/step-00000004") == here
    assert again.fit() == 0
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(again).items())
    wire.num_cuts = 1
    (trained,) = open_trained(["s3://bucket/runs/tiny/step-00000006"])
    assert wire.num_cuts == 0
    assert (trained.name, trained.metadata["step"], trained.kind) == ("step-00000006", "6", "ema")
    assert trained.origin.startswith("s3://bucket/runs/tiny/step-00000006/ema.safetensors#sha256=")

    # the first disk comes back, two steps behind: the store's is newer; and a new start takes no name that is taken
    back = build_engine(config(tmp_path / "one"), resume="auto")
    assert (back.state.step, back.run_dir) == (6, engine.run_dir)
    back.record.__exit__(None, None, None)
    assert build_engine(config(tmp_path / "three")).run_dir.name == "tiny-2"
    with pytest.raises(
        UserError, match=r"^--resume s3://bucket/runs/tiny: a run goes on from a store with checkpoint.to"
    ):
        build_engine(config(tmp_path / "three"), resume="s3://bucket/runs/tiny")


def test_what_is_not_whole_is_passed_over(store, tmp_path, caplog):
    engine = build_engine(config(tmp_path / "one", steps=4))
    assert engine.fit() == 0
    saved = engine.run_dir / "checkpoints/step-00000004"
    place = "s3://bucket/runs/tiny"
    for step in (5, 6, 7):
        copy = shutil.copytree(saved, tmp_path / f"copies/step-{step:08d}")
        if step == 7:
            text = json.dumps(json.loads((copy / "state.json").read_text()) | {"healthy": False})
            (copy / "state.json").write_text(text)
            entry = {"bytes": len(text), "sha256": sha256(text.encode()).hexdigest()}
            manifest = json.loads((copy / "manifest.json").read_text()) | {"state.json": entry}
            (copy / "manifest.json").write_text(json.dumps(manifest))
        offsite.upload(copy, place, keep_last=9, keep_best=True)
    store.rm_file("bucket/runs/tiny/step-00000006/manifest.json")
    store.pipe_file("bucket/runs/tiny/step-00000005/model.safetensors", b"damaged")
    brought = offsite.bring(place, tmp_path / "new/tiny", None)
    assert brought == tmp_path / "new/tiny/checkpoints/step-00000004"
    assert files(brought) == files(saved)
    assert "step-00000006 is not whole" in caplog.text
    assert "step-00000005 is damaged (model.safetensors is not what was written)" in caplog.text
    assert "step-00000007 was saved while no gradient was finite" in caplog.text
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["tiny"]
    assert offsite.bring(place, tmp_path / "new/tiny", brought) is None  # the sick one is here too by now


def test_a_store_that_goes_away(store, wire, tmp_path):
    """The run ends with a sentence, and what is on the disk is whole."""
    engine = build_engine(config(tmp_path, steps=2))
    wire.down = True
    said = r"step 2 could not be copied from .*: s3://bucket/runs/tiny.*: the network or the"
    with pytest.raises(UserError, match=said):
        engine.fit()
    wire.down = False
    assert build_engine(config(tmp_path), resume="auto").state.step == 2
    wire.down = True
    with pytest.raises(UserError, match=r"^s3://bucket/runs.*: the network or the store fails"):
        build_engine(config(tmp_path / "other"))
    assert not (tmp_path / "other/runs").exists()
    wire.down = False
    with pytest.raises(UserError, match=r"^s3://Else where/runs: .* Invalid bucket name"):
        build_engine(config(tmp_path / "other", checkpoint={"to": "s3://Else where/runs"}))
