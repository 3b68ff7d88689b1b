"""Run directories: which one a run writes to, and which checkpoint it starts from. Nothing that was trained is
overwritten."""

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mcir.checkpoint import Checkpoint, Checkpointer, damage
from mcir.errors import UserError


def choose(accelerator: Accelerator, runs_dir: str, name: str, resume: str) -> tuple[Path, Checkpoint | None]:
    """The run directory and the checkpoint to start from, if any; the same on all ranks. Collective.

    `resume`: `never` takes a directory that does not exist yet (name, name-2, ...); `auto` goes on in the last of them;
    the path of a run goes on there; the path of a checkpoint starts a new run directory from it.
    """
    chosen: list[str | None] = [None, None]
    if accelerator.is_main_process:
        directory, checkpoint = _choose(Path(runs_dir) / name, resume)
        directory.mkdir(parents=True, exist_ok=True)
        chosen = [str(directory), str(checkpoint) if checkpoint else None]
    broadcast_object_list(chosen)
    assert chosen[0] is not None
    run_dir = Path(chosen[0])
    if chosen[1]:
        return run_dir, Checkpoint(Path(chosen[1]))
    return run_dir, None if resume == "never" else Checkpointer(accelerator, run_dir / "checkpoints").latest()


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
