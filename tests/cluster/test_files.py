"""What the pages and scripts for clusters name is there: files, paths in commands, versions. All but shellcheck's needs
no tools."""

import re
import subprocess
import tomllib

import pytest

from tests.cluster.tools import tool
from tests.distributed.launch import ROOT

PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md"]
SCRIPTS = [path for folder in ("docker", "launch") for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
OURS = r"(?<![\w./-])(?:configs|docker|launch|mcir|tests)/[\w./-]*\w"
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def named(path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page.read_text())
    assert len(links) > 5
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("file", [PAGES[0], *SCRIPTS], ids=named)
def test_every_path_from_the_root_of_the_repository_exists(file):
    assert not [path for path in re.findall(OURS, file.read_text()) if not (ROOT / path).exists()]


def test_every_launch_file_and_script_that_the_page_names_exists():
    """Also those that it names from launch/ or, in a row of their own kind, from launch/accelerate."""
    names = set(re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:yaml|sh|sbatch))`", PAGES[1].read_text()))
    assert names >= {"accelerate/fsdp2_cpu.yaml", "fsdp2.yaml", "kubernetes/base/storage.yaml"}
    folders = (ROOT, ROOT / "launch", ROOT / "launch" / "accelerate")
    assert not [name for name in names if not any((folder / name).exists() for folder in folders)]


def test_the_image_has_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"^ARG VERSION=(.*)$", DOCKERFILE, re.MULTILINE) == [version]


def test_the_image_takes_every_dependency_at_its_version_in_the_lock():
    (install,) = [line for line in DOCKERFILE.replace("\\\n", " ").splitlines() if "--extra deepspeed" in line]
    assert "--constraint requirements.lock" in re.sub(" +", " ", install)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["deepspeed"]
    names = {re.sub("[._]", "-", re.split(r"[<>=!~\[; ]", requirement)[0]) for requirement in asked}
    assert names <= set(re.findall(r"^([\w-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))


@pytest.mark.cluster
def test_shellcheck_finds_nothing():
    files = [path for folder in (".ci", "docker", "launch", "tests") for path in (ROOT / folder).rglob("*")]
    scripts = [path for path in files if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")]
    assert {path.name for path in scripts} >= {"start.sh", "train.sbatch", "install.sh", "run"}
    done = subprocess.run([tool("shellcheck"), *map(str, scripts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
