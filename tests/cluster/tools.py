"""What the tests marked `cluster` need of a machine: where it is missing they are skipped at once, saying why, or fail
where MCIR_REQUIRE=cluster asks for them: then a green run has run them all."""

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

FOLDER = Path(os.environ.get("MCIR_TOOLS", "/opt/mcir-tools"))
RUN = "MCIR_TEST_RUN"


def lacking(what: str) -> NoReturn:
    """Skips the test, or fails it where it is asked for."""
    if "cluster" in os.environ.get("MCIR_REQUIRE", "").split(","):
        pytest.fail(f"MCIR_REQUIRE=cluster: {what}")
    pytest.skip(what)


def tool(name: str) -> str:
    """The path of a program; the test is skipped where there is none."""
    places = [str(FOLDER / "bin"), str(FOLDER / "node_modules" / ".bin"), os.environ["PATH"], "/usr/sbin"]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        lacking(f"no {name}: tests/cluster/install.sh installs it")
    return found


def tools_python(*packages: str) -> str:
    """The Python of the tools' environment; the test is skipped where it or one of the packages is absent."""
    python = FOLDER / "bin" / "python"
    found = {path.name for path in FOLDER.glob("lib/python*/site-packages/*")}
    if not python.exists() or not found.issuperset(packages):
        lacking(f"no {', '.join(packages)} in {FOLDER}: tests/cluster/install.sh installs them")
    return str(python)


def needs(what: str, *command: str, timeout: float = 60) -> None:
    """The test is skipped where a command fails that needs no more than `what`: a right, the network."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        lacking(f"needs {what}: {error}")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        lacking(f"needs {what}: {command[0]}: {said[-1]}")


def needs_root() -> None:
    """Root who may become another user, which the root of a user namespace may not."""
    if os.geteuid() != 0:
        lacking("needs root")
    needs("root with all rights", "setpriv", "--clear-groups", "true")


def end_leftovers() -> None:
    """Ends what test runs that were killed have left running, and marks what this one starts."""
    namespace = os.readlink("/proc/self/ns/pid")  # a test run in a container has the pids of another one
    os.environ[RUN] = f"{namespace} {os.getpid()}"
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            variables = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
            mark = next((v.decode() for v in variables if v.startswith(f"{RUN}={namespace} ".encode())), None)
            if mark and not Path("/proc", mark.split()[1]).exists():
                os.kill(int(entry.name), signal.SIGKILL)
