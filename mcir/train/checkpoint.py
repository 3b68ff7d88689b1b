"""Checkpoints: one format for every strategy and any number of processes, written so that a kill leaves the last one
whole.

    step-00012000/
        model.safetensors                    whole fp32 weights, official names, config in the metadata: loads anywhere
        ema.safetensors                      the same for the evaluation EMA, where there is one
        negatives.safetensors                `K.name`, fp32, where there are negatives
        followed.safetensors                 what else the run follows, such as the contrast's weight
        optimizer-00000-of-00002.safetensors each process's share of Adam's moments, as whole tensors
        state.json  config.yaml              step, data position, what was running; the resolved config
        manifest.json                        size and SHA-256 of every file

A checkpoint is written to a hidden directory, flushed to the disk and renamed; only then are older ones removed, and
never the last one that is whole and of healthy weights. Nothing is pickled. All of that happens in a thread beside the
training, from copies of the tensors.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch import Tensor
from torch import distributed as dist

from mcir.errors import UserError
from mcir.weights.files import write_tensors

log = logging.getLogger(__name__)

NAME = re.compile(r"step-(\d{8,})(?:\.old)?")
"""`.old`: the one before of the same step, for the moment in which it is replaced."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest has been verified."""

    path: Path

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.path / "state.json").read_text())

    def reader(self, pattern: str) -> Callable[[str], Tensor | None]:
        """`read(key)` over the tensors of all files that match; None for a key that none of them holds."""
        handles = [safe_open(file, "pt") for file in sorted(self.path.glob(pattern))]
        places = {key: handle for handle in handles for key in handle.keys()}  # noqa: SIM118
        return lambda key: places[key].get_tensor(key) if key in places else None


class Checkpointer:
    """Saves to `folder` beside the training and loads from it; one checkpoint is being written at a time. As a context
    it is left when that one is there. `owned` raises UserError on the main process once another one writes there;
    `copy` has on the main process, beside the training, what is then there.

    Each rank's thread writes its own share. They tell each other that they are done, or what went wrong, over a gloo
    group of their own and never over the one that trains: all ranks' saves end alike, whatever step each of them is in.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        keep_last: int = 1,
        owned: Callable[[], None] = lambda: None,
        timeout_s: float = 1800,
        copy: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.accelerator, self.folder, self.keep_last, self.owned = accelerator, folder, keep_last, owned
        self.copy = copy
        timeout, several = timedelta(seconds=timeout_s), accelerator.num_processes > 1
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if several else None
        self._beat_s = timeout_s / 4
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        self.times: dict[str, float] = {}
        """Of the last save, in seconds: `save_stall_s`, that training stood still; `save_s`, once it is there, that it
        was written beside the training."""

    def save(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Tensor]],
        texts: Callable[[], Mapping[str, str]],
        metadata: Mapping[str, str],
        keep: Path | None = None,
    ) -> Path:
        """Begin to write a checkpoint and then to remove all but the last `keep_last` ones that are worth something and
        `keep`; the path that it will have. Collective, after a `join`.

        `files`: this rank's safetensors by name, which nobody changes any more; `texts()`, in the thread: rank 0's
        text files. UserError on all ranks: there is no room for all ranks' files.
        """
        assert self._saving is None, "the one before has not been joined"
        self.times.clear()
        final, main = self.folder / f"step-{step:08d}", self.accelerator.is_main_process
        temporary = final.with_name(f".{final.name}.partial")

        def together(
            work: Callable[[], dict[str, Any]] | None, failed: str = f"written to {self.folder}"
        ) -> dict[str, Any]:
            """What all ranks' work gives; an error of one is an error of all. They hear of each other however long it
            takes, so that only a rank that is lost is waited for in vain."""
            with ThreadPoolExecutor(1) as aside:
                job = aside.submit(work or dict)
                gathered = self._gather(_outcome(job, self._beat_s))
                while not all(done for done, _, _ in gathered):
                    gathered = self._gather(_outcome(job, self._beat_s))
            problems = [problem for _, _, problem in gathered if problem]
            if problems:
                if main:
                    shutil.rmtree(temporary, ignore_errors=True)
                raise UserError(f"the checkpoint of step {step} could not be {failed}: {problems[0]}")
            return {name: entry for _, entries, _ in gathered for name, entry in entries.items()}

        def begin() -> dict[str, Any]:
            self.owned()
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _require_space(temporary, num_bytes)
            return {}

        def end(manifest: Mapping[str, Any]) -> dict[str, Any]:
            self.owned()
            publish(temporary, final, manifest)
            prune(self.folder, self.keep_last, keep)
            return {}

        def copy() -> dict[str, Any]:
            self.copy(final)
            return {}

        def write() -> None:
            begun = time.perf_counter()
            manifest = together(lambda: write_files(temporary, files, texts() if main else {}, metadata))
            together((lambda: end(manifest)) if main else None)
            together(copy if main else None, f"copied from {final}")
            self.times["save_s"] = time.perf_counter() - begun

        num_bytes = sum(self._gather(sum(t.nbytes for file in files.values() for t in file.values())))
        together(begin if main else None)
        self._saving = self._thread.submit(write)
        return final

    @property
    def failed(self) -> bool:
        """Whether it is known by now, on this rank, that `join` will raise."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def join(self) -> None:
        """Wait until what `save` began is done. UserError, on all ranks alike: it could not be written; earlier
        checkpoints are as they were."""
        if self._saving is not None:
            wait([self._saving])  # may be interrupted, and called again
            saving, self._saving = self._saving, None
            saving.result()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.join()
        except Exception as problem:
            if error is None:
                raise
            log.error("%s", problem)  # the error that ends the run is the other one

    def latest(self) -> Checkpoint | None:
        """`newest`, the same on all ranks. Collective."""
        self.join()
        found: list[str | None] = [None]
        if self.accelerator.is_main_process:
            path = newest(self.folder)
            found = [str(path) if path else None]
        broadcast_object_list(found)
        return Checkpoint(Path(found[0])) if found[0] else None

    def _gather(self, value: Any) -> list[Any]:
        """All ranks' values; only ever one thread of a process is in here."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.accelerator.num_processes
        dist.all_gather_object(values, value, group=self._group)
        return values


def _outcome(job: Future[dict[str, Any]], patience_s: float) -> tuple[bool, dict[str, Any], str | None]:
    """Whether the work is done after so many seconds at most, what it gave and what went wrong."""
    wait([job], patience_s)
    if not job.done():
        return False, {}, None
    error = job.exception()
    if error is None:
        return True, job.result(), None
    known = isinstance(error, OSError | UserError | RuntimeError)  # safetensors' own, on a full disk, is one of them
    return True, {}, str(error) if known else f"{type(error).__name__}: {error}"


def write_files(
    folder: Path, files: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Write and flush; size and checksum of each file, by name."""
    for name, tensors in files.items():
        write_tensors(folder / name, tensors, metadata)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return {name: _fingerprint(folder / name) for name in [*files, *texts]}


def publish(temporary: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Make the checkpoint that was written to `temporary` visible; one of the same step stays so until then."""
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    _flush(temporary / "manifest.json")
    _flush(temporary)
    aside = final.with_name(f"{final.name}.old")
    if final.exists() and damage(final):
        remove(final)
    if final.exists():
        remove(aside)
        final.rename(aside)
    temporary.rename(final)
    _flush(final.parent)
    remove(aside)


def prune(folder: Path, keep_last: int, keep: Path | None = None) -> None:
    """Remove all but the newest `keep_last` whole, healthy checkpoints, the newest whole one, and `keep`.

    Each that counts is read again: one that the disk has damaged must not push out a good one.
    """
    there = saved(folder)
    whole: list[Path] = []
    for path in reversed(there):
        if sum(map(is_healthy, whole)) < keep_last and damage(path) is None:
            whole.append(path)
    kept = {*filter(is_healthy, whole), *whole[:1], keep}
    for path in there:
        if whole and path not in kept:
            remove(path)
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder, a healthy one if there is one. What is passed over is said."""
    sick = None
    for path in reversed(saved(folder)):
        fault = damage(path)
        if fault is not None:
            log.warning("checkpoint %s is damaged (%s): trying the one before", path, fault)
        elif is_healthy(path):
            if sick:
                log.warning("checkpoint %s was saved while no gradient was finite: trying one before", sick)
            return path
        else:
            sick = sick or path
    return sick


def is_healthy(path: Path) -> bool:
    """Whether a whole checkpoint was saved with finite weights and outside of a streak of steps that were skipped for
    want of a finite gradient: what destroys a network shows in the gradients that follow."""
    return bool(json.loads((path / "state.json").read_text()).get("healthy", True))


def saved(folder: Path) -> list[Path]:
    """From old to new."""
    matches = [(NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def remove(path: Path) -> None:
    """Hidden before it is deleted: a kill in between leaves no half checkpoint that looks like a whole one."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.old.partial")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint according to its manifest; None if it is whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, entry in manifest.items():
            if _digest(path / name) != entry:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _fingerprint(file: Path) -> dict[str, Any]:
    _flush(file)
    return _digest(file)


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(f"it needs {num_bytes / 2**20:.1f} MiB and the disk has {free / 2**20:.1f} MiB left; make room")


def to_cpu(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares memory with nothing."""
    return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor)
