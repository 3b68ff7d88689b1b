"""What the tests marked `cluster` need of a machine: where it is missing they are skipped at once, saying why."""

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("MCIR_TOOLS", "/opt/mcir-tools"))
RUN = "MCIR_TEST_RUN"


def tool(name: str) -> str:
    """The path of a program; the test is skipped where there is none."""
    places = [str(FOLDER / "bin"), str(FOLDER / "node_modules" / ".bin"), os.environ["PATH"], "/usr/sbin"]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        pytest.skip(f"no {name}: tests/cluster/install.sh installs it")
    return found


def tools_python(*packages: str) -> str:
    """The Python of the tools' environment; the test is skipped where it or one of the packages is absent."""
    python = FOLDER / "bin" / "python"
    found = {path.name for path in FOLDER.glob("lib/python*/site-packages/*")}
    if not python.exists() or not found.issuperset(packages):
        pytest.skip(f"no {', '.join(packages)} in {FOLDER}: tests/cluster/install.sh installs them")
    return str(python)


def needs(what: str, *command: str, timeout: float = 60) -> None:
    """The test is skipped where a command fails that needs no more than `what`: a right, the network."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"needs {what}: {error}")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        pytest.skip(f"needs {what}: {command[0]}: {said[-1]}")


def needs_root() -> None:
    """Root who may become another user, which the root of a user namespace may not."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
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
