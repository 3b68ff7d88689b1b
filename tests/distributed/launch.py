"""Runs the user's command, `accelerate launch --config_file launch/accelerate/NAME.yaml -m mcir train ...`, for
real."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]


def write_config(path: Path, values: dict[str, Any]) -> Path:
    with path.open("w") as file:
        YAML().dump(values, file)
    return path


def command(
    launch_file: str, *arguments: str, num_processes: int | None = None, script: str | None = None
) -> list[str]:
    """The command line of `mcir ARGUMENTS` (or of a Python script) on `num_processes`, by default those of the launch
    file; `single` runs without a launcher."""
    python, what = [sys.executable, "-m"], [script] if script else ["-m", "mcir"]
    if launch_file == "single":
        return [sys.executable, *what, *arguments]
    config = str(ROOT / "launch" / "accelerate" / f"{launch_file}.yaml")
    launcher = ["accelerate.commands.launch", "--config_file", config]
    launcher += ["--num_processes", str(num_processes)] if num_processes else []
    return [*python, *launcher, *what, *arguments]


def python_path(root: Path = ROOT) -> str:
    """`root` before what is on the path already."""
    return os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))


def environment() -> dict[str, str]:
    """Rehearsals, also on a machine with a GPU: what `single` trains is compared with the `*_cpu` files."""
    ours = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    return inherited | ours


def run(
    launch_file: str, *arguments: str, num_processes: int | None = None, script: str | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """The finished process, stdout and stderr together."""
    return subprocess.run(
        command(launch_file, *arguments, num_processes=num_processes, script=script),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
