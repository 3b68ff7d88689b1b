import json
import logging
import os
import shutil
import stat
import subprocess
import threading
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file

from mcir.config import load, validate
from mcir.errors import UserError
from mcir.train.checkpoint import Checkpointer, damage, is_healthy, newest, to_cpu
from mcir.train.engine import build_engine
from tests.runs import tiny_config
from tests.train.dying import killed_at_each_call


def checkpointer(folder, keep_last=3):
    return Checkpointer(Accelerator(cpu=True), folder, keep_last)


def save(made, step, value=1.0, healthy=True, keep=None):
    """And wait until it is there."""
    texts = {"state.json": json.dumps({"step": step, "healthy": healthy})}
    tensors = {"w": torch.full((100,), value)}
    path = made.save(step, {"model.safetensors": tensors}, lambda: texts, {"arch": "{}"}, keep)
    made.join()
    return path


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
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_pruning_keeps_the_last_ones_and_the_best(tmp_path):
    made = checkpointer(tmp_path, keep_last=2)
    for step in range(1, 6):
        save(made, step, keep=tmp_path / "step-00000002")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_damaged_checkpoint_pushes_out_no_good_one(tmp_path):
    made = checkpointer(tmp_path, keep_last=1)
    save(made, 1)
    (save(made, 5) / "model.safetensors").write_bytes(b"")
    save(made, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_checkpoints_of_sick_weights_push_out_no_healthy_one(tmp_path):
    made = checkpointer(tmp_path, keep_last=1)
    for step, healthy in ((1, True), (2, False), (3, False)):
        save(made, step, healthy=healthy)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    latest = made.latest()
    assert latest is not None
    assert latest.path.name == "step-00000001"
    save(made, 4)
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

    found = []
    try:
        for _ in killed_at_each_call(restore, lambda: save(made, 2, 2.0), changing):
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


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("found_out", ["before it is begun", "beside the training"])
def test_a_full_disk_is_an_error_and_loses_nothing(small_disk, found_out):
    made = checkpointer(small_disk / "checkpoints")
    first = save(made, 1)
    big = {"model.safetensors": {"w": torch.zeros(2**20)}}
    if found_out == "before it is begun":
        with pytest.raises(UserError, match=r"step 2 could not be written.*needs 4.0 MiB.*make room"):
            made.save(2, big, dict, {})
    else:
        made.save(2, {}, lambda: {"state.json": "x" * 2**21}, {})
        with pytest.raises(UserError, match=r"step 2 could not be written.*No space left"):
            made.join()
    made.join()  # is said once
    assert damage(first) is None
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-00000001"]


def held_up(made):
    """Has the thread do nothing until the event that is returned is set."""
    go_on = threading.Event()
    made._thread.submit(go_on.wait)
    return go_on


def test_steps_beside_a_save_change_nothing_of_it_and_the_copy_is_dropped_after_it(tmp_path, monkeypatch):
    engine = build_engine(validate(tiny_config(tmp_path), "run"))
    batches = iter(engine.loader)
    engine.step([next(batches)])
    path = engine.state.save(engine.checkpointer)
    engine.checkpointer.join()
    expected = content(path)
    shutil.rmtree(path)
    staged = []
    monkeypatch.setattr("mcir.train.state.to_cpu", lambda t: staged.append(weakref.ref(c := to_cpu(t))) or c)
    go_on = held_up(engine.checkpointer)
    engine.state.save(engine.checkpointer)
    engine.step([next(batches)])
    assert not path.exists()
    assert all(copy() is not None for copy in staged)
    go_on.set()
    engine.checkpointer.join()
    assert content(path) == expected
    assert len(staged) == sum(isinstance(value, bytes) for value in expected.values()) > 50
    engine.checkpointer._thread.submit(int).result()  # the thread is at something else
    assert not any(copy() is not None for copy in staged)


def content(checkpoint):
    """Each tensor's bytes and the state's text."""
    files = [(file.name, load_file(file)) for file in checkpoint.glob("*.safetensors")]
    tensors = {f"{name}:{key}": value.numpy().tobytes() for name, file in files for key, value in file.items()}
    return tensors | {"state": (checkpoint / "state.json").read_text()}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_an_error_ends_waits_for_the_checkpoint_that_is_being_written(tmp_path, monkeypatch, error):
    engine = build_engine(validate(tiny_config(tmp_path, checkpoint={"every": 3}), "run"))
    step, path = engine.step, engine.run_dir / "checkpoints" / "step-00000003"
    go_on = held_up(engine.checkpointer)

    def failing(batches):
        if engine.state.step == 4:
            assert not path.exists()
            threading.Timer(0.3, go_on.set).start()
            raise error("in the middle of a step")
        return step(batches)

    monkeypatch.setattr(engine, "step", failing)
    with pytest.raises(error, match="middle"):
        engine.fit()
    assert damage(path) is None
    assert not (engine.run_dir / "lock.json").exists()  # released only then


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


def test_others_may_read_a_checkpoint_where_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        path = save(checkpointer(tmp_path), 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o644}
