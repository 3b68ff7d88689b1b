"""`run.json`: what a run directory says of itself, for people, schedulers and `mcir runs`.

    name, state, message    running | finished | preempted | interrupted | failed, and why it failed
    step, steps             the last step written down, and how many there will be
    best, images_per_s      {"metric", "value", "checkpoint"} of the best validation; speed over the last log period
    save_s, save_stall_s    seconds that the last save took beside the training, and that training stood still for it
    trackers                {tracker: the id of its remote run}, with which a resumed run goes on there
    changed                 what the latest start changes of the shipped recipe that it is made from, a line a field
    updated                 when all this was written (UTC); a `running` run whose record grows old was killed
    config                  the file beside it that holds the resolved config of the latest start
    starts                  one for each (re)start: time, step, reason, command, environment and resolved config

The main process alone writes it, to a temporary file that is renamed: a reader never sees half of it. `finished` means
that the last step was made and saved; only then is starting again with `--resume auto` of no use. Nothing heavy is
imported here, so `mcir runs` answers at once.
"""

import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mcir.errors import UserError
from mcir.section import parse_yaml

if TYPE_CHECKING:
    from mcir.train.lock import Lock

log = logging.getLogger(__name__)

FILE = "run.json"
FRESH_S = 60.0
STATES = {0: "finished", 75: "preempted", 130: "interrupted"}
"""By the exit code of `Engine.fit`; an error that escapes it is `failed`."""
REASONS = {
    "running": "the process before ended without a word",
    "finished": "it had finished; more steps were asked for",
    "preempted": "it was preempted",
    "interrupted": "it was interrupted",
    "failed": "it had failed",
}
UNREADABLE: dict[str, Any] = {
    "name": None,
    "state": "unreadable",
    "message": f"{FILE} is not a record of a run: restore it or remove it",
    "step": None,
    "steps": None,
    "best": None,
    "images_per_s": None,
    "trackers": {},
    "updated": None,
    "starts": [],
}
PACKAGES = ("mcir", "torch", "torchvision", "accelerate", "deepspeed", "datasets", "spandrel", "numpy")


class Record:
    """Keeps `run.json` of one run directory from now on. As a context, it notes the error that ends the run.

    Args:
        run_dir: where; None (every process but the main one) keeps nothing.
        lock: of the run directory: released at the end; nothing is written once another process has taken it over.
        name, steps: of the run.
        config: the resolved config as text, written beside the record.
        step: where this start begins.
        origin: the checkpoint of another run that it begins from, if any.
        environment: what the caller knows of this start, added to versions, git state and command.
    """

    def __init__(
        self,
        run_dir: Path | None,
        lock: "Lock | None" = None,
        *,
        name: str,
        steps: int,
        config: str,
        step: int = 0,
        origin: str | None = None,
        environment: dict[str, Any] | None = None,
    ) -> None:
        self._run_dir, self._lock, self._written = run_dir, lock, time.monotonic()
        self.trackers: dict[str, str] = {}
        self._nothing_left = False
        if run_dir is None:
            return
        before = _earlier(run_dir / FILE)
        self.trackers |= before.get("trackers", {})
        self._values: dict[str, Any] = before | {"message": None}
        self._nothing_left = bool(before) and step >= steps  # whatever else the config may ask for now
        if self._nothing_left:
            return
        reason = REASONS[before["state"]] if before else f"begun from {origin}" if origin else "begun"
        if before and before["message"]:
            reason += f": {before['message']}"
        start = {"time": _now(), "step": step, "reason": reason, "command": sys.argv}
        start["environment"] = {**_environment(), **(environment or {})}
        start["config"] = parse_yaml(config, "config.yaml")
        self._values = {
            "name": name,
            "state": "running",
            "message": None,
            "step": step,
            "steps": steps,
            "best": before.get("best"),
            "images_per_s": None,
            "trackers": self.trackers,
            "changed": [],
            "updated": None,
            "config": "config.yaml",
            "starts": [*before.get("starts", []), start],
        }
        self._write("config.yaml", config)
        self.update()

    def update(self, **values: Any) -> None:
        """Write down new values, such as `step`, `images_per_s` or `best`; of a run that nothing is left of, none."""
        if not self._nothing_left:
            self._keep(values)

    def _keep(self, values: dict[str, Any]) -> None:
        self._written = time.monotonic()
        if self._run_dir is not None and not (self._lock and self._lock.taken_over_by()):
            self._values |= values | {"updated": _now()}
            self._write(FILE, json.dumps(self._values, indent=1) + "\n")

    def keep_fresh(self, step: int) -> None:
        """Write the step down if nothing was for a while: an old record means a process that is stuck or gone."""
        if time.monotonic() - self._written > FRESH_S:
            self.update(step=step)

    def end(self, exit_code: int, step: int) -> None:
        """Write down how the run ended. `exit_code` is what `Engine.fit` returns."""
        self._keep({"state": STATES[exit_code], "step": step})

    def require_owned(self) -> None:
        """UserError once another process has taken the run directory over."""
        other = self._lock.taken_over_by() if self._lock else None
        if other:
            raise UserError(f"{other} has taken {self._run_dir} over: this process stood still for too long, and ends")

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self.update(**_ending(error))
        if self._lock:
            self._lock.release()

    def _write(self, name: str, text: str) -> None:
        assert self._run_dir is not None
        try:
            _replace(self._run_dir / name, text)
        except OSError as error:  # the run goes on: on a disk that stays full the next checkpoint ends it
            log.warning("%s could not be written: %s", self._run_dir / name, error)


def name_of(run_dir: Path) -> str | None:
    """The name of the run that a directory holds, as its record says or, where that is damaged, its config; None if
    neither does."""
    for file in (run_dir / FILE, run_dir / "config.yaml"):
        with suppress(OSError, ValueError, TypeError, KeyError, UserError):
            text = file.read_text()
            name = (json.loads(text) if file.name == FILE else parse_yaml(text, str(file)))["name"]
            if isinstance(name, str):
                return name
    return None


def has_failed(run_dir: Path) -> bool:
    """Whether the run in a directory ended with an error, as far as its record can be read."""
    return (_load(run_dir / FILE) or {"state": None})["state"] == "failed"


def note_failure(run_dir: Path, error: BaseException) -> None:
    """Write into the record of an earlier start that going on failed before training began; a finished run stays so."""
    record = _load(run_dir / FILE)
    if record and record["state"] != "finished":
        with suppress(OSError):
            _replace(run_dir / FILE, json.dumps(record | _ending(error) | {"updated": _now()}, indent=1) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of the runs in a folder, or of the run that it is, by name; each with its directory as `path`.

    Raises:
        UserError: there is none, or none but one that is no record. Among others that one is `unreadable`.
    """
    files = [file for file in [folder / FILE, *sorted(folder.glob(f"*/{FILE}"))] if file.exists()]
    if not files:
        raise UserError(f"{folder} holds no runs: no {FILE} in it or in a folder directly below")
    records = []
    for file in files:
        record = _load(file)
        if record is None and len(files) == 1:
            raise UserError(f"{file} is not a record of a run: restore it or remove it")
        records.append({"path": str(file.parent), **(record or UNREADABLE)})
    return records


def table(records: list[dict[str, Any]]) -> Table:
    """Runs with state, step, best metric, speed, starts and age of the record, to print."""
    columns = Table("run", "state", "step", "best", "images/s", "starts", "updated", box=None, pad_edge=False)
    for record in records:
        best, speed = record["best"], record["images_per_s"]
        columns.add_row(
            Path(record["path"]).name,
            record["state"] + (f": {record['message'].splitlines()[0]}" if record["message"] else ""),
            f"{record['step']}/{record['steps']}" if record["starts"] else "",
            f"{best['metric']} {best['value']:.4g} at {best['checkpoint']}" if best else "",
            f"{speed:.1f}" if speed is not None else "",
            str(len(record["starts"])),
            _age(record["updated"]) if record["updated"] else "",
        )
    return columns


def _ending(error: BaseException) -> dict[str, Any]:
    if isinstance(error, KeyboardInterrupt):
        return {"state": "interrupted"}
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return {"state": "failed", "message": text[:1000]}


def _earlier(file: Path) -> dict[str, Any]:
    """What an earlier start left; a record that cannot be read must not keep the run from going on."""
    if not file.exists():
        return {}
    record = _load(file)
    if record is None:
        log.warning("%s is not a record of a run: a new one replaces it", file)
    return record or {}


def _load(file: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(file.read_text())
        known = record["state"] in REASONS and {"message", "step", "steps", "best"} <= record.keys()
        known &= isinstance(record["starts"], list) and isinstance(record["images_per_s"], float | int | None)
        if record["updated"] is not None:
            _age(record["updated"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if known else None


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.partial")
    with temporary.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "git": _git(),
        "directory": os.getcwd(),
        "job": os.environ.get("SLURM_JOB_ID") or os.environ.get("TRAINJOB_NAME"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of mcir's own code and whether it was changed since; an image, which has no repository, is told its
    commit in MCIR_REVISION. None where neither is known."""
    revision = os.environ.get("MCIR_REVISION")
    if revision:
        return {"commit": revision, "changed": None}
    try:
        folder = Path(__file__).parent
        _run_git(folder, "ls-files", "--error-unmatch", "__init__.py")  # not the repository around a virtualenv
        status = _run_git(folder, "status", "--porcelain", "--untracked-files=no", ".")
        return {"commit": _run_git(folder, "rev-parse", "HEAD"), "changed": bool(status)}
    except (OSError, subprocess.SubprocessError):
        return None


def _run_git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def hostname() -> str:
    """The name by which the scheduler knows this host: a Slurm node's where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _age(time: str) -> str:
    seconds = (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
