"""Tensors out of files that other programs wrote: where training codes put them, and nothing of the file executed
(`weights_only=True`)."""

import argparse
import collections
import pathlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mcir.errors import UserError

PICKLE_SUFFIXES = (".pth", ".pt", ".pk", ".pkl", ".ckpt", ".bin", ".tar")
WEIGHTS_FILE = "model.safetensors"
ENTRY = re.compile(r"(.+)\[([^\[\]]+)\]")
"""A file, and an entry in it."""

# Where training codes put the state_dict inside their file, outermost first; BasicSR writes `params` and `params_ema`.
EMA_ENTRIES = ("params_ema", "params-ema", "model_ema", "ema")
PLAIN_ENTRIES = ("params", "state_dict", "model_state_dict", "model", "net", "netG", "net_g", "generator", "network")
# Put into names by torch.compile, FSDP and activation checkpointing; never part of a network's own names.
WRAPPER_NAMES = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PARALLEL_PREFIX = "module."  # put before every name by DataParallel

# Data, not code, that training codes leave beside the weights: FFA-Net's validation history in numpy numbers,
# argparse's settings, paths. The unpickler fills their fields and calls nothing else of theirs.
_SCALAR: Any = np.float64(0).__reduce__()[0]
HARMLESS: list[Any] = [
    argparse.Namespace,
    *(pathlib.Path, pathlib.PosixPath, pathlib.PurePosixPath),
    *(collections.defaultdict, collections.deque, dict, list, set, tuple),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
]


def split_entry(path: str | Path) -> tuple[Path, str | None]:
    """`net.pth[params_ema]` -> the file and the entry in it; what exists is a path, whatever is in its name."""
    match = ENTRY.fullmatch(str(path))
    if match and not Path(path).exists():
        return Path(match[1]), match[2]
    return Path(path), None


def locate(path: str | Path) -> Path:
    """The file itself, or `model.safetensors` in the folder of a checkpoint or an export."""
    path, _ = split_entry(path)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such weights file")
    return file


def _read(path: Path) -> Any:
    """The content of a weights file, tensors on the CPU, without executing anything from it."""
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    if suffix not in PICKLE_SUFFIXES:
        raise UserError(
            f"{path}: weights are read from .safetensors, {', '.join(PICKLE_SUFFIXES)}, not '{path.suffix}'"
        )
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        if found := re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|class): ?\S* ?([\w.]+)", str(error)):
            raise UserError(
                f"{path}: holds objects besides tensors ({found[1] or found[2]}), which are never executed; save its "
                "state_dict alone (torch.save(model.state_dict(), …)) where you trust the file"
            ) from error
        raise UserError(f"{path}: not a readable PyTorch file; download or save it again") from error


def _unwrap(content: Any, prefer: Literal["params", "ema"]) -> tuple[dict[str, Tensor], str]:
    """The state_dict inside what a training code saved, and the path of entries that led to it. A tensor beside such an
    entry (a loss, a best PSNR) makes no state_dict of the whole."""
    entries = (*EMA_ENTRIES, *PLAIN_ENTRIES) if prefer == "ema" else (*PLAIN_ENTRIES, *EMA_ENTRIES)
    trail: list[str] = []
    while isinstance(content, Mapping):
        entry = next((e for e in entries if isinstance(content.get(e), Mapping)), None)
        if entry is None:
            break
        trail.append(entry)
        content = content[entry]
    return _tensors(content), ".".join(trail)


def _tensors(content: Any) -> dict[str, Tensor]:
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}


def _named_entry(content: Any, entry: str, file: Path) -> Any:
    """What lies at `a.b.c` of a file's mappings."""
    for part in entry.split("."):
        if not isinstance(content, Mapping) or part not in content:
            there = ", ".join(str(k) for k, v in content.items() if isinstance(v, Mapping)) if content else ""
            raise UserError(f"{file}: has no entry {entry}; there is {there or 'none'}")
        content = content[part]
    return content


def read_entry(path: str | Path, prefer: Literal["params", "ema"]) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file by name, and the entries that led to them: those that the path names (`net.pth[params]`),
    or those where training codes put them."""
    file, (_, named) = locate(path), split_entry(path)
    content = _read(file)
    tensors, entry = _unwrap(content, prefer)
    if named is not None:
        tensors, entry = _tensors(_named_entry(content, named, file)), named
    if not tensors:
        found = f"its entries: {', '.join(map(str, content))[:200]}" if isinstance(content, Mapping) else type(content)
        raise UserError(
            f"{file}: no state_dict found in it ({found}); name the entry that holds it, {file.name}[ENTRY]"
        )
    return {WRAPPER_NAMES.sub("", name): tensor for name, tensor in tensors.items()}, entry


def read_state_dict(path: str | Path, prefer: Literal["params", "ema"] = "params") -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, `.pth`, `.pt`, `.pk`, `.ckpt` file (or of a folder's model.safetensors), on CPU.

    Looks inside `params`, `params_ema`, `state_dict`, `model` … (`prefer` says which to take when a file holds both
    trained and averaged weights) and removes `module.` and other wrappers from the names. Never unpickles code.
    Raises UserError when the file is missing, unreadable, unsafe or holds no tensors.
    """
    tensors, _ = read_entry(path, prefer)
    prefix = PARALLEL_PREFIX if all(name.startswith(PARALLEL_PREFIX) for name in tensors) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
