"""A trained network from whatever the user points at: a run, a checkpoint, a weights file of ours or of others.

Invariants: which file was taken and its SHA-256 are known to every result; a file that its checkpoint's manifest
contradicts is refused; the network is laid out in memory as in the run, so that it gives the same bits.
"""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import nn

from mcir.archs import Arch, parse
from mcir.archs.state_dict import EMA_ENTRIES, WEIGHTS_FILE, locate, split_entry
from mcir.config import load
from mcir.errors import UserError
from mcir.section import is_url, parse_yaml
from mcir.weights.files import build_from, load_into, read_metadata
from mcir.weights.remote import EMA_FILE, Kind, fetch_all, name_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A network in eval mode, on the CPU, and where its weights come from."""

    name: str
    """What results call it."""
    path: Path
    """The weights file."""
    origin: str
    """Where it is from: its path, or a URL with the commit or the checksum (`fetch`)."""
    sha256: str
    net: nn.Module
    arch: Arch
    metadata: dict[str, str]
    """Of the file: `step`, `config` (JSON) …; empty for a file that mcir did not write."""

    @property
    def kind(self) -> Kind | None:
        """Which of a run's weights these are; None where nobody knows."""
        if "step" not in self.metadata:
            return None
        return "ema" if self.path.name == EMA_FILE or self.metadata.get("kind") == "ema" else "target"

    @property
    def config(self) -> dict[str, Any] | None:
        """The resolved config of the run, where the file holds it."""
        return json.loads(self.metadata["config"]) if "config" in self.metadata else None

    def net_on(self, device: torch.device) -> nn.Module:
        """The network, moved to the device, in the memory format that the run validates it in."""
        channels_last = ((self.config or {}).get("compute") or {}).get("channels_last")
        if channels_last or (channels_last is None and self.arch.descriptor.channels_last and device.type == "cuda"):
            self.net.to(memory_format=torch.channels_last)
        return self.net.to(device)


def open_trained(
    places: Sequence[str],
    kind: Kind | None = None,
    archs: Sequence[str] = (),
    allow_import: bool = False,
    accelerator: Accelerator | None = None,
) -> list[Trained]:
    """The networks at `places`, each PATH or NAME=PATH.

    A path is a weights file, a checkpoint's or export's folder, a run directory (its best checkpoint, or the newest
    where none is best), or a URL (`fetch`). `kind` chooses where there are averaged (`ema`) and raw (`target`) weights;
    by default what the run validates: the EMA where there is one. `archs` describes files that do not describe
    themselves: one for all of them or one each, a YAML mapping such as `{name: edsr, scale: 2}` or a config file.
    `allow_import`: see `build_from`; `accelerator`: see `fetch_all`. UserError: nothing there, damaged, not fitting,
    two with one name.
    """
    named = [split_name(place) for place in places]
    fetched = fetch_all([place for _, place in named], kind, accelerator)
    files = [choose_file(one.path, None if one.chosen else kind) for one in fetched]
    bare = [file for file in files if "arch" not in read_metadata(file)]
    if len(archs) not in ((1, len(bare)) if bare else (0,)):
        if not bare:
            raise UserError("--arch: all weights files describe their network; leave it out")
        each = "" if len(bare) == 1 else f", one for all {len(bare)} such files or one for each"
        raise UserError(
            f"{bare[0]}: does not say what network it is of; give --arch '{{name: …}}' or --arch CONFIG{each}"
        )
    described = [parse_arch(text) for text in archs] if len(archs) != 1 else [parse_arch(archs[0])] * len(bare)
    foreign = dict(zip(bare, described, strict=True))
    opened: list[Trained] = []
    for (name, place), one, file in zip(named, fetched, files, strict=True):
        name = name or (name_of(place) if is_url(place) else default_name(Path(place)))
        if any(name == other.name for other in opened):
            raise UserError(f"two weights are called {name}: give them names, NAME=PATH")
        sha256 = checksum(file)
        if file in foreign:
            arch, metadata = foreign[file], dict[str, str]()
            net = _load_foreign(file, arch, kind)
        else:
            net, arch, metadata = build_from(file, allow_import=allow_import)
        opened.append(Trained(name, file, one.origin if is_url(one.origin) else str(file), sha256, net, arch, metadata))
    return opened


def split_name(place: str) -> tuple[str | None, str]:
    """NAME=PATH or PATH; what exists is a path, whatever is in its name."""
    match = re.fullmatch(r"([A-Za-z0-9][\w.+ -]*)=(.+)", place)
    if match and not Path(place).exists():
        return match[1], match[2]
    return None, place


def default_name(path: Path) -> str:
    """runs/a -> a; runs/a/checkpoints/step-00000300/… -> a-step-00000300…; elsewhere/net.pth -> net."""
    path = path.resolve()
    inside = path if path.is_dir() else path.parent
    stem = "" if path.is_dir() else path.stem
    if inside.parent.name == "checkpoints":
        return "-".join(filter(None, (inside.parent.parent.name, inside.name, stem)))
    return stem or inside.name


def choose_file(path: Path, kind: Kind | None) -> Path:
    """The weights file that a path means. UserError if there is none."""
    file, entry = split_entry(path)
    if file.is_file():
        if kind and (entry or file.suffix == ".safetensors"):
            raise UserError(f"{path}: is one set of weights; leave --weights-kind out, or name its folder")
        return path
    if not path.exists():
        raise UserError(f"{path}: no such weights file, checkpoint or run directory")
    folder = _best(path) if (path / "checkpoints").is_dir() else path
    model, ema = folder / WEIGHTS_FILE, folder / EMA_FILE
    if not model.is_file() and not ema.is_file():
        raise UserError(f"{path}: holds no {WEIGHTS_FILE}: neither a run directory, a checkpoint nor an export")
    if kind is None and ema.is_file() and model.is_file():
        config = json.loads(read_metadata(model).get("config", "{}"))
        kind = (config.get("validation") or {}).get("weights")
    chosen = model if kind == "target" or (kind is None and not ema.is_file()) else ema
    if not chosen.is_file():
        raise UserError(f"{folder}: has no {chosen.name}: the run kept no such weights (ema_decay)")
    return chosen


def checksum(file: Path) -> str:
    """SHA-256 of a file; UserError where its checkpoint's manifest says otherwise."""
    file = locate(file)
    try:
        with file.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        manifest = file.with_name("manifest.json")
        written = json.loads(manifest.read_text()) if manifest.is_file() else {}
        expected = written[file.name]["sha256"] if file.name in written else found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read and checked ({error})") from error
    if expected != found:
        raise UserError(f"{file}: is damaged (its checksum is not the manifest's); take another checkpoint")
    return found


def parse_arch(text: str) -> Arch:
    """The network that a YAML mapping or the `arch` of a config file describes."""
    if Path(text).is_file():
        return load([text]).arch
    values = parse_yaml(text, "--arch")
    if not isinstance(values, dict):
        raise UserError(f"--arch {text}: neither a config file nor a mapping such as '{{name: edsr, scale: 2}}'")
    try:
        return parse(values)
    except ValidationError as error:
        raise UserError(f"--arch {text}: {faults(error)}") from None


def faults(error: ValidationError) -> str:
    """What pydantic found, in a line."""
    lines = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ") for fault in error.errors())
    return "; ".join(lines)


def _best(run_dir: Path) -> Path:
    checkpoints = sorted((run_dir / "checkpoints").glob("step-*"))
    if not checkpoints:
        raise UserError(f"{run_dir}: the run has no checkpoint yet")
    newest = checkpoints[-1]
    try:
        best = json.loads((newest / "state.json").read_text())["best"]
        path = newest.with_name(best[1]) if best else newest
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{newest}: is damaged (state.json: {error}); name another checkpoint") from error
    if path.is_dir():
        return path
    log.warning("%s: its best checkpoint, %s, is gone: %s, the newest, is taken", run_dir, path.name, newest.name)
    return newest


def _load_foreign(file: Path, arch: Arch, kind: Kind | None) -> nn.Module:
    net = arch.build()
    entry = load_into(net, file, prefer="params" if kind == "target" else "ema", strict=True).entry
    averaged = any(part in EMA_ENTRIES for part in entry.split("."))
    if kind and averaged != (kind == "ema"):
        raise UserError(f"{file}: holds no {'averaged' if kind == 'ema' else 'raw'} weights; leave --weights-kind out")
    return net.eval()
