"""Run directories: which one a run writes to, which checkpoint it starts from, and its record. Nothing that was
trained is overwritten.

A directory is a run's if its record says so, whatever it is called: `exp-2` may be the second start of `exp` or another
experiment. It appears when training begins, and has one writer at a time (lock.py).
"""

import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from types import TracebackType

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from mcir.config import RunConfig, dump
from mcir.errors import UserError
from mcir.parallel.accelerator import precision_of, strategy
from mcir.section import is_url
from mcir.train import lock, offsite
from mcir.train.checkpoint import Checkpoint, damage, newest
from mcir.train.lock import Lock
from mcir.train.record import FILE, Record, has_failed, hostname, name_of, note_failure


@dataclass
class Start:
    """Where a run will write and what it starts from, the same on all ranks. Until `begin` nothing is written.

    As a context it ends, if anything fails before training begins, what `choose` began: the lock is released, and a run
    that is there already has the reason in its record.
    """

    resume: str
    run_dir: Path
    is_new: bool
    """Whether `begin` makes the directory."""
    checkpoint: Checkpoint | None = None
    lock: Lock | None = None
    """The main process's, of a directory that is there."""
    taken: Sequence[str] = ()
    """Names of directories that have a place at `checkpoint.to`: no new one is called so."""

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and self.lock is not None:
            note_failure(self.run_dir, error)
            self.lock.release()


def choose(accelerator: Accelerator, runs_dir: str, name: str, resume: str, to: str | None = None) -> Start:
    """The run directory and the checkpoint to start from, if any; `to` is `checkpoint.to`. Collective.

    `resume`: `never` takes a directory that does not exist yet (name, name-2, ...); `auto` goes on with the newest
    whole checkpoint of the run, here or brought from `to`; the path of a run goes on there; that of a checkpoint starts
    a new directory from it. UserError: a live process writes there, a path that is neither, a run of another name.
    """
    start = Start(resume, Path(runs_dir) / name, is_new=True)
    checkpoint = None
    if accelerator.is_main_process:
        start.taken = offsite.names(to) if to else ()
        start.run_dir, checkpoint = _choose(start.run_dir, resume, start.taken)
        if to and resume == "auto":
            start.run_dir = _last_start(start.run_dir, name, to, start.taken)
            checkpoint = checkpoint if checkpoint and start.run_dir in checkpoint.parents else None
        start.is_new = not start.run_dir.exists()
        if not start.is_new:
            start.lock = lock.acquire(start.run_dir)
        if to and resume == "auto" and start.run_dir.name in start.taken:
            checkpoint = offsite.bring(offsite.place_of(to, start.run_dir), start.run_dir, checkpoint) or checkpoint
            if start.is_new and start.run_dir.exists():
                start.is_new, start.lock = False, lock.acquire(start.run_dir)
    told = [str(start.run_dir), start.is_new, str(checkpoint) if checkpoint else None]
    broadcast_object_list(told)
    start.run_dir, start.is_new = Path(str(told[0])), bool(told[1])
    start.checkpoint = Checkpoint(Path(str(told[2]))) if told[2] else None
    return start


def begin(config: RunConfig, accelerator: Accelerator, start: Start, init_from: str | None = None) -> Record:
    """Write down in the run directory, made if it is new, that training begins there, and from which weights: their
    commit or checksum. Collective."""
    if accelerator.is_main_process and start.is_new:
        names = _names(Path(config.runs_dir) / config.name, start.taken)
        start.run_dir = _make([start.run_dir] if start.resume == "auto" else names)
        start.lock = lock.acquire(start.run_dir)
    told = [str(start.run_dir)]
    broadcast_object_list(told)
    run_dir = start.run_dir = Path(told[0])
    if config.checkpoint.to and accelerator.is_main_process:
        offsite.announce(offsite.place_of(config.checkpoint.to, run_dir), dump(config))
    checkpoint = start.checkpoint
    step = checkpoint.state["step"] if checkpoint else 0
    if accelerator.is_main_process and start.resume != "never":
        origin = f"goes on from {checkpoint.path}" if checkpoint else f"no checkpoint of {config.name} is there, begins"
        print(f"{run_dir}: {origin}, step {step} of {config.steps}", flush=True)
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    places = gather_object([{"host": hostname(), "device": name}])
    return Record(
        run_dir if accelerator.is_main_process else None,
        start.lock,
        name=config.name,
        steps=config.steps,
        config=dump(config),
        step=step,
        origin=str(checkpoint.path) if checkpoint and run_dir not in checkpoint.path.parents else None,
        environment={
            "strategy": strategy(accelerator),
            "precision": precision_of(accelerator),
            "world_size": accelerator.num_processes,
            "processes": places,
            "init_from": init_from,
        },
    )


def _choose(base: Path, resume: str, taken: Sequence[str]) -> tuple[Path, Path | None]:
    if resume == "never":
        return _free(base, taken), None
    if resume == "auto":
        return _newest_start(base, taken)
    if is_url(resume):
        raise UserError(
            f"--resume {resume}: a run goes on from a store with checkpoint.to=… (the folder above its own) and "
            "--resume auto; to begin another from the weights alone, name the checkpoint as init_from"
        )
    path = Path(resume)
    if (path / "checkpoints").is_dir() or (path / FILE).exists():
        name = name_of(path)
        if name not in (base.name, None):
            raise UserError(
                f"--resume {resume}: that is a run of {name}, and this config's name is {base.name}: set name={name} "
                "to go on there, or give one of its checkpoints to begin a run of its own from it"
            )
        return path, newest(path / "checkpoints")
    if not (path / "manifest.json").exists():
        raise UserError(f"--resume {resume}: neither a run directory nor a checkpoint (nor `auto` or `never`)")
    fault = damage(path)
    if fault:
        raise UserError(f"--resume {resume}: the checkpoint is damaged ({fault}); use another one or --resume auto")
    return _free(base, taken), path


def _newest_start(base: Path, taken: Sequence[str]) -> tuple[Path, Path | None]:
    """The last start of this run and its newest checkpoint, if any; one that failed before its first is passed over for
    one before. A new directory where there is none."""
    starts = []
    for path in _numbered(base):
        name = name_of(path)
        if name == base.name:
            starts.append(path)
        elif name is None and next((path / "checkpoints").glob("step-*"), None):
            raise UserError(
                f"{path} has checkpoints, but neither its run.json nor its config.yaml says of which run: give "
                f"--resume {path}, or move it away"
            )
    for i, path in reversed(list(enumerate(starts))):
        checkpoint = newest(path / "checkpoints")
        if checkpoint is not None or not has_failed(path):
            for later in starts[i + 1 :]:
                lock.require_free(later)
                print(f"{later} failed before its first checkpoint: passed over", flush=True)
            return path, checkpoint
    return (starts[-1] if starts else _free(base, taken)), None


def _numbered(base: Path) -> list[Path]:
    """Those of base, base-2, base-3, ... that exist, in this order."""
    found = [(number, path) for path in base.parent.glob("*") if (number := _number(path.name, base.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def _last_start(run_dir: Path, name: str, to: str, taken: Sequence[str]) -> Path:
    """The directory that was chosen here, or that of a later start of the run, which has its place at `to`."""
    base = run_dir.with_name(name)
    there = [
        number for other in taken if (number := _number(other, name)) and offsite.has_checkpoints(f"{to}/{other}", name)
    ]
    here = (_number(run_dir.name, name) or 1) if run_dir.exists() else 0
    last = max(there, default=0)
    return run_dir if last <= here else base if last == 1 else base.with_name(f"{name}-{last}")


def _number(directory: str, name: str) -> int | None:
    """1, 2, 3 of name, name-2, name-3; None for any other."""
    match = re.fullmatch(re.escape(name) + r"(?:-([1-9]\d*))?", directory)
    return int(match[1] or 1) if match else None


def _free(base: Path, taken: Sequence[str]) -> Path:
    return next(path for path in _names(base, taken) if not path.exists())


def _make(names: Iterable[Path]) -> Path:
    """Make the first directory that is not there; other starts may be making theirs."""
    for path in names:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            taken = path
        except OSError as error:
            raise UserError(f"the run directory {path} cannot be made ({error.strerror}): change runs_dir") from None
        else:
            return path
    lock.require_free(taken)
    raise UserError(f"{taken} appeared while this run was starting: start it again")


def _names(base: Path, taken: Sequence[str]) -> Iterator[Path]:
    """base, base-2, base-3, ... without an end, but for those that are taken."""
    names = chain([base.name], (f"{base.name}-{number}" for number in count(2)))
    return (base.with_name(name) for name in names if name not in taken)
