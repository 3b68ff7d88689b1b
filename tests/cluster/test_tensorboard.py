"""What a user sees in TensorBoard after a short quick start: drawn curves and loaded pictures, in a real browser."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from tests.cluster.tools import FOLDER, lacking, needs, tool
from tests.distributed.launch import ROOT, environment

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> tuple[str, str]:
    """Node and Chromium, tried."""
    node, chromium = tool("node"), tool("chromium")
    if not (FOLDER / "node_modules" / "playwright-core").is_dir():
        lacking(f"no playwright-core in {FOLDER}: tests/cluster/install.sh installs it")
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", profile]
    needs("a Chromium that starts", chromium, *options, "--dump-dom", "about:blank")
    return node, chromium


@pytest.fixture(scope="module")
def url(browser, tmp_path_factory):
    """TensorBoard over a finished run."""
    runs = tmp_path_factory.mktemp("runs")
    overrides = ["steps=12", "validation.every=6", "tracking.log_every=2", f"runs_dir={runs}"]
    command = [sys.executable, "-m", "mcir", "train", "configs/quickstart.yaml", *overrides]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--host", "127.0.0.1", f"--port={port}"]
    server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait()


def test_curves_pictures_dashboard_settings_and_config_are_shown(browser, url, tmp_path):
    node, chromium = browser
    script = str(ROOT / "tests" / "cluster" / "open_tensorboard.js")
    done = subprocess.run(
        [node, script, url, chromium, str(tmp_path / "page.png")],
        env=os.environ | {"NODE_PATH": str(FOLDER / "node_modules")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    curves = {curve["title"]: curve["path"] for curve in found["curves"]}
    assert curves.keys() >= {"loss/total", "loss/contrast", "validation/heldout/psnr", "validation/heldout/ssim"}
    for title, path in curves.items():
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        coloured = pixels.max(axis=2) - pixels.min(axis=2) > 20  # axes and grid are grey
        assert coloured.any(axis=0).sum() > 30, f"no line in {title}"
    assert {picture["title"] for picture in found["pictures"]} == {
        "heldout/astronaut",
        "heldout/chelsea",
        "heldout/coffee",
    }
    # degraded | negative | restored | clean | difference, 384 pixels each
    assert all(picture["width"] == 5 * 384 for picture in found["pictures"])
    assert found["dashboard"] == {"Is it learning?": 2, "Is it fast?": 2, "Is the contrast sane?": 2}
    assert found["settings"].startswith("Trial ID")
    assert {"quickstart", "best/heldout/psnr"} <= set(found["settings"].splitlines())
    assert found["config"].lstrip().startswith("name: quickstart")
