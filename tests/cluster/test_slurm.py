"""launch/slurm on a real Slurm of two nodes: preemption, a crash and a time limit cost only time."""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.slurm import TOOLS, Slurm
from tests.cluster.tools import end_leftovers, needs_root, tool
from tests.distributed.launch import ROOT, environment, run, write_config
from tests.runs import tiny_config

pytestmark = pytest.mark.cluster

SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
STUDY = ROOT / "launch" / "slurm" / "study.sbatch"
STEPS = 400


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    for name in TOOLS:
        tool(name)
    needs_root()
    end_leftovers()
    with Slurm(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


class Job:
    """train.sbatch, submitted to both nodes."""

    def __init__(
        self, slurm: Slurm, folder: Path, *arguments: str, options: Sequence[str] = (), **variables: str
    ) -> None:
        self.slurm, self.output, self.run_dir = slurm, folder / "job.out", folder / "runs" / "job"
        ours = {"NAME": "job", "RUNS_DIR": str(folder / "runs"), "LAUNCH": "fsdp2_cpu", "GPUS_PER_NODE": "1"}
        ours |= {
            "MCIR_PYTHON": f"env WRAPPED=1 {sys.executable}",
            "MASTER_ADDR": "127.0.0.1",
            "TIMEOUT_S": "120",
            "GRACE_S": "20",
        }
        options = ["--parsable", "--nodes=2", f"--chdir={ROOT}", f"--output={self.output}", *options]
        self.id = slurm.run(
            "sbatch", "--partition=normal", *options, str(SCRIPT), *arguments, **environment() | ours | variables
        ).strip()
        assert self.id.isdigit(), self.id

    def show(self, field: str) -> str:
        return self.slurm.show(self.id, field)

    def state(self) -> str:
        return self.show("JobState")

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def record(self) -> dict:
        return json.loads((self.run_dir / "run.json").read_text())

    def wait_for(self, condition, timeout: float = 600) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{self.state()}\n{self.text()[-4000:]}"
            time.sleep(0.1)

    def wait_for_start(self, number: int, steps: int = 3) -> None:
        """Until the run has made some steps since its start of this number."""

        def made() -> bool:
            starts = self.record()["starts"] if (self.run_dir / "run.json").exists() else []
            assert len(starts) <= number, f"it ended by itself: {starts[-1]['reason']}\n{self.text()[-4000:]}"
            return len(starts) == number and self.record()["step"] >= starts[-1]["step"] + steps

        self.wait_for(made)

    def start_again(self, restart: int) -> None:
        """When it was requeued so often, let the job start at once instead of in two minutes."""
        self.wait_for(lambda: (self.state(), self.show("Restarts")) == ("PENDING", str(restart)) and not self.workers())
        time.sleep(5)  # a job that starts in the second in which it was requeued has its credential revoked
        self.slurm.run("scontrol", "update", f"jobid={self.id}", "StartTime=now")

    def workers(self) -> list[int]:
        """Pids of the processes that train: they alone have RANK in their environment."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
            except OSError:
                continue
            if f"SLURM_JOB_ID={self.id}".encode() in variables and any(v.startswith(b"RANK=") for v in variables):
                found.append(int(entry.name))
        return sorted(found)


def final_tensors(run_dir: Path, steps: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step-{steps:08d}"
    return {
        f"{file.name} {key}": value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()
    }


def test_preempted_crashed_and_out_of_time_it_ends_with_the_weights_of_an_undisturbed_run(slurm, tmp_path):
    values = tiny_config(tmp_path, steps=STEPS, checkpoint={"every": 20}, tracking={"log_every": 1})
    config = write_config(tmp_path / "config.yaml", values)
    job = Job(slurm, tmp_path, str(config))

    job.wait_for_start(1)
    urgent = slurm.run(
        "sbatch", "--parsable", "--nodes=2", "--exclusive", "--partition=urgent", "--output=/dev/null", "--wrap=sleep 1"
    )
    job.wait_for(lambda: slurm.show(urgent.strip(), "JobState") == "COMPLETED")
    job.start_again(1)
    job.wait_for_start(2)
    assert job.record()["starts"][1]["reason"] == "it was preempted"
    assert not (job.run_dir / "crashes.txt").exists()

    os.kill(job.workers()[0], signal.SIGKILL)
    job.start_again(2)
    job.wait_for_start(3)
    assert len((job.run_dir / "crashes.txt").read_text().splitlines()) == 1

    slurm.run("scancel", "--signal=USR1", "--batch", job.id)  # what --signal=B:USR1@120 sends before the time limit
    job.start_again(3)
    job.wait_for(lambda: job.state() == "COMPLETED")
    record = job.record()
    assert record["state"] == "finished"
    assert [start["environment"]["world_size"] for start in record["starts"]] == [2] * 4
    assert {place["host"] for place in record["starts"][0]["environment"]["processes"]} == {"n1", "n2"}
    assert record["starts"][3]["reason"] == "it was preempted"
    assert len((job.run_dir / "crashes.txt").read_text().splitlines()) == 1

    undisturbed = run("fsdp2_cpu", "train", str(config), "name=undisturbed", timeout=900)
    assert undisturbed.returncode == 0, undisturbed.stdout
    expected, got = final_tensors(tmp_path / "runs" / "undisturbed", STEPS), final_tensors(job.run_dir, STEPS)
    assert expected.keys() == got.keys()
    assert len({key.split()[0] for key in got}) == 6  # model, ema, negatives, what follows, two shares of the moments
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_a_lost_node_is_done_without_and_there_again_after_a_requeue(slurm, tmp_path):
    values = tiny_config(tmp_path, steps=100_000, checkpoint={"every": 20}, tracking={"log_every": 1})
    config = write_config(tmp_path / "config.yaml", values)
    job = Job(slurm, tmp_path, str(config), options=["--no-kill"], MIN_NODES="1", TIMEOUT_S="30")
    job.wait_for_start(1, steps=30)
    slurm.cut_power("n2")
    try:
        job.wait_for_start(2)
        assert job.state() == "RUNNING"
        assert job.show("NodeList") == "n1"
    finally:
        slurm.bring_back("n2")
    slurm.run("scancel", "--signal=USR1", "--batch", job.id)
    job.start_again(1)
    job.wait_for_start(3)
    starts = job.record()["starts"]
    slurm.run("scancel", job.id)
    assert [start["environment"]["world_size"] for start in starts] == [2, 1, 2]
    assert starts[1]["step"] >= 20
    assert starts[1]["step"] % 20 == 0
    assert starts[2]["reason"] == "it was preempted"
    assert not (job.run_dir / "crashes.txt").exists()


def test_a_run_that_always_crashes_is_requeued_so_often_and_no_more(slurm, tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path, steps=STEPS))
    for file in (tmp_path / "data").glob("*.parquet"):
        file.write_bytes(b"no parquet")
    job = Job(slurm, tmp_path, str(config), MAX_CRASHES="1")
    job.start_again(1)
    job.wait_for(lambda: job.state() == "FAILED")
    assert "crashed 2 times: not requeued" in job.text()
    assert len((job.run_dir.parent / "crashes.txt").read_text().splitlines()) == 2
    assert not job.run_dir.exists()  # training never began


def test_arguments_come_before_variables_and_other_runs_are_left_alone(slurm, tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path, steps=4))
    before = run("single", "train", str(config), "name=mine-2")
    assert before.returncode == 0, before.stdout
    job = Job(slurm, tmp_path, str(config), "name=mine", f"runs_dir={tmp_path / 'runs'}", RUNS_DIR="elsewhere")
    job.wait_for(lambda: job.state() == "COMPLETED")
    assert f"{tmp_path / 'runs' / 'mine'}: finished" in job.text()
    assert len(json.loads((tmp_path / "runs" / "mine-2" / "run.json").read_text())["starts"]) == 1


def test_a_mistake_in_the_config_is_not_tried_again(slurm, tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path))
    job = Job(slurm, tmp_path, str(config), "optim.optimizer.lrr=1")
    job.wait_for(lambda: job.state() == "FAILED")
    assert "do you mean lr?" in job.text()
    assert not job.run_dir.exists()


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, tmp_path):
    values = tiny_config(tmp_path, steps=100_000, tracking={"log_every": 1})
    job = Job(slurm, tmp_path, str(write_config(tmp_path / "config.yaml", values)))
    job.wait_for_start(1)
    slurm.run("scancel", job.id)
    job.wait_for(lambda: not job.workers() and job.state() == "CANCELLED")
    assert job.record()["state"] == "preempted"
    saved = sorted((job.run_dir / "checkpoints").glob("step-*"))
    assert saved[-1].name == f"step-{job.record()['step']:08d}"
    time.sleep(3)
    assert job.state() == "CANCELLED"


def test_an_array_trains_a_study_that_is_reported_when_it_has_ended(slurm, tmp_path):
    values = tiny_config(tmp_path, steps=4)
    values["validation"] = {"every": 4, "sets": {"seen": values["data"]["train"][0] | {"protocol": "sr"}}}
    base = write_config(tmp_path / "base.yaml", values)
    arms = [
        write_config(tmp_path / "plain.yaml", {"objective": {"contrast": None}}),
        write_config(tmp_path / "spn.yaml", {"seed": 0}),
    ]
    arguments = list(map(str, [base, "--arms", *arms, "--seeds", 1, "--output", tmp_path / "study"]))
    options = ["--parsable", "--array=0-1", f"--chdir={ROOT}", f"--output={tmp_path}/%a.out", str(STUDY)]
    python = {"MCIR_PYTHON": f"env WRAPPED=1 {sys.executable}"}
    job = slurm.run("sbatch", *options, *arguments, **environment() | python).strip()
    assert job.isdigit(), job
    deadline = time.monotonic() + 600
    while slurm.run("squeue", "--noheader", "--jobs", job):
        assert time.monotonic() < deadline, (tmp_path / "0.out").read_text()
        time.sleep(0.5)
    reported = run("single", "study", *arguments, "--report-only")
    assert reported.returncode == 0, reported.stdout
    assert "1 of 1" in reported.stdout
    records = [json.loads(file.read_text()) for file in (tmp_path / "study" / "runs").glob("*/run.json")]
    assert [record["state"] for record in records] == ["finished"] * 2
