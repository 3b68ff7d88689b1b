"""Every command that the pages, the recipes' headers and the cluster scripts show does what it says.

A page is read from top to bottom in a fresh copy of the tree. STANDS_FOR fills in its placeholders, ADAPTED shortens
its commands, ELSEWHERE names those that are not run here: all others are run as they are printed."""

import re
import shlex
from typing import Any

import pytest
import typer

from mcir.cli import app
from mcir.config import load
from tests.pages import ROOT, Place, in_this_process, place, shown, unpack

PAGES = ["README.md", "configs/README.md", "launch/README.md", "mcir/README.md"]
RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("docker", "launch")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix != ".md"
)
STANDS_FOR = {
    "CONFIG": "configs/sr/edsr_light_x2_div2k.yaml",
    "RECIPE": "configs/quickstart.yaml",
    "NETWORK": "nafnet",
    "runs/NAME": "runs/edsr_light_x2_div2k",
    "name=NAME": "name=edsr_light_x2_div2k",
}
SHORT = "steps=2 batch_size=2 data.num_workers=0 validation.every=2 checkpoint.every=2"
SMALL = "arch.num_blocks=1 objective.contrast=null"
ADAPTED = {
    r"pip install uv && .* && ": "",  # .ci/run installs
    r"launch/accelerate/ddp\.yaml": "launch/accelerate/ddp_cpu.yaml",
    r"--num_processes 8": "--num_processes 2",
    r"mcir data pack [^;]*": r"\g<0> --num-workers 0",
    r"mcir train (?!.*--dry-run).*": rf"\g<0> {SHORT}",
    r"mcir bench (?!.*--sweep).*": r"\g<0> --steps 2 --rounds 1",
    r"mcir bench .*--sweep.*": rf"\g<0> {SMALL}",
    r"mcir study (?!.*--dry-run).*": r"\g<0> --dry-run",  # tests/study trains
    r"tensorboard .*": r"\g<0> --inspect",  # lists what it would show; tests/cluster/test_tensorboard.py looks at it
}
"""What takes seconds and no GPU, for what is printed."""
ELSEWHERE = {
    r"^pytest|-m pytest": "are the tests themselves",
    r"bench_negatives|benchmarks\.report": "take minutes of a machine that does nothing else",
    r"launch/slurm/|^scancel": "tests/cluster/test_slurm.py, on a Slurm of two nodes",
    r"--report-only": "tests/cluster/test_slurm.py, after the array",
    r"launch/kubernetes/start\.sh": "tests/cluster/test_two_hosts.py, on two hosts",
    r"TCPStore": "tests/cluster/test_elastic.py, on two hosts",
    r"^docker|docker compose": "tests/cluster/test_image.py, with podman",
    r"^kubectl apply": "tests/cluster/test_kubernetes.py renders what it applies, and checks it",
    r"^kubectl port-forward": "needs a cluster",
    r"^py-spy": "needs a run that hangs",
}


def parsed(words: list[str]) -> tuple[Any, list[str]]:
    """Which command of the command line that is, and what it is given."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "resolve_command") and words:
        _, command, words = command.resolve_command(command.context_class(command), words)
    return command, words


def is_whole(command: str) -> bool:
    """Neither given in part nor named alone, without what it needs."""
    if "…" in command or not re.fullmatch("mcir [a-z ]+", command):
        return "…" not in command
    found, given = parsed(command.split()[1:])
    return bool(given) or not any(parameter.required for parameter in found.params)


def is_run(command: str) -> bool:
    return is_whole(command) and not any(re.search(each, command) for each in ELSEWHERE)


def filled_in(command: str) -> str:
    for name, value in STANDS_FOR.items():
        command = command.replace(name, value)
    return command


def to_run(*files: str) -> list[str]:
    """What is run of the files' commands, each once."""
    commands = [filled_in(command) for file in files for command in shown(file) if is_run(command)]
    for pattern, replacement in ADAPTED.items():
        commands = [re.sub(pattern, replacement, command) for command in commands]
    return list(dict.fromkeys(command.removeprefix(".venv/bin/") for command in commands))


def new_on(page: str) -> list[str]:
    """What the pages before it do not run already."""
    before = to_run(*PAGES[: PAGES.index(page)])
    return [command for command in to_run(page) if command not in before]


def test_commands_are_found_and_what_fails_is_told(tmp_path):
    page, script = tmp_path / "page.md", tmp_path / "x.sbatch"
    page.write_text(
        "Of `mcir data pack` and `views: 4`, see `LAUNCH=ddp sbatch a.sh`.\n"
        "```sh\nls photos   # as they are\nmcir data pack \\\n  none x\n```\n"
        "```\nls\n```\nor `mcir train …`.\n"
    )
    commands = ["mcir data pack", "LAUNCH=ddp sbatch a.sh", "ls photos", "mcir data pack none x", "mcir train …"]
    assert shown(str(page)) == commands
    assert to_run(str(page)) == ["LAUNCH=ddp sbatch a.sh", "ls photos", "mcir data pack none x --num-workers 0"]
    script.write_text(
        "# Run it:\n#\n#   for i in 1 2; do\n#     sbatch x.sbatch $i; done\n#\n# or `mcir runs runs`.\nls\n"
    )
    assert shown(str(script)) == ["for i in 1 2; do sbatch x.sbatch $i; done", "mcir runs runs"]
    assert "none is not a folder" in str(in_this_process("mcir data pack none x", tmp_path))
    assert "photos" in str(Place(tmp_path, {}).fault("ls photos"))
    assert Place(tmp_path, {}).fault("ls") is None


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if new_on(page)])
def test_every_command_of_a_page_runs(page, tmp_path):
    faults = []
    with place(tmp_path) as here:
        if page == "README.md":  # whose reader has the benchmarks
            assert not in_this_process(next(c for c in to_run(*RECIPES) if "${set}_x4" in c), tmp_path)
        for command in new_on(page):
            only_packs = "mcir data pack" in command and "--push" not in command  # a hundred, a second each
            faults.append(in_this_process(command, tmp_path) if only_packs else here.fault(command))
    faults = [fault for fault in faults if fault]
    assert not faults, "\n\n".join(faults)


def test_every_command_of_a_recipe_s_header_runs(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    unpack(tmp_path)
    commands = to_run(*RECIPES)
    assert len(commands) > 40
    faults = [fault for command in commands if (fault := in_this_process(command, tmp_path))]
    assert not faults, "\n\n".join(faults)


def test_no_command_of_a_script_s_header_is_forgotten():
    """They start clusters and images: what needs neither would be run with the recipes'."""
    assert sum(len(shown(script)) for script in SCRIPTS) > 10
    assert to_run(*SCRIPTS) == []


def test_what_is_run_elsewhere_is_shown_and_is_there():
    commands = [command for file in [*PAGES, *SCRIPTS] for command in shown(file)]
    for pattern, reason in ELSEWHERE.items():
        assert any(re.search(pattern, command) for command in commands), f"{pattern}: no page shows it"
        assert all((ROOT / path).exists() for path in re.findall(r"tests/[\w/.]+\.py", reason)), reason
    adapted = [command for file in [*PAGES, *RECIPES] for command in shown(file) if is_run(command)]
    for pattern in [*STANDS_FOR, *ADAPTED]:
        assert any(re.search(pattern, command) for command in adapted), f"{pattern}: no page shows it"


@pytest.mark.parametrize("file", [*PAGES, *SCRIPTS])
def test_every_option_and_field_exists(file):
    """Without a wait for the slow tests, and also of what is given in part or run elsewhere."""
    names = "|".join(typer.main.get_command(app).commands)
    for command in map(filled_in, shown(file)):
        for text in re.findall(rf"\bmcir ((?:{names})\b[^;|>)]*)", command):
            found, given = parsed(shlex.split(text))
            options = [name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)]
            assert {word for word in given if word.startswith("--")} <= set(options), command
            if given and is_whole(command):
                found.make_context(text, list(given))
                files = [word for word in given if (ROOT / word).is_file() and word.endswith(".yaml")]
                if text.startswith(("train", "bench")):
                    load([ROOT / file for file in files], [word for word in given if "=" in word])
