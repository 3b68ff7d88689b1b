"""One writer a run directory: `lock.json` in it names the process that writes there, its owner.

The owner touches the file every few seconds. Who finds a lock made on the same machine asks the kernel whether that
process is still there, and knows at once. Of another machine (a node that was replaced, a container) nothing can be
asked, and clocks differ: there it watches for a while whether the file is touched. Neither needs more of a file system
than creating a file that must not exist and renaming: NFS and Lustre have no other locks everywhere.

An owner that stood still for so long that another start took over finds that out before its next checkpoint.
"""

import json
import os
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mcir.errors import UserError
from mcir.train.record import hostname

FILE = "lock.json"
BEAT_S = 10.0
PATIENCE_S = 45.0
"""Four beats missed, or a slow network file system: less than any timeout of processes that wait."""
SETTLE_S = 0.5
"""Two starts may find the same stale lock: the one whose claim is still there after this has it."""


class Lock:
    """This process's claim on a run directory, kept until `release`."""

    def __init__(self, run_dir: Path, claim: dict[str, Any]) -> None:
        self._file, self._claim = run_dir / FILE, claim
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="lock").start()

    def taken_over_by(self) -> str | None:
        """Who else claims the directory by now; None as long as it is this process's."""
        claim = _read(self._file)
        return None if claim is None or claim == self._claim else _name(claim)

    def release(self) -> None:
        if not self._ended.is_set() and self.taken_over_by() is None:
            self._file.unlink(missing_ok=True)
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(OSError):  # gone or out of reach: `taken_over_by` tells what became of it
                os.utime(self._file)


def acquire(run_dir: Path) -> Lock:
    """The lock of a run directory that exists. UserError: a live process has it, or nothing can be written there."""
    file, claim = run_dir / FILE, _claim()
    try:
        with file.open("x") as handle:
            handle.write(json.dumps(claim))
    except FileExistsError:
        require_free(run_dir)
        temporary = file.with_name(f".{file.name}.{claim['token']}.partial")
        temporary.write_text(json.dumps(claim))
        temporary.replace(file)
        time.sleep(SETTLE_S)
        if (other := _read(file)) not in (claim, None):
            raise _taken(run_dir, other) from None
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written ({error.strerror})") from None
    return Lock(run_dir, claim)


def require_free(run_dir: Path) -> None:
    """UserError if a live process has the lock; returns once it is known that none has it."""
    found, own = _read(run_dir / FILE), _claim()
    if not (run_dir / FILE).exists():
        return
    here = ("host", "boot", "namespace")
    if found is not None and all(found.get(key) == own[key] for key in here):
        if found["pid"] == own["pid"]:
            return  # this process itself: its earlier run has ended, or ends at its next checkpoint
        if found["started"] == (_started(found["pid"]) or "ended"):
            raise _taken(run_dir, found)
        return
    print(f"{run_dir} was written by {_name(found)}: waiting {PATIENCE_S:.0f} s for a sign of life", flush=True)
    first, end = _touched(run_dir / FILE), time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE_S / 10))
        if (now := _touched(run_dir / FILE)) != first:
            if now is None:
                return  # released
            raise _taken(run_dir, _read(run_dir / FILE))


def _taken(run_dir: Path, claim: dict[str, Any] | None) -> UserError:
    return UserError(
        f"{run_dir} is being written by {_name(claim)}: let it end or stop it (without --resume, a start gets a "
        "directory of its own)"
    )


def _claim() -> dict[str, Any]:
    return {
        "host": hostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID") or os.environ.get("TRAINJOB_NAME"),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "namespace": _namespace(),
        "started": _started(os.getpid()),
        "token": uuid.uuid4().hex,
    }


def _name(claim: dict[str, Any] | None) -> str:
    if claim is None:
        return "a process that has not said who it is"
    job = f", job {claim['job']}" if claim["job"] else ""
    return f"process {claim['pid']} on {claim['host']}{job} since {claim['since']}"


def _read(file: Path) -> dict[str, Any] | None:
    """The claim; None where there is none, or one that was not written to its end."""
    try:
        claim = json.loads(file.read_text())
        return claim if {"host", "pid", "job", "since", "started", "token"} <= claim.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _touched(file: Path) -> int | None:
    """When the file was last touched, in its own file system's time. Opened for it: NFS asks its server only then."""
    try:
        with file.open("rb") as handle:
            return os.fstat(handle.fileno()).st_mtime_ns
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process of this machine started, in ticks since boot; None if there is none. Elsewhere than on Linux only
    whether it is there."""
    stat = _text(f"/proc/{pid}/stat")
    if stat:
        state, *fields = stat.rpartition(")")[2].split()
        return None if state == "Z" else fields[18]
    if not Path("/proc/self/stat").exists():
        with suppress(OSError):
            os.kill(pid, 0)
            return "running"
    return None


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
