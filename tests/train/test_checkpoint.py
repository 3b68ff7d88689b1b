import json
import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file

from mcir.config import load, validate
from mcir.errors import UserError
from mcir.train.checkpoint import Checkpointer, damage, is_healthy, newest
from mcir.train.engine import build_engine
from tests.runs import tiny_config
from tests.train.dying import killed_at_each_call


def checkpointer(folder, keep_last=3):
    return Checkpointer(Accelerator(cpu=True), folder, keep_last)


def save(made, step, value=1.0, healthy=True):
    texts = {"state.json": json.dumps({"step": step, "healthy": healthy})}
    return made.save(step, {"model.safetensors": {"w": torch.full((100,), value)}}, texts, {"arch": "{}"})


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_found_out_and_the_one_before_is_used(tmp_path, caplog, harm):
    made = checkpointer(tmp_path)
    before, newest = save(made, 1), save(made, 2)
    file = newest / ("manifest.json" if harm == "manifest" else "model.safetensors")
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[-5] ^= 1
    if harm == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-7] if harm in ("truncate", "manifest") else content)
    assert damage(newest)
    assert damage(before) is None
    with caplog.at_level(logging.WARNING):
        latest = made.latest()
    assert latest is not None
    assert latest.path == before
    assert "is damaged" in caplog.text


def test_an_unfinished_checkpoint_is_never_seen(tmp_path):
    made = checkpointer(tmp_path)
    (tmp_path / ".step-00000005.partial").mkdir(parents=True)
    assert made.latest() is None
    save(made, 6)
    made.prune(keep=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_pruning_keeps_the_last_ones_and_the_best(tmp_path):
    made = checkpointer(tmp_path, keep_last=2)
    paths = [save(made, step) for step in range(1, 6)]
    made.prune(keep=paths[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_damaged_checkpoint_pushes_out_no_good_one(tmp_path):
    made = checkpointer(tmp_path, keep_last=1)
    save(made, 1)
    (save(made, 5) / "model.safetensors").write_bytes(b"")
    save(made, 2)
    made.prune(keep=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_checkpoints_of_sick_weights_push_out_no_healthy_one(tmp_path):
    made = checkpointer(tmp_path, keep_last=1)
    for step, healthy in ((1, True), (2, False), (3, False)):
        save(made, step, healthy=healthy)
        made.prune(keep=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    latest = made.latest()
    assert latest is not None
    assert latest.path.name == "step-00000001"
    save(made, 4)
    made.prune(keep=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


SITUATIONS = {
    "the first": [],
    "the next": [(1, True, False)],
    "the same step once more": [(2, True, False)],
    "after a damaged one": [(1, True, False), (2, True, True)],
    "before a damaged one": [(1, True, False), (3, True, True)],
    "after sick ones": [(1, True, False), (2, False, False)],
}


@pytest.mark.parametrize("changing", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_killed_at_any_system_call_of_a_save_it_leaves_a_whole_healthy_checkpoint(tmp_path, situation, changing):
    made = checkpointer(tmp_path / "now", keep_last=1)
    before = checkpointer(tmp_path / "before")
    for step, healthy, damaged in SITUATIONS[situation]:
        path = save(before, step, 1.0, healthy)
        if damaged:
            (path / "model.safetensors").write_bytes(b"")
    before.folder.mkdir(exist_ok=True)

    def restore():
        shutil.rmtree(made.folder, ignore_errors=True)
        shutil.copytree(before.folder, made.folder)

    def work():
        save(made, 2, 2.0)
        made.prune(keep=None)

    found = []
    try:
        for _ in killed_at_each_call(restore, work, changing):
            path = newest(made.folder)
            found.append(path and (path.name, float(load_file(path / "model.safetensors")["w"][0]), is_healthy(path)))
    except OSError as error:
        pytest.skip(f"no ptrace here: {error}")
    first = (newest(before.folder) or Path("none")).name
    old = [(first, 1.0, True), (first + ".old", 1.0, True)] if SITUATIONS[situation] else [None]
    new = [("step-00000002", 2.0, True)]
    changed = found.index(new[0])
    assert 15 < changed < len(found) - 1  # the calls that change files; how many others there are is the allocator's
    assert set(found[:changed]) <= set(old)
    assert set(found[changed:]) == set(new)
    assert [path.name for path in made.folder.iterdir()] == ["step-00000002"]


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path):
    """On a real file system of 1 MiB."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        made = checkpointer(tmp_path / "checkpoints")
        first = save(made, 1)
        with pytest.raises(UserError, match=r"step 2 could not be written.*make room"):
            made.save(2, {"model.safetensors": {"w": torch.zeros(2**20)}}, {}, {})
        assert damage(first) is None
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.fixture
def finished(tmp_path):
    engine = build_engine(validate(tiny_config(tmp_path, steps=3), "run"))
    engine.fit()
    return engine


def test_exported_weights_say_what_they_are(finished):
    path = finished.run_dir / "checkpoints" / "step-00000003" / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert '"edsr"' in file.metadata()["arch"]
        assert "conv_first.weight" in file.keys()  # noqa: SIM118
    assert load([path.with_name("config.yaml")]) == finished.config


def test_resume_refuses_what_it_cannot_continue(finished, tmp_path):
    checkpoint = str(finished.run_dir / "checkpoints" / "step-00000003")
    values = tiny_config(tmp_path, steps=6)
    with pytest.raises(UserError, match="neither a run directory nor a checkpoint"):
        build_engine(validate(values, "run"), resume=str(tmp_path))
    other = values | {"arch": {"name": "edsr", "scale": 2, "num_features": 7, "num_blocks": 3}}
    with pytest.raises(UserError, match=r"has no body\.2"):
        build_engine(validate(other, "run"), resume=checkpoint)
    wider = values | {"arch": {"name": "edsr", "scale": 2, "num_features": 9, "num_blocks": 2}}
    with pytest.raises(UserError, match="another shape"):
        build_engine(validate(wider, "run"), resume=checkpoint)
    (finished.run_dir / "checkpoints" / "step-00000003" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        build_engine(validate(values, "run"), resume=checkpoint)


def test_a_second_run_of_the_same_name_takes_a_directory_of_its_own(finished, tmp_path):
    again = build_engine(validate(tiny_config(tmp_path, steps=1), "run"))
    assert (finished.run_dir.name, again.run_dir.name) == ("tiny", "tiny-2")
    assert build_engine(validate(tiny_config(tmp_path, steps=1), "run"), resume="auto").run_dir.name == "tiny-2"
    assert again.state.step == 0


def test_nothing_is_unpickled(finished):
    suffixes = {path.suffix for path in (finished.run_dir / "checkpoints").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".yaml"}
