"""Run directories: which one a run writes to, which checkpoint it starts from, and its record. Nothing that was
trained is overwritten."""

import platform
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from mcir.config import RunConfig, dump
from mcir.errors import UserError
from mcir.parallel.accelerator import precision_of, strategy
from mcir.train.checkpoint import Checkpoint, Checkpointer, damage
from mcir.train.record import Record, hostname


def choose(accelerator: Accelerator, runs_dir: str, name: str, resume: str) -> tuple[Path, Checkpoint | None]:
    """The run directory and the checkpoint to start from, if any; the same on all ranks. Collective.

    `resume`: `never` takes a directory that does not exist yet (name, name-2, ...); `auto` goes on in the last of them;
    the path of a run goes on there; the path of a checkpoint starts a new run directory from it.
    """
    chosen: list[str | None] = [None, None]
    if accelerator.is_main_process:
        directory, checkpoint = _choose(Path(runs_dir) / name, resume)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the run directory {directory} cannot be made ({error.strerror}): change runs_dir"
            ) from None
        chosen = [str(directory), str(checkpoint) if checkpoint else None]
    broadcast_object_list(chosen)
    assert chosen[0] is not None
    run_dir = Path(chosen[0])
    if chosen[1]:
        return run_dir, Checkpoint(Path(chosen[1]))
    return run_dir, None if resume == "never" else Checkpointer(accelerator, run_dir / "checkpoints").latest()


def begin(config: RunConfig, accelerator: Accelerator, run_dir: Path, checkpoint: Checkpoint | None) -> Record:
    """Write down in the run directory that a run starts there. Collective."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    places = gather_object([{"host": hostname(), "device": name}])
    return Record(
        run_dir if accelerator.is_main_process else None,
        name=config.name,
        steps=config.steps,
        config=dump(config),
        step=checkpoint.state["step"] if checkpoint else 0,
        origin=str(checkpoint.path) if checkpoint and run_dir not in checkpoint.path.parents else None,
        environment={
            "strategy": strategy(accelerator),
            "precision": precision_of(accelerator),
            "world_size": accelerator.num_processes,
            "processes": places,
        },
    )


def _choose(base: Path, resume: str) -> tuple[Path, Path | None]:
    taken = [path for path in _numbered(base) if path.exists()]
    if resume == "never":
        return next(path for path in _numbered(base, forever=True) if not path.exists()), None
    if resume == "auto":
        return (taken[-1] if taken else base), None
    path = Path(resume)
    if (path / "checkpoints").is_dir():
        return path, None
    if not (path / "manifest.json").exists():
        raise UserError(f"--resume {resume}: neither a run directory nor a checkpoint (nor `auto` or `never`)")
    fault = damage(path)
    if fault:
        raise UserError(f"--resume {resume}: the checkpoint is damaged ({fault}); use another one or --resume auto")
    return next(path for path in _numbered(base, forever=True) if not path.exists()), path


def _numbered(base: Path, forever: bool = False):
    """base, base-2, base-3, ... ; unless `forever`, up to the first that does not exist."""
    path, number = base, 1
    while forever or path.exists():
        yield path
        number += 1
        path = base.with_name(f"{base.name}-{number}")
