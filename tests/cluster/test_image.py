"""The image and the compose file, without a Docker engine: buildah builds it from a base that is made here, podman runs
it. Needs 30 GB of disk for some minutes; set MCIR_TEST_IMAGE to an image that is built already to test that one."""

import json
import os
import shutil
import socket
import subprocess
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest

from mcir.train.checkpoint import damage
from tests.cluster.tools import lacking, needs, needs_root, tool, tools_python
from tests.distributed.launch import ROOT
from tests.test_compose import health_check

pytestmark = pytest.mark.cluster

BASE, IMAGE = "localhost/mcir-test-base:slim", "localhost/mcir-test:built"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
QUICK = ["steps=4", "validation.every=4", "checkpoint.every=2", "tracking.log_every=1"]


def run(*command: str, timeout: float = 1800, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT)
    assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def podman(tmp_path_factory):
    path, config = tool("podman"), tmp_path_factory.mktemp("podman") / "containers.conf"
    config.write_text(
        f'[engine]\nruntime = "{tool("runc")}"\n'
        f'[containers]\ninit_path = "{tool("catatonit")}"\n'
        'default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]\n'
    )
    needs_root()
    apart = ["--mount", "--propagation=unchanged", "--net", "--pid", "--uts", "--ipc", "--fork", "true"]
    needs("the right to make namespaces", "unshare", *apart)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_CONF", str(config))
        needs("a podman that works", path, "info")
        yield path


@pytest.fixture(scope="module")
def image(podman, tmp_path_factory):
    if "MCIR_TEST_IMAGE" in os.environ:
        yield os.environ["MCIR_TEST_IMAGE"]
        return
    mmdebstrap, buildah = tool("mmdebstrap"), tool("buildah")
    if shutil.disk_usage("/var/lib").free < 30 * 2**30:
        lacking("less than 30 GB of disk are free")
    folder = tmp_path_factory.mktemp("build")
    download = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--retries=0", "--timeout=10"]
    needs("the network", tools_python("pip"), *download, f"--dest={folder}", "hatchling")
    packages = "--include=python3,python3-venv,python3-dev,ca-certificates,libgomp1"
    base = [mmdebstrap, "--variant=minbase", packages, "bookworm", str(folder / "base.tar")]
    needs("Debian's packages", *base, timeout=600)
    run(podman, "import", "--quiet", str(folder / "base.tar"), BASE)
    (folder / "pip.conf").write_text(f"[global]\ncert = {CERTIFICATES}\n")
    (folder / "uv.toml").write_text("system-certs = true\n")
    cache = Path.home() / ".cache" / "uv"
    cache.mkdir(parents=True, exist_ok=True)
    mounts = {CERTIFICATES: f"{CERTIFICATES}:ro", str(folder / "pip.conf"): "/etc/pip.conf:ro"}
    mounts |= {str(folder / "uv.toml"): "/etc/uv/uv.toml:ro", str(cache): "/root/.cache/uv"}
    volumes = [word for source, target in mounts.items() for word in ("-v", f"{source}:{target}")]
    arguments = ["--build-arg", f"BASE_IMAGE={BASE}", "--build-arg", "REVISION=0123abc"]
    where = ["-t", IMAGE, "-f", "docker/Dockerfile", "."]
    run(buildah, "bud", "--isolation", "chroot", "--pull-never", *volumes, *arguments, *where)
    yield IMAGE
    run(podman, "rmi", "--force", IMAGE, BASE, check=False)
    run(podman, "image", "prune", "--force", check=False)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A folder that the image's user can write, mounted where runs go."""
    folder = tmp_path / "runs"
    folder.mkdir()
    os.chown(folder, 1000, 1000)
    return folder


def options(folder: Path) -> list[str]:
    return ["--pull=never", "--network=host", "--shm-size=256m", "-v", f"{folder}:/mcir/runs"]


def record(folder: Path) -> dict:
    file = folder / "quickstart" / "run.json"
    return json.loads(file.read_text()) if file.exists() else {"step": 0}


def wait_for(condition, timeout: float = 600) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_the_quick_start_runs_as_nobody_special(podman, image, run_dir):
    output = run(podman, "run", "--rm", *options(run_dir), image, "train", "configs/quickstart.yaml", *QUICK)
    assert "heldout" in output
    assert record(run_dir)["state"] == "finished"
    check = ["--entrypoint", "sh", image, "-c", health_check("trainer")[1]]
    run(podman, "run", "--rm", *options(run_dir), *check)
    assert {path.stat().st_uid for path in run_dir.rglob("*")} == {1000}


def test_two_processes_save_on_sigterm_and_go_on(podman, image, run_dir):
    launch = ["--entrypoint", "accelerate", image, "launch", "--config_file", "launch/accelerate/ddp_cpu.yaml"]
    train = ["-m", "mcir", "train", "configs/quickstart.yaml", *QUICK[1:], "--resume", "auto"]
    name = "mcirtest-two"
    run(podman, "run", "--detach", "--replace", "--name", name, *options(run_dir), *launch, *train, "steps=100000")
    try:
        wait_for(lambda: record(run_dir)["step"] >= 1)
        run(podman, "stop", "--time", "60", name)
        logs = subprocess.run([podman, "logs", name], capture_output=True, text=True, check=True)
    finally:
        run(podman, "rm", "--force", name, check=False)
    stopped = record(run_dir)
    assert stopped["state"] == "preempted", logs.stdout + logs.stderr
    last = sorted((run_dir / "quickstart" / "checkpoints").glob("step-*"))[-1]
    assert last.name == f"step-{stopped['step']:08d}"
    assert damage(last) is None
    assert stopped["starts"][0]["environment"]["world_size"] == 2
    run(podman, "run", "--rm", *options(run_dir), *launch, *train, f"steps={stopped['step'] + 1}")
    assert record(run_dir)["state"] == "finished"
    assert record(run_dir)["starts"][1]["step"] == stopped["step"]


def test_zero_compiles_its_helper_and_trains(podman, image, run_dir):
    """DeepSpeed compiles its optimizer when it is first used: the image has what that takes."""
    launch = ["--entrypoint", "accelerate", image, "launch", "--config_file", "launch/accelerate/zero2_cpu.yaml"]
    run(podman, "run", "--rm", *options(run_dir), *launch, "-m", "mcir", "train", "configs/quickstart.yaml", *QUICK)
    assert record(run_dir)["state"] == "finished"
    assert record(run_dir)["starts"][0]["environment"]["strategy"] == "zero2"


def test_nothing_in_it_but_what_is_said(podman, image):
    inspected = json.loads(run(podman, "inspect", image))[0]
    config, version = inspected["Config"], tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["mcir"]
    assert not config.get("ExposedPorts")
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert labels["version"] == version
    assert labels.keys() >= {"title", "description", "licenses", "revision"}
    assert not [variable for variable in config["Env"] if any(w in variable for w in ("TOKEN", "SECRET", "PASSWORD"))]
    shell = ["run", "--rm", "--pull=never", "--network=none", "--entrypoint", "bash", image, "-c"]
    found = run(podman, *shell, "ls -A /mcir; ls /opt; id -u; ls /opt/venv/bin; true")
    words = set(found.split())
    assert words >= {"configs", "launch", "LICENSE", "venv", "1000", "accelerate", "tensorboard"}
    assert words.isdisjoint({".git", "tests", "build", "uv", "pytest", "ruff", "0"})
    listing = "from importlib.metadata import distributions as d; [print(i.name, i.version) for i in d()]"
    installed = dict(line.split() for line in run(podman, *shell, f"python -c '{listing}'").splitlines())
    for name in ("torch", "torchvision", "accelerate", "deepspeed", "datasets", "numpy"):
        assert installed[name].split("+")[0] in [version for locked, version in locks() if locked == name], name


def locks() -> list[tuple[str, str]]:
    """(name, version) of every line of the lock; a name has a line for each Python that differs."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [(line.split("==")[0], line.split("==")[1].split(" ;")[0].strip()) for line in lines if "==" in line]


def test_compose_brings_up_trainer_and_tensorboard(podman, image, tmp_path, monkeypatch):
    override = tmp_path / "here.yaml"  # no GPU, no bridge network
    command = ["--config_file", "launch/accelerate/ddp_cpu.yaml", "-m", "mcir", "train", "configs/quickstart.yaml"]
    override.write_text(
        "services:\n"
        "  trainer:\n    network_mode: host\n    deploy: !reset null\n    shm_size: 256mb\n"
        f"    command: {json.dumps([*command, *QUICK])}\n"
        "  tensorboard:\n    network_mode: host\n    ports: !reset []\n"
    )
    project = [tool("podman-compose"), "-p", "mcirtest", "-f", "docker/compose.yaml", "-f", str(override)]
    monkeypatch.setenv("IMAGE", image)
    with socket.socket() as port:
        if port.connect_ex(("127.0.0.1", 6006)) == 0:
            lacking("something listens on port 6006 already")
    run(*project, "down", "--volumes", check=False)  # of a test run that was killed
    try:
        run(*project, "--podman-run-args=--pull=never", "up", "-d", "--no-build")
        run(podman, "wait", "mcirtest_trainer_1", timeout=600)
        logs = run(podman, "logs", "mcirtest_trainer_1")
        assert "heldout" in logs

        def tags() -> bytes:
            try:
                with urllib.request.urlopen("http://127.0.0.1:6006/data/plugin/scalars/tags", timeout=10) as answer:
                    return answer.read()
            except OSError:
                return b""

        wait_for(lambda: b"loss/total" in tags())
        run(podman, "healthcheck", "run", "mcirtest_tensorboard_1")
    finally:
        run(*project, "down", "--volumes", check=False)


def test_linters_find_nothing():
    run(tool("hadolint"), "docker/Dockerfile")
    run(tool("node"), tool("dclint"), "--quiet", "docker/compose.yaml")
