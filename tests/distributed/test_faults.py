"""Signals and sudden deaths in real runs of two processes: what was saved is whole, and the run goes on from it."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcir.train.checkpoint import damage
from tests.distributed.launch import command, environment, run, write_config
from tests.runs import tiny_config


def start(launch_file: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(launch_file, *arguments),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def process_of_rank(launcher: subprocess.Popen[str], rank: int) -> int:
    """The pid of a rank: the child of the launcher that has RANK in its environment."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher.pid and f"RANK={rank}".encode() in variables:
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


def wait_for_line(process: subprocess.Popen[str], beginning: str) -> list[str]:
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return lines
    raise AssertionError("".join(lines))


def end(process: subprocess.Popen[str], timeout: float = 60) -> str:
    """The rest of the output; whatever is left of the process group is killed."""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def config(tmp_path) -> Path:
    values = tiny_config(tmp_path, steps=100_000, checkpoint={"every": 5, "keep_last": 3}, tracking={"log_every": 1})
    return write_config(tmp_path / "config.yaml", values)


@pytest.mark.slow
def test_bad_rows_of_all_ranks_are_counted_and_stop_none(tmp_path):
    """9 of the 24 rows of an epoch are bad, and every rank takes one row a step; the count goes on with one process."""
    values = tiny_config(tmp_path, steps=24, batch_size=2, checkpoint={"every": 12})
    values["data"] |= {"on_error": "skip"}
    for file in (tmp_path / "data").glob("*.parquet"):
        rows = pq.read_table(file).to_pylist()
        for row in rows[::3]:
            row["clean"]["bytes"] = b"not an image"
        pq.write_table(pa.Table.from_pylist(rows), file)
    config = str(write_config(tmp_path / "config.yaml", values))
    done = run("ddp_cpu", "train", config)
    assert done.returncode == 0, done.stdout
    more = run("single", "train", config, "--resume", "auto", "steps=36")
    assert more.returncode == 0, more.stdout
    for step in (24, 36):
        state = tmp_path / "runs" / "tiny" / "checkpoints" / f"step-{step:08d}" / "state.json"
        assert json.loads(state.read_text())["num_skipped"] == 9 * step // 12


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step_with_a_checkpoint(config, tmp_path, number):
    process = start("ddp_cpu", "train", str(config))
    wait_for_line(process, "step 7/")
    os.kill(process_of_rank(process, 1), number)
    output = end(process)
    assert process.returncode != 0
    assert "go on with --resume auto" in output
    last = sorted((tmp_path / "runs" / "tiny" / "checkpoints").glob("step-*"))[-1]
    step = int(last.name.removeprefix("step-"))
    assert f"stopped at step {step}" in output
    assert damage(last) is None
    finished = run("ddp_cpu", "train", str(config), f"steps={step + 2}", "--resume", "auto")
    assert finished.returncode == 0, finished.stdout
    assert f"step {step + 1}/" in finished.stdout


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        *(pytest.param(number, 75, marks=pytest.mark.slow) for number in (signal.SIGUSR1, signal.SIGTERM)),
    ],
)
def test_exit_codes_of_one_process(config, tmp_path, number, code):
    process = start("single", "train", str(config))
    wait_for_line(process, "step 3/")
    os.kill(process.pid, number)
    output = end(process)
    assert process.returncode == code, output
    assert "stopped at step" in output


def kill_at_random(config: Path, folder: Path, launch_file: str, rounds: int, seed: int) -> None:
    """Kill one rank with SIGKILL at a random moment, again and again; every time the newest checkpoint is whole and
    the next start goes on from it."""
    draw = random.Random(seed)
    checkpoints = folder / "runs" / "tiny" / "checkpoints"
    reached = 0
    for _ in range(rounds):
        process = start(launch_file, "train", str(config), "checkpoint.every=1", "--resume", "auto")
        lines = wait_for_line(process, "step ")
        first = int(lines[-1].split()[1].split("/")[0].rstrip(":"))  # also where a rank is said to be slow
        assert first == reached + 1
        time.sleep(draw.uniform(0, 1.5))  # with a checkpoint every step, often in the middle of a save
        os.kill(process_of_rank(process, draw.randrange(2)), signal.SIGKILL)
        end(process)
        assert process.returncode != 0
        saved = sorted(checkpoints.glob("step-*"))
        reached = int(saved[-1].name.removeprefix("step-")) if saved else 0
        assert all(damage(path) is None for path in saved)


@pytest.mark.slow
@pytest.mark.parametrize("launch_file", ["ddp_cpu", "fsdp2_cpu", "zero3_cpu"])
def test_sudden_death_of_a_rank(config, tmp_path, launch_file):
    kill_at_random(config, tmp_path, launch_file, rounds=5, seed=1)
