"""What the README and the pages beside the code show is what works."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

from mcir.cli import app
from mcir.config import load
from tests.runs import png

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": 15, "configs/README.md": 15, "launch/README.md": 5, "mcir/README.md": 0}
"""A page, and how many commands at least are found on it."""
MCIR = re.compile(r"\bmcir ((?:train|config|data|evaluate|restore|export|runs|bench|study|init)\b[^`\n]*)")
STANDS_FOR = {"CONFIG": "configs/quickstart.yaml", "RECIPE": "configs/quickstart.yaml"}


def block(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, marker
    return found.group(1)


def test_the_library_snippet_runs_as_printed_and_adds_six_lines(tmp_path):
    snippet = block("library")
    assert re.findall(r"# (\d)", snippet) == list("123456")
    (tmp_path / "script.py").write_text(snippet + "\nassert float(loss) > 0\nassert negatives.age(step) == [0]\n")
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_the_six_lines_it_is_a_plain_loop(tmp_path):
    lines = [line for line in block("library").splitlines() if not re.search(r"# \d", line)]
    (tmp_path / "script.py").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_file_the_readme_links_to_exists():
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_two_commands_use_the_lock():
    for marker in ("quick start", "tests"):
        assert "uv pip install -p .venv -r requirements.lock -e ." in block(marker)
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    assert all("==" in line for line in lock.splitlines() if line and not line.startswith("#"))


def commands(page: str) -> list[list[str]]:
    """The words after `mcir` of each command on a page that is given whole."""
    found = [re.split(r"[;>#|]|\)\"| \(", text)[0] for text in MCIR.findall((ROOT / page).read_text())]
    words = [shlex.split(text) for text in found if text.count("'") % 2 == 0]
    return [[STANDS_FOR.get(word, word) for word in each] for each in words if not re.search("[…[]", "".join(each[1:]))]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_of_the_command_line_s(page):
    """With its options and the configs it names; what it does is tried below, and where its feature is tested."""
    assert len(commands(page)) >= PAGES[page]
    for words in commands(page):
        command, rest = typer.main.get_command(app), words
        while hasattr(command, "resolve_command") and rest:
            _, command, rest = command.resolve_command(command.context_class(command), rest)
        if rest:
            command.make_context(words[0], list(rest))
        if words[0] in ("train", "bench") and rest:
            arguments = [word for word in rest if word.endswith(".yaml") or "=" in word]
            load([word for word in arguments if (ROOT / word).exists()], [word for word in arguments if "=" in word])


def shell_lines(page: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [line.split("   #")[0].strip() for block in blocks for line in block.splitlines()]


@pytest.mark.slow
def test_every_command_of_the_readme_runs_as_printed(tmp_path):
    """In order, in an empty folder with the repository's files; shortened by an override where it trains or times."""
    for name in ("configs", "launch", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name if name != ".venv" else Path(sys.prefix))
    sides = {"photos/sharp/0.png": 64, "photos/blurred/0.png": 64, "photos/hr/0.png": 64, "photos/lr/0x4.png": 16}
    sides |= {"DIV2K/DIV2K_train_HR/0001.png": 480, "DIV2K/DIV2K_train_LR_bicubic/X4/0001x4.png": 120}
    for name, side in sides.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(np.full((side, side, 3), 128, np.uint8)))
    ran = []
    for line in ["mcir train configs/quickstart.yaml", *shell_lines("README.md")]:
        if line.startswith("pip install") or "tensorboard" in line or "hf://" in line:
            continue  # these two commands are CI's own; curves are looked at in tests/cluster, the Hub in tests/weights
        if "--sweep" in line or "fast.yaml" in line:
            continue  # minutes of compiling: tests/bench trains with what a sweep prints
        line = re.sub(r"^(\.venv/bin/)?", ".venv/bin/", line).replace(" --push owner/name", "")
        shorter = ""
        if "mcir train" in line and "--dry-run" not in line:
            shorter = " steps=2 validation.every=2 checkpoint.every=2"
        if "mcir bench" in line:
            shorter = " --steps 2 --rounds 1"
        done = subprocess.run(shlex.split(line + shorter), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        ran.append(line)
    assert len(ran) > 11
