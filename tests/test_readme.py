"""What the README shows is what works; its commands are run by test_pages.py."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


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
