"""A run directory says how its run is: through starts, a stop, a failure, sudden death and the end."""

import json
import os
import signal
import subprocess
import sys
from hashlib import sha256
from importlib.metadata import distributions

import fsspec
import pytest
from rich.console import Console

from mcir.archs import parse
from mcir.cli import main
from mcir.config import load, validate
from mcir.errors import UserError
from mcir.train.engine import build_engine
from mcir.train.record import FILE, Record, read, table
from mcir.weights.files import save_weights
from tests.distributed.launch import ROOT, environment, run, write_config
from tests.runs import tiny_config

SETS = {"seen": {"protocol": "sr", "degradation": {"name": "bicubic", "scale": 2}}}


def record_of(folder, name="tiny"):
    return json.loads((folder / "runs" / name / "run.json").read_text())


def test_a_run_from_start_to_finish(tmp_path):
    values = tiny_config(tmp_path)
    source = values["data"]["train"][0]["source"]
    values["validation"] = {"every": 3, "sets": {"seen": SETS["seen"] | {"source": source}}}
    config = validate(values, "test")
    engine = build_engine(config)
    begun = record_of(tmp_path)
    assert (begun["state"], begun["step"], begun["steps"], begun["best"]) == ("running", 0, 6, None)
    assert engine.fit() == 0
    record = record_of(tmp_path)
    assert (record["state"], record["step"], record["message"]) == ("finished", 6, None)
    assert record["images_per_s"] > 0
    assert engine.state.best is not None
    expected = {"metric": "seen/psnr", "value": engine.state.best[0], "checkpoint": engine.state.best[1]}
    assert record["best"] == expected
    assert load([engine.run_dir / record["config"]]) == config
    (start,) = record["starts"]
    assert (start["step"], start["reason"]) == (0, "begun")
    assert start["environment"]["strategy"] == "single"
    assert start["environment"]["world_size"] == len(start["environment"]["processes"]) == 1
    versions = start["environment"]["versions"]
    assert versions.keys() >= {"torch", "accelerate"}
    assert ("mcir" in versions) == any(distributions(name="mcir"))


def test_the_weights_that_a_run_begins_from_are_pinned(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    values = tiny_config(tmp_path)
    arch = parse(values["arch"])
    save_weights(tmp_path / "w", arch.build().state_dict(), {"arch": arch.model_dump_json()})
    data = (tmp_path / "w").read_bytes()
    fsspec.filesystem("memory").pipe("/bucket/w.safetensors", data)
    engine = build_engine(validate(values | {"init_from": "memory://bucket/w.safetensors", "steps": 2}, "test"))
    (start,) = record_of(tmp_path)["starts"]
    expected = f"memory://bucket/w.safetensors#sha256={sha256(data).hexdigest()}"
    assert start["environment"]["init_from"] == expected
    assert engine.fit() == 0
    gone = validate(values | {"init_from": "memory://bucket/gone.safetensors"}, "test")
    assert build_engine(gone, resume="auto").state.step == 2  # what the checkpoint replaces is not asked for again
    assert record_of(tmp_path)["starts"][1]["environment"]["init_from"] is None
    with pytest.raises(UserError, match="init_from: the URL holds credentials") as error:
        validate(values | {"init_from": "s3://key:secret@bucket/w.pth"}, "test")
    assert "secret" not in str(error.value)


def test_long_steps_and_validations_keep_the_record_fresh(tmp_path, monkeypatch):
    """A health check looks at its age: nothing may take long without a word."""
    values = tiny_config(tmp_path, tracking={"log_every": 100}, checkpoint={"every": 100})
    source = values["data"]["train"][0]["source"]  # 24 images
    values["validation"] = {"every": 100, "sets": {"seen": SETS["seen"] | {"source": source}}}
    engine = build_engine(validate(values, "test"))
    steps = []
    monkeypatch.setattr(engine.record, "update", lambda step=None, **values: steps.append(step))
    monkeypatch.setattr("mcir.train.record.FRESH_S", -1.0)
    engine.fit()
    assert [steps.count(step) for step in range(1, 6)] == [1] * 5
    assert steps.count(6) >= 24


def test_restarts_are_listed_with_the_step_and_the_reason(tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path, steps=100_000, tracking={"log_every": 1}))
    command = [sys.executable, "-m", "mcir", "train", str(config), "--resume", "auto"]

    def signalled_at(beginning, number):
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert any(line.startswith(beginning) for line in process.stdout)
        os.kill(process.pid, number)
        process.communicate(timeout=60)

    signalled_at("step 4/", signal.SIGTERM)
    stopped = record_of(tmp_path)
    assert stopped["state"] == "preempted"
    signalled_at(f"step {stopped['step'] + 4}/", signal.SIGKILL)
    killed = record_of(tmp_path)
    assert killed["state"] == "running"
    values = tiny_config(tmp_path, steps=killed["step"])
    assert build_engine(validate(values, "test"), resume="auto").fit() == 0
    record = record_of(tmp_path)
    assert (record["state"], record["step"]) == ("finished", killed["step"])
    reasons = [start["reason"] for start in record["starts"]]
    assert reasons == ["begun", "it was preempted", "the process before ended without a word"]
    assert record["starts"][1]["step"] == stopped["step"]
    assert stopped["step"] < record["starts"][2]["step"] < killed["step"]
    assert build_engine(validate(values, "test"), resume="auto").fit() == 0  # a finished run stays finished
    assert record_of(tmp_path)["state"] == "finished"


def test_a_failure_is_written_down_with_its_message(tmp_path):
    values = tiny_config(tmp_path)
    engine = build_engine(validate(values, "test"))
    for file in (tmp_path / "data").glob("*.parquet"):
        file.write_bytes(b"no parquet")
    with pytest.raises(Exception, match=r"\w") as failure:
        engine.fit()
    record = record_of(tmp_path)
    assert record["state"] == "failed"
    assert str(failure.value)[:50] in record["message"]
    for file in (tmp_path / "data").glob("*.parquet"):
        file.unlink()
    with pytest.raises(UserError):
        build_engine(validate(tiny_config(tmp_path, init_from=str(tmp_path / "none.pth")), "test"), resume="auto")
    assert "none.pth" in record_of(tmp_path)["message"]


def test_two_processes_keep_one_record(tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path))
    finished = run("fsdp2_cpu", "train", str(config))
    assert finished.returncode == 0, finished.stdout
    (start,) = record_of(tmp_path)["starts"]
    assert (start["environment"]["strategy"], start["environment"]["world_size"]) == ("fsdp2", 2)
    assert len(start["environment"]["processes"]) == 2


def keep(folder, name, **arguments):
    (folder / name).mkdir()
    return Record(folder / name, name=name, steps=100, config="name: x\n", **arguments)


def test_the_list_for_people_and_for_scripts(tmp_path):
    keep(tmp_path, "a").end(0, 100)
    second = keep(tmp_path, "b", step=20, origin="elsewhere/checkpoints/step-00000020")
    second.update(
        step=50, images_per_s=12.34, best={"metric": "x/psnr", "value": 30.126, "checkpoint": "step-00000040"}
    )
    with pytest.raises(UserError), second:
        raise UserError("no more data")
    listed = subprocess.run(
        [sys.executable, "-m", "mcir", "runs", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment() | {"COLUMNS": "160"},
    ).stdout.splitlines()
    assert listed[1].split()[:3] == ["a", "finished", "100/100"]
    for shown in ("failed: no more data", "50/100", "x/psnr 30.13 at step-00000040", "12.3"):
        assert shown in listed[2]
    as_json = subprocess.run(
        [sys.executable, "-m", "mcir", "runs", str(tmp_path), "--json"], capture_output=True, check=True, cwd=ROOT
    ).stdout
    assert [record["state"] for record in json.loads(as_json)] == ["finished", "failed"]
    assert json.loads(as_json)[1]["starts"][0]["reason"] == "begun from elsewhere/checkpoints/step-00000020"


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no runs"):
        read(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="not a record"):
        read(tmp_path)


def test_one_corrupt_record_hides_no_other(tmp_path, capsys):
    keep(tmp_path, "a")
    keep(tmp_path, "b").end(0, 100)
    (tmp_path / "a" / "run.json").write_text('{"state":')
    assert [record["state"] for record in read(tmp_path)] == ["unreadable", "finished"]
    Console(width=160).print(table(read(tmp_path)))
    assert "unreadable: run.json is not a record of a run" in capsys.readouterr().out


@pytest.mark.parametrize("odd", [{"updated": "yesterday"}, {"starts": None}, {"images_per_s": "fast"}])
def test_a_record_of_other_values_is_unreadable(tmp_path, odd):
    whole = {"name": "a", "state": "finished", "message": "[/data/x]", "step": 1, "steps": 1, "best": None}
    whole |= {"images_per_s": 1.0, "starts": [], "updated": "2026-01-01T00:00:00+00:00"}
    for name, values in (("whole", whole), ("odd", whole | odd)):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_text(json.dumps(values))
    assert [record["state"] for record in read(tmp_path)] == ["unreadable", "finished"]


def test_what_runs_say_is_printed_as_it_is(tmp_path, monkeypatch, capsys):
    """In brackets, rich would see commands."""
    values = {"name": "a", "state": "failed", "message": "no file net.pth[params] in [/data/x]", "step": 1, "steps": 1}
    values |= {"best": None, "images_per_s": None, "starts": [], "updated": None}
    (tmp_path / FILE).write_text(json.dumps(values | {"updated": "2026-01-01T00:00:00+00:00"}))
    monkeypatch.setattr(sys, "argv", ["mcir", "runs", str(tmp_path)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "no file net.pth[params] in [/data/x]" in capsys.readouterr().out


def test_a_broken_record_does_not_keep_the_run_from_going_on(tmp_path):
    (tmp_path / "run.json").write_text('{"state":')
    Record(tmp_path, name="x", steps=1, config="").end(75, 1)
    assert read(tmp_path)[0]["state"] == "preempted"
