"""The health check of docker/compose.yaml, run as it stands there."""

import os
import subprocess
import time
from pathlib import Path

from ruamel.yaml import YAML

COMPOSE = Path(__file__).parents[1] / "docker" / "compose.yaml"


def health_check(service: str) -> list[str]:
    """(CMD or CMD-SHELL, the command) of a service."""
    return YAML(typ="safe").load(COMPOSE)["services"][service]["healthcheck"]["test"]


def is_healthy(folder: Path) -> bool:
    kind, command = health_check("trainer")
    assert kind == "CMD-SHELL"
    return subprocess.run(command, shell=True, cwd=folder, check=False).returncode == 0


def test_a_run_whose_record_is_fresh_is_healthy(tmp_path):
    assert not is_healthy(tmp_path)
    for name, age in (("old", 3600), ("new", 1200)):
        record = tmp_path / "runs" / name / "run.json"
        record.parent.mkdir(parents=True)
        record.write_text("{}")
        os.utime(record, (time.time() - age, time.time() - age))
        assert is_healthy(tmp_path) == (name == "new")
