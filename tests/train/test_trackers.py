"""Weights & Biases, offline, and MLflow, into files, for real; what is read back is what their own readers find."""

import importlib.util
import json
import os
import shutil
import struct
import time

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from mcir.config import validate
from mcir.errors import UserError
from mcir.train.engine import Engine, build_engine
from mcir.train.trackers import flat
from tests.runs import tiny_config, write_dataset

SECRET = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Offline, and with what clients take from the environment and no one is to write down."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
            patch.delenv(name)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_API_KEY", SECRET)
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        yield patch


def tracked(folder, to, **overrides):
    return validate(tiny_config(folder, tracking={"log_every": 2, "to": to}, **overrides), "run")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Engine:
    """A run of four steps, tracked by both, and its continuation to the sixth."""
    for package in ("wandb", "mlflow"):
        pytest.importorskip(package, reason=f"no {package}: pip install 'mcir[trackers]'")
    folder = tmp_path_factory.mktemp("tracked")
    source = {"format": "parquet", "path": str(write_dataset(folder / "held", num_rows=3, side=48))}
    held = {"source": source, "degradation": {"name": "bicubic", "scale": 2}, "protocol": "sr"}
    validation = {"every": 2, "sets": {"held (out)": held}}
    to = ["tensorboard", "wandb", "mlflow"]
    first = build_engine(tracked(folder, to, validation=validation, steps=4))
    assert first.fit() == 0
    time.sleep(1)  # W&B names a folder by the second
    second = build_engine(tracked(folder, to, validation=validation), resume="auto")
    assert second.run_dir == first.run_dir
    assert second.fit() == 0
    return second


def wandb_records(run_dir):
    """(run ids, scalars by name and step, configuration, names of pictures) in W&B's offline files."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, scalars, configuration, pictures = [], {}, {}, set()
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, log_records(file.read_bytes())):
            for item in [*record.run.config.update, *record.config.update]:
                configuration[item.key] = json.loads(item.value_json)
            ids += [record.run.run_id] if record.HasField("run") else []
            row = {tuple(item.nested_key or [item.key]): json.loads(item.value_json) for item in record.history.item}
            for (name, *inside), value in row.items():
                if inside:  # of a picture: its file, size, …
                    pictures.add(name)
                else:
                    scalars.setdefault(name, {})[row["_step",]] = value
    return ids, scalars, configuration, pictures


def log_records(data: bytes) -> list[bytes]:
    """The records in LevelDB's log format: blocks of 32 KiB (the first begins with W&B's own 7 bytes) of pieces, each
    behind a checksum of 4 bytes, its length and its kind: whole, first, middle, last."""
    records, piece, at = [], b"", 7
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        piece = (piece if kind in (3, 4) else b"") + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(piece)
    return records


def test_wandb_goes_on_in_the_same_run(resumed):
    ids, scalars, configuration, pictures = wandb_records(resumed.run_dir)
    assert len(ids) == 2
    assert set(ids) == {json.loads((resumed.run_dir / "run.json").read_text())["trackers"]["wandb"]}
    assert list(scalars["loss/total"]) == [2, 4, 6]
    assert list(scalars["validation/held (out)/psnr"]) == [2, 4, 6]
    assert configuration["steps"] == 6
    assert configuration["optim.optimizer.lr"] == 1e-3
    assert len([name for name in pictures if name.startswith("held (out)/")]) == 2  # tracking.num_images


def test_mlflow_goes_on_in_the_same_run(resumed, environment):
    from mlflow import MlflowClient

    client = MlflowClient((resumed.run_dir / "mlruns").as_uri())
    (experiment,) = [found for found in client.search_experiments() if found.name == "mcir"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((resumed.run_dir / "run.json").read_text())["trackers"]["mlflow"]
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "loss/total")
    assert [metric.step for metric in history] == [2, 4, 6]
    assert run.data.params["optim.optimizer.lr"] == "0.001"
    assert "MLFLOW_TRACKING_URI" not in os.environ  # the next run of this process has a place of its own
    artifacts = resumed.run_dir / "mlruns" / experiment.experiment_id / run.info.run_id / "artifacts"
    assert (artifacts / "config.yaml").read_text() == (resumed.run_dir / "config.yaml").read_text()
    assert len(list((artifacts / "images").glob("held*.png"))) == 2 * 3  # two pictures, three validations


def test_no_credentials_are_written_down(resumed):
    written = [path for path in resumed.run_dir.rglob("*") if path.is_file() and path.stat().st_size < 10**6]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    pytest.importorskip("mlflow", reason="no mlflow: pip install 'mcir[trackers]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    engine = build_engine(tracked(tmp_path, ["mlflow"]))
    step = engine.step

    def step_and_lose(batches):
        if engine.state.step == 3:
            shutil.rmtree(engine.run_dir / "mlruns")
        return step(batches)

    monkeypatch.setattr(engine, "step", step_and_lose)
    assert engine.fit() == 0
    printed = capsys.readouterr().out
    assert printed.count("mlflow failed") == 1
    assert "are in TensorBoard" in printed
    seen = EventAccumulator(str(engine.run_dir / "tensorboard")).Reload()
    assert [event.step for event in seen.Scalars("loss/total")] == [6]
    assert json.loads((engine.run_dir / "run.json").read_text())["state"] == "finished"
    # What was there is gone, and a resume says so and goes on.
    longer = build_engine(tracked(tmp_path, ["mlflow"], steps=8), resume="auto")
    assert longer.fit() == 0
    assert "mlflow failed" in capsys.readouterr().out


def test_a_first_start_without_its_tracker_is_refused(tmp_path, environment):
    pytest.importorskip("mlflow", reason="no mlflow: pip install 'mcir[trackers]'")
    engine = build_engine(tracked(tmp_path, ["tensorboard", "mlflow"]))
    with environment.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(UserError, match=r"tracking\.to: mlflow could not be started: "):
            engine.fit()
    assert engine.state.step == 0
    record = json.loads((engine.run_dir / "run.json").read_text())
    assert (record["state"], record["trackers"]) == ("failed", {})


def test_what_is_not_installed_is_refused_with_the_command(tmp_path):
    missing = sorted(set(LOGGER_TYPE_TO_CLASS) - {str(name) for name in get_available_trackers()})
    if "comet_ml" not in missing or importlib.util.find_spec("comet_ml"):
        pytest.skip("comet_ml is installed here")
    with pytest.raises(UserError, match=r"^tracking\.to: comet_ml not installed: pip install comet-ml$"):
        build_engine(tracked(tmp_path, ["tensorboard", "comet"]))
    assert not (tmp_path / "runs").exists()


def test_every_tracker_of_accelerate_has_a_name_here(tmp_path):
    config = tracked(tmp_path, sorted(LOGGER_TYPE_TO_CLASS))
    assert set(config.tracking.to) == set(LOGGER_TYPE_TO_CLASS)
    with pytest.raises(UserError, match=r"tracking\.to\.0: .*'tensorboard', 'wandb', 'mlflow'.*\(given: 'wanbd'\)"):
        tracked(tmp_path, ["wanbd"])


def test_flat():
    values = {"a": {"b": 1, "c": None}, "d": [{"e": True}, {"e": 0.5}], "f": [0.9, 0.99], "g": [], "h": "x"}
    assert flat(values) == {"a.b": 1, "d.0.e": True, "d.1.e": 0.5, "f": "[0.9, 0.99]", "h": "x"}
