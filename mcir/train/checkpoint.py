"""Checkpoints: one format for every strategy and any number of processes, written so that a kill leaves the last one
whole.

    step-00012000/
        model.safetensors                    whole fp32 weights, official names, config in the metadata: loads anywhere
        ema.safetensors                      the same for the evaluation EMA, where there is one
        negatives.safetensors                `K.name`, fp32, where there are negatives
        optimizer-00000-of-00002.safetensors each process's share of Adam's moments, as whole tensors
        state.json  config.yaml              step, data position, what was running; the resolved config
        manifest.json                        size and SHA-256 of every file

A checkpoint is written to a hidden directory, flushed to the disk and renamed. Nothing is pickled.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mcir.errors import UserError

log = logging.getLogger(__name__)

NAME = re.compile(r"step-(\d{8,})")


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
    """Saves to and loads from `folder`. All methods are collective."""

    def __init__(self, accelerator: Accelerator, folder: Path, keep_last: int = 1) -> None:
        self.accelerator, self.folder, self.keep_last = accelerator, folder, keep_last

    def save(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> Path:
        """Write a checkpoint. `files`: this rank's safetensors, by name; `texts`: rank 0's text files.

        A file that cannot be written (a full disk) is an error on all ranks; earlier checkpoints stay as they are.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".step-{step:08d}.partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        entries: dict[str, Any] = {}
        problem = None
        try:
            _require_space(self.folder, sum(t.nbytes for file in files.values() for t in file.values()))
            for name, tensors in files.items():
                save_file(dict(tensors), temporary / name, metadata={"format": "pt", **metadata})
                entries[name] = _fingerprint(temporary / name)
            if self.accelerator.is_main_process:
                for name, text in texts.items():
                    (temporary / name).write_text(text)
                    entries[name] = _fingerprint(temporary / name)
        except (
            OSError,
            RuntimeError,
        ) as error:  # safetensors raises its own error type, a RuntimeError's kin, on a full disk
            problem = str(error)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        gathered = gather_object([(entries, problem)])
        problems = [problem for _, problem in gathered if problem]
        if problems:
            if self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"the checkpoint of step {step} could not be written to {self.folder}: {problems[0]}")
        if self.accelerator.is_main_process:
            manifest = {name: entry for entries, _ in gathered for name, entry in entries.items()}
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
            _flush(temporary / "manifest.json")
            _remove(final)
            _flush(temporary)
            temporary.rename(final)
            _flush(self.folder)
        self.accelerator.wait_for_everyone()
        return final

    def prune(self, keep: Path | None) -> None:
        """Remove all but the last `keep_last` checkpoints and `keep`."""
        if self.accelerator.is_main_process:
            for path in self._saved()[: -self.keep_last]:
                if path != keep:
                    _remove(path)
            for partial in self.folder.glob(".step-*.partial"):
                shutil.rmtree(partial)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose manifest holds, the same on all ranks; a damaged one is passed over with a
        warning."""
        found: list[str | None] = [None]
        if self.accelerator.is_main_process:
            for path in reversed(self._saved()):
                fault = damage(path)
                if fault is None:
                    found = [str(path)]
                    break
                log.warning("checkpoint %s is damaged (%s): trying the one before", path, fault)
        broadcast_object_list(found)
        return Checkpoint(Path(found[0])) if found[0] else None

    def _saved(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if NAME.fullmatch(path.name))


def _remove(path: Path) -> None:
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
        raise OSError(f"it needs {num_bytes / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB left; make room")


def to_cpu(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares memory with nothing."""
    return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor)
