"""Checkpoints at another place (`checkpoint.to`), for machines whose disks do not outlive a job: each is copied when it
is whole here, and `--resume auto` brings the newest back.

    TO/RUN/config.yaml                     the resolved config: whose place this is; written before the first step
    TO/RUN/step-00012000/…, manifest.json  the files of the checkpoint, and last of all its manifest

Invariants: what has a manifest there is whole there; what comes back is checked against it before it gets its name;
what fails for good is an error, as on a disk.
"""

import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from mcir.data import storage
from mcir.data.storage import open_store, steadily
from mcir.errors import UserError
from mcir.section import parse_yaml
from mcir.train.checkpoint import NAME, damage, is_healthy, remove, saved
from mcir.train.config import CheckpointConfig

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def place_of(to: str, run_dir: Path) -> str:
    return f"{to.rstrip('/')}/{run_dir.name}"


def names(to: str) -> list[str]:
    """The run directories that have a place there. UserError where it cannot be looked at."""
    store, folder = open_store(to)
    return [name for name in _inside(store, folder, to) if not name.startswith(".")]


def has_checkpoints(place: str, name: str) -> bool:
    """Whether there are whole checkpoints of the run of this name."""
    store, folder = open_store(place)
    inside = _inside(store, folder, place)
    if "config.yaml" not in inside:
        return False
    values = parse_yaml(steadily(lambda: store.cat_file(f"{folder}/config.yaml"), place).decode(), place)
    if not isinstance(values, dict) or values.get("name") != name:
        return False
    return any(MANIFEST in _inside(store, f"{folder}/{step}", place) for step in _steps(inside))


def announce(place: str, config: str) -> None:
    """Say there whose place it is. UserError: nothing can be written there, which is better known now than at the first
    checkpoint."""
    store, folder = open_store(place)

    def write() -> None:
        store.makedirs(folder, exist_ok=True)
        store.pipe_file(f"{folder}/config.yaml", config.encode())

    steadily(write, place)


def copier(config: CheckpointConfig, run_dir: Path) -> Callable[[Path], None]:
    """What copies each checkpoint of a run, where it is to be copied."""
    if config.to is None:
        return lambda checkpoint: None
    return functools.partial(
        upload, place=place_of(config.to, run_dir), keep_last=config.keep_last, keep_best=config.keep_best
    )


def upload(checkpoint: Path, place: str, keep_last: int, keep_best: bool) -> None:
    """Copy a whole checkpoint, its manifest last; then remove there what is neither here, nor the best, nor among the
    last ones. UserError after some ten minutes of trying."""
    store, folder = open_store(place)
    target = f"{folder}/{checkpoint.name}"

    def put(file: Path) -> None:
        steadily(lambda: store.put_file(str(file), f"{target}/{file.name}"), f"{place}/{file.name}", storage.PATIENT_S)

    if checkpoint.name in _inside(store, folder, place):
        _remove(store, target, place)
    steadily(lambda: store.makedirs(target, exist_ok=True), place)
    files = json.loads((checkpoint / MANIFEST).read_text())
    for name in files:
        put(checkpoint / name)
    put(checkpoint / MANIFEST)
    there = _steps(_inside(store, folder, place))
    best = json.loads((checkpoint / "state.json").read_text()).get("best")
    kept = {
        *(path.name for path in saved(checkpoint.parent)),
        *there[-keep_last:],
        best[1] if best and keep_best else "",
    }
    for name in there:
        if name not in kept:
            _remove(store, f"{folder}/{name}", place)


def bring(place: str, run_dir: Path, newest: Path | None) -> Path | None:
    """The newest whole checkpoint there, a healthy one if there is one, copied into the run directory, which is made if
    it is new; None where nothing there is newer than `newest`, the one that is here. What is passed over is said."""
    store, folder = open_store(place)
    here = int(NAME.fullmatch(newest.name)[1]) if newest else -1  # type: ignore[index]
    sick = None
    for name in reversed(_steps(_inside(store, folder, place))):
        if int(name.removeprefix("step-")) <= here:
            break
        if (own := run_dir / "checkpoints" / name).exists() and damage(own) is None:
            continue  # passed over already
        if MANIFEST not in _inside(store, f"{folder}/{name}", place):
            log.warning("checkpoint %s/%s is not whole: trying the one before", place, name)
            continue
        try:
            path = _download(store, f"{folder}/{name}", f"{place}/{name}", run_dir)
        except _Damaged as error:
            log.warning("checkpoint %s/%s is damaged (%s): trying the one before", place, name, error)
            continue
        if is_healthy(path):
            return path
        log.warning("checkpoint %s was saved while no gradient was finite: trying one before", path)
        sick = sick or path
    return sick


class _Damaged(Exception):
    pass


def _download(store: Any, folder: str, place: str, run_dir: Path) -> Path:
    """To a hidden directory, checked, then given its name."""
    name = PurePosixPath(folder).name
    is_new = not run_dir.exists()
    base = run_dir.with_name(f".{run_dir.name}.partial") if is_new else run_dir
    hidden = base / "checkpoints" / (name if is_new else f".{name}.partial")
    try:
        shutil.rmtree(base if is_new else hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        manifest = json.loads(steadily(lambda: store.cat_file(f"{folder}/{MANIFEST}"), place))
        if not isinstance(manifest, dict) or any("/" in file for file in manifest):
            raise _Damaged("its manifest is none")
        for file in [*manifest, MANIFEST]:
            steadily(functools.partial(store.get_file, f"{folder}/{file}", str(hidden / file)), f"{place}/{file}")
        if fault := damage(hidden):
            raise _Damaged(fault)
        if is_new:
            shutil.copy(hidden / "config.yaml", base / "config.yaml")  # whose directory it is
            base.rename(run_dir)
        else:
            remove(hidden.with_name(name))
            hidden.rename(hidden.with_name(name))
    except ValueError as error:
        raise _Damaged(str(error)) from error
    except OSError as error:
        raise UserError(f"{place} cannot be brought to {run_dir}: {error}") from error
    finally:
        shutil.rmtree(base if is_new else hidden, ignore_errors=True)
    print(f"{place}: brought to {run_dir}", flush=True)
    return run_dir / "checkpoints" / name


def _steps(found: Iterable[str]) -> list[str]:
    """Of checkpoints, from old to new."""
    matches = [(int(match[1]), name) for name in found if (match := NAME.fullmatch(name)) and not name.endswith(".old")]
    return [name for _, name in sorted(matches)]


def _inside(store: Any, folder: str, place: str) -> list[str]:
    """The names in a folder; none where it is not there."""

    def listed() -> list[str]:
        store.invalidate_cache()  # others write there
        try:
            return [PurePosixPath(name).name for name in store.ls(folder, detail=False)]
        except FileNotFoundError:
            return []

    return steadily(listed, place)


def _remove(store: Any, folder: str, place: str) -> None:
    """The manifest first: what is left of it in between is not taken for whole."""
    if MANIFEST in _inside(store, folder, place):
        steadily(lambda: store.rm_file(f"{folder}/{MANIFEST}"), place)
    steadily(lambda: store.rm(folder, recursive=True), place)
