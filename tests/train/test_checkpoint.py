import logging
import subprocess

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open

from mcir.config import load, validate
from mcir.errors import UserError
from mcir.train.checkpoint import Checkpointer, damage
from mcir.train.engine import build_engine
from tests.runs import tiny_config


def checkpointer(folder, keep_last=3):
    return Checkpointer(Accelerator(cpu=True), folder, keep_last)


def save(made, step, value=1.0):
    return made.save(
        step, {"model.safetensors": {"w": torch.full((100,), value)}}, {"state.json": "{}"}, {"arch": "{}"}
    )


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
