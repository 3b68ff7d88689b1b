"""Runs of a study, each `mcir train --resume auto` in a process (or, under a launcher, processes) of its own.

A run that fails or is killed costs only itself, and nothing of one run (precision, compiled code, random state) reaches
the next. Under `accelerate launch` every process starts its share of each run; the main one alone decides which run is
next, and all agree. A run is locked while it is trained, so that studies of one output, such as the tasks of a Slurm
array, do not meddle with each other.
"""

import fcntl
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from mcir.errors import UserError
from mcir.evaluation.report import write_whole
from mcir.study.plan import Task
from mcir.train import lock
from mcir.train.stop import EXIT_CODES

T = TypeVar("T")
COST = "cost.json"
"""In a run's directory: for each start the wall and processor seconds of its processes, and whether they had GPUs."""


def is_main() -> bool:
    """Whether this process decides, prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


class Executor:
    """Starts programs in the launch that this process belongs to. Use as a context; what it does is collective."""

    def __init__(self) -> None:
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.stopped = 0
        """The exit code that a signal asks for, or that of a run which a signal stopped."""
        self._children: set[subprocess.Popen[bytes]] = set()

    def __enter__(self) -> "Executor":
        if self.world_size > 1:  # for decisions only; its time limit is that of whole runs
            dist.init_process_group("gloo", timeout=timedelta(days=30))
        self._previous = {number: signal.signal(number, self._note) for number in EXIT_CODES}
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if dist.is_initialized() and kind is None:
            dist.destroy_process_group()

    def agree(self, value: T) -> T:
        """The main process's value, everywhere."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def on_main(self, call: Callable[[], T]) -> T:
        """What the call returns in the main process, which alone makes it, or its UserError: everywhere."""
        value: Any = None
        error: UserError | None = None
        if is_main():
            try:
                value = call()
            except UserError as raised:
                error = raised
        value, error = self.agree((value, error))
        if error:
            raise error
        return value

    def stop_agreed(self) -> int:
        """The exit code that a signal to any process asks for, 0 for none; the same everywhere."""
        codes = [self.stopped] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(codes, self.stopped)
        self.stopped = max(codes)
        return self.stopped

    def start(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] = {}) -> list[dict[str, Any]]:
        """Runs `python -m mcir ARGUMENTS` with its output at the end of `log`, no longer than this process lives; the
        exit code, wall and processor seconds of each process of the launch."""
        own = dict(environment)
        if self.world_size > 1:
            # A meeting point of its own: the launcher's store remembers whoever met there before.
            own |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(self.agree(_free_port()))}
            log = log if is_main() else log.with_name(f"{log.stem}-{os.environ['RANK']}{log.suffix}")
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with log.open("ab") as output:
            command = [sys.executable, "-m", "mcir.study.child", str(os.getpid()), *arguments]
            # Out of the terminal's reach: Ctrl-C comes to the run once, from here.
            child = subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | own, start_new_session=True
            )
            self._children.add(child)
            if self.stopped:
                child.send_signal(signal.SIGTERM)
            _, status, usage = os.wait4(child.pid, 0)  # its processor time, workers included
        child.returncode = os.waitstatus_to_exitcode(status)
        self._children.discard(child)
        wall_s, cpu_s = time.monotonic() - began, usage.ru_utime + usage.ru_stime
        outcome = {"exit_code": child.returncode, "wall_s": wall_s, "cpu_s": cpu_s}
        outcomes: list[Any] = [outcome] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(outcomes, outcome)
        self.stopped = self.stopped or next((o["exit_code"] for o in outcomes if o["exit_code"] in (75, 130)), 0)
        return outcomes

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.stopped = EXIT_CODES[signal.Signals(number)]
        for child in list(self._children):
            child.send_signal(number)


def execute(executor: Executor, tasks: Sequence[Task], jobs: int = 1, retry_failed: bool = False) -> None:
    """Trains what is not done, in order, `jobs` at a time; stops after a signal, not after a failure. Collective."""
    if jobs > 1 and executor.world_size > 1:
        raise UserError("--jobs is for one process: under a launcher its processes share each run")
    slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for environment in _slots(jobs):
        slots.put(environment)

    def train(task: Task) -> None:
        environment = slots.get()
        try:
            if not executor.stop_agreed():
                _train(executor, task, retry_failed, environment)
        finally:
            slots.put(environment)

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(train, tasks):
            pass


def _train(executor: Executor, task: Task, retry_failed: bool, environment: Mapping[str, str]) -> None:
    with _locked(task.run_dir) as free:
        reason = executor.on_main(lambda: _left_out(task, free, retry_failed))
        if reason:
            _say(task, reason)
            return
        earlier, costs = executor.on_main(lambda: (_num_starts(task), read_costs(task)))
        _say(task, "begins")
        log = task.output / "logs" / f"{task.name}.log"
        outcomes = executor.start(["train", str(task.config_path), "--resume", "auto"], log, environment)
        if not is_main():
            return
        cost: dict[str, Any] = {key: sum(o[key] for o in outcomes) for key in ("wall_s", "cpu_s")} | {
            "processes": len(outcomes)
        }
        cost["gpu"] = torch.cuda.is_available()
        began = _num_starts(task) > earlier
        if began:
            write_whole(task.run_dir / COST, (json.dumps([*costs, cost], indent=1) + "\n").encode())
        codes = sorted({o["exit_code"] for o in outcomes})
        state = (task.record or {"state": "not begun"})["state"]
        minutes = outcomes[0]["wall_s"] / 60
        ended = "" if codes == [0] else f", exit code {', '.join(map(str, codes))}: see {log}"
        what = "ended before training" if ended and not began else "killed" if state == "running" else state
        _say(task, f"{what} after {minutes:.1f} min{ended}")


def _left_out(task: Task, free: bool, retry_failed: bool) -> str | None:
    """Why a run is not started now; None to start it, or to go on with it."""
    trained = "is being trained by another process"
    if not free:
        return trained
    record = task.record
    if record and record["state"] == "finished":
        return "is finished"
    if record and record["state"] == "failed" and not retry_failed:
        message = (record["message"] or "").partition("\n")[0]
        return f"has failed and stays so (--retry-failed goes on): {message}"
    try:
        lock.require_free(task.run_dir)
    except UserError as error:
        return f"{trained}: {error}"
    return None


@contextmanager
def _locked(run_dir: Path) -> Iterator[bool]:
    """Whether nobody else trains there; nobody will until the end. The main process asks."""
    if not is_main():
        yield True
        return
    file = run_dir.parent / f".{run_dir.name}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _slots(jobs: int) -> list[dict[str, str]]:
    """What runs side by side find in their environment: a GPU in turn, and a share of the cores."""
    if jobs == 1:
        return [{}]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    cores = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
    return [
        {"OMP_NUM_THREADS": cores} | ({"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} if devices else {})
        for i in range(jobs)
    ]


def read_costs(task: Task) -> list[dict[str, Any]]:
    """Of each start of a run: `wall_s` and `cpu_s`, sums over its `processes`, and `gpu`. UserError for a file that
    does not say so."""
    file = task.run_dir / COST
    try:
        costs = json.loads(file.read_text())
        known = all(isinstance(cost[key], int | float) for cost in costs for key in ("wall_s", "cpu_s", "gpu"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise UserError(f"{file}: does not say wall_s, cpu_s and gpu of each start; restore it or remove it")
    return costs


def _num_starts(task: Task) -> int:
    record = task.record
    return len(record["starts"]) if record else 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _say(task: Task, text: str) -> None:
    if is_main():
        print(f"{task.index:3d} {task.name} {text}", flush=True)
