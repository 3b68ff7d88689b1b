"""Where the tools are that tests/cluster/install.sh installs."""

import os
import shutil
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("MCIR_TOOLS", "/opt/mcir-tools"))


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
