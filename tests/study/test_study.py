"""Whole studies of tiny networks: real runs in processes of their own, and the report that they make."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from mcir.cli import app
from mcir.errors import UserError
from mcir.section import to_yaml
from mcir.study.study import study
from mcir.train import lock
from mcir.train.checkpoint import newest
from tests.distributed.launch import run
from tests.runs import tiny_config, write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A config with negatives, and overlays beside it."""
    folder = tmp_path_factory.mktemp("study")
    source = {"format": "parquet", "path": str(write_dataset(folder / "heldout", num_rows=3, num_shards=1))}
    sets = {"held": {"source": source, "degradation": {"name": "bicubic", "scale": 2}, "protocol": "sr"}}
    values = tiny_config(folder, steps=4, validation={"every": 2, "sets": sets})
    values["checkpoint"] = {"every": 2}
    write(folder / "base.yaml", values)
    write(folder / "spn.yaml", {"seed": 0})
    write(folder / "plain.yaml", {"objective": {"contrast": None}})
    write(
        folder / "ruin.yaml", {"objective": {"contrast": None}, "optim": {"max_skipped": 0, "optimizer": {"lr": 1e30}}}
    )
    return folder


def write(path: Path, values) -> None:
    path.write_text(to_yaml(values))


def arms(folder: Path, *names: str) -> list[str]:
    return [str(folder / f"{name}.yaml") for name in names]


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """Two arms by two seeds, trained in turn."""
    output = folder / "x"
    code = study([str(folder / "base.yaml")], [], arms(folder, "plain", "spn"), output, num_seeds=2)
    assert code == 0
    return output


def test_arms_by_seeds_are_trained_and_reported(trained):
    names = ["plain.seed0", "spn.seed0", "plain.seed1", "spn.seed1"]
    assert sorted(path.name for path in (trained / "runs").iterdir() if path.is_dir()) == sorted(names)
    content = json.loads((trained / "study.json").read_text(), parse_constant=pytest.fail)
    assert [run["name"] for run in content["runs"]] == names
    assert {run["state"] for run in content["runs"]} == {"finished"}
    assert content["arms"]["spn"]["changes"].keys() == {"objective.contrast"}
    assert all(run["hours"] > 0 for run in content["runs"])

    # The paired difference is that of the runs' own records of what they measured.
    means = {name: json.loads((trained / "runs" / name / "run.json").read_text())["best"]["value"] for name in names}
    last = {run["name"]: run["scores"]["held"]["psnr"] for run in content["runs"]}
    assert all(last[name] <= means[name] + 1e-9 for name in names)
    entry = next(r for r in content["results"] if (r["metric"], r["arm"]) == ("psnr", "spn"))
    by_seed = [last[f"spn.seed{seed}"] - last[f"plain.seed{seed}"] for seed in (0, 1)]
    assert entry["difference"]["mean"] == pytest.approx(np.mean(by_seed), abs=1e-9)
    half = 12.706205 * np.std(by_seed, ddof=1) / np.sqrt(2)
    assert entry["difference"]["high"] - entry["difference"]["mean"] == pytest.approx(half, rel=1e-6)
    assert abs(entry["difference"]["mean"]) > 0
    text = (trained / "study.md").read_text()
    assert "no difference is shown" in text
    assert "| spn | 2 |" in text.replace("|  |", "|")
    for name in ("differences.png", "curves.png"):
        assert Image.open(trained / name).size[0] > 500


def test_a_seed_has_one_start_and_one_order(trained):
    """plain and spn of one seed began alike: at step 1 both saw the same samples with the same weights."""
    order = {}
    for name in ("plain.seed0", "spn.seed0", "plain.seed1"):
        checkpoint = trained / "runs" / name / "checkpoints" / "step-00000002"
        state = json.loads((checkpoint / "state.json").read_text())
        order[name] = state["order"]
        assert load_file(checkpoint / "model.safetensors")
    assert order["plain.seed0"] == order["spn.seed0"]
    assert order["plain.seed0"] != order["plain.seed1"]


def test_again_does_nothing_but_the_report(trained, folder, capfd):
    before = {path: path.stat().st_mtime_ns for path in (trained / "runs").rglob("run.json")}
    report = (trained / "study.json").read_bytes()
    (trained / "study.json").unlink()
    assert study([str(folder / "base.yaml")], [], arms(folder, "plain", "spn"), trained, num_seeds=2) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((trained / "study.json").read_bytes())["results"] == json.loads(report)["results"]
    assert capfd.readouterr().out.count("is finished") == 4


@pytest.mark.parametrize("options", [{}, {"report_only": True}, {"dry_run": True}, {"only": 0}])
def test_no_run_is_trained_listed_or_reported_under_settings_it_never_had(trained, folder, options):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    with pytest.raises(UserError, match=r"trained with other settings \(optim\.optimizer\.lr: 0\.5, not 0\.001"):
        study([str(folder / "base.yaml")], ["optim.optimizer.lr=0.5"], arms(folder, "plain", "spn"), trained, **options)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_what_does_not_go_together_is_refused_at_once(trained, folder):
    base, chosen = [str(folder / "base.yaml")], arms(folder, "plain", "spn")
    with pytest.raises(UserError, match="--only 1 trains one run and --report-only reports on all: give one"):
        study(base, [], chosen, trained, only=1, report_only=True)
    told = CliRunner().invoke(
        app, ["study", *base, "--arms", *chosen, "--output", str(trained), "--seeds", "99999999", "--dry-run"]
    )
    assert told.exit_code == 2
    assert "'--seeds': Input should be less than or equal to 1000" in told.output


def test_a_failed_run_stays_failed_and_costs_only_itself(folder, trained, capfd):
    """A third arm, whose learning rate ruins it, joins the study; `--only` takes one run of it."""
    base, chosen = [str(folder / "base.yaml")], arms(folder, "plain", "spn", "ruin")
    assert study(base, [], chosen, trained, num_seeds=2, only=2) == 1
    assert study(base, [], chosen, trained, num_seeds=2, only=1) == 0  # finished before
    capfd.readouterr()
    assert study(base, [], chosen, trained, num_seeds=1) == 1
    assert "2 ruin.seed0 has failed and stays so" in capfd.readouterr().out
    content = json.loads((trained / "study.json").read_text())
    assert {run["arm"]: run["state"] for run in content["runs"]} == {
        "plain": "finished",
        "spn": "finished",
        "ruin": "failed",
    }
    assert "`ruin.seed0` is not in the tables: failed" in (trained / "study.md").read_text()
    with pytest.raises(UserError, match="there are 3 runs"):
        study(base, [], chosen, trained, num_seeds=1, only=3)


@pytest.mark.slow
def test_stopped_and_killed_it_goes_on(folder):
    """SIGTERM lets the run save: 75. The run ends as one that was never stopped."""
    output = folder / "stopped"
    command = [sys.executable, "-m", "mcir", "study", str(folder / "base.yaml"), "steps=60", "validation.every=60"]
    command += ["checkpoint.every=60", "--arms", *arms(folder, "plain", "spn"), "--seeds", "1", "--output", str(output)]
    first = subprocess.Popen(command, start_new_session=True)
    run_dir = output / "runs" / "plain.seed0"
    while not list(run_dir.rglob("events.out.*")):
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.wait() in (75, 0)
    assert subprocess.run(command, check=False).returncode == 0
    whole = folder / "whole"
    assert subprocess.run([*command[:-1], str(whole)], check=False).returncode == 0
    for name in ("plain.seed0", "spn.seed0"):
        both = [load_file(o / "runs" / name / "checkpoints/step-00000060/model.safetensors") for o in (output, whole)]
        assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])
    assert not (output / "runs" / "spn.seed0-2").exists()


def test_a_killed_study_takes_its_run_along_and_leaves_alone_what_another_process_trains(folder, capfd):
    output, run_dir = folder / "killed", folder / "killed" / "runs" / "plain.seed0"
    base, changed, chosen = [str(folder / "base.yaml")], ["steps=20000"], arms(folder, "plain", "spn")
    command = [sys.executable, "-m", "mcir", "study", *base, *changed, "--arms", *chosen, "--seeds", "1", "--only", "0"]
    command += ["--output", str(output)]
    killed = subprocess.Popen(command)
    while not list(run_dir.rglob("step-*")):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    end = time.monotonic() + 60
    while (run_dir / "lock.json").exists():
        assert time.monotonic() < end, "the run goes on without its study"
        time.sleep(0.05)
    record = json.loads((run_dir / "run.json").read_text())
    assert record["state"] == "preempted"
    assert newest(run_dir / "checkpoints").name == f"step-{record['step']:08}"
    assert study(base, changed, chosen, output, num_seeds=1, report_only=True) == 1  # it is not done

    claim = lock.acquire(run_dir)
    capfd.readouterr()
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert f"0 plain.seed0 is being trained by another process: {run_dir} is being written by" in other.stdout
    assert study(base, changed, chosen, output, num_seeds=1, only=0) == 1  # this process has the lock, its child not
    claim.release()
    assert "0 plain.seed0 ended before training after" in capfd.readouterr().out
    assert not (run_dir / "cost.json").exists()
    assert json.loads((run_dir / "run.json").read_text()) == record


@pytest.mark.slow
def test_under_a_launcher_its_processes_share_each_run(folder):
    """One network on two processes, run after run; the same pairs as in one process."""
    output, options = folder / "launched", ["--seeds", "1"]
    chosen = [
        "study",
        str(folder / "base.yaml"),
        "--arms",
        *arms(folder, "plain", "spn"),
        *options,
        "--output",
        str(output),
    ]
    done = run("ddp_cpu", *chosen, timeout=900)
    assert done.returncode == 0, done.stdout
    content = json.loads((output / "study.json").read_text())
    assert {run["state"] for run in content["runs"]} == {"finished"}
    record = json.loads((output / "runs" / "spn.seed0" / "run.json").read_text())
    assert record["starts"][-1]["environment"]["world_size"] == 2
    again = run("ddp_cpu", *chosen, timeout=900)
    assert again.stdout.count("is finished") == 2, again.stdout
    other = run("ddp_cpu", *chosen, "optim.optimizer.lr=0.5", "--report-only", timeout=900)
    assert other.returncode == 1
    for place in ("mcir: ", "mcir: process 1: "):
        assert f"{place}{output}/runs/plain.seed0 was trained with other settings (" in other.stdout, other.stdout


@pytest.mark.slow
def test_equal_time_measures_and_side_by_side_trains(folder):
    """Deep features cost many times a tiny network's step, so that arm gets fewer steps in the time of plain's."""
    features = {"network": "vgg19", "layers": {"relu5_4": 1.0}, "weights": "random"}
    write(folder / "deep.yaml", {"objective": {"contrast": {"features": features}}})
    output, chosen = folder / "time", arms(folder, "plain", "deep")
    base, options = [str(folder / "base.yaml")], ["steps=40", "validation.every=40"]
    with pytest.raises(UserError, match="run the same command with --dry-run once"):
        study(base, options, chosen, output, num_seeds=1, equal="time", only=0)
    assert study(base, options, chosen, output, num_seeds=1, equal="time", dry_run=True) == 0
    steps = json.loads((output / "steps.json").read_text())["steps"]
    assert steps["plain"] == 40
    assert 1 <= steps["deep"] < 40
    assert study(base, options, chosen, output, num_seeds=1, equal="time", jobs=2) == 0
    content = json.loads((output / "study.json").read_text())
    assert [run["step"] for run in content["runs"]] == [40, steps["deep"]]
    assert json.loads((output / "steps.json").read_text())["steps"] == steps
    with pytest.raises(UserError, match=r"arm plain was timed with other settings \(steps: 80, not 40\)"):
        study(base, ["steps=80", "validation.every=40"], chosen, output, num_seeds=1, equal="time", dry_run=True)
