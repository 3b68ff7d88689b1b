"""The script for GPU machines runs here too, with small sizes."""

import json
import subprocess

import pytest

from tests.distributed.launch import ROOT, environment
from tests.gpu.markdown import report


@pytest.mark.slow
def test_every_part_passes(tmp_path):
    done = subprocess.run(["bash", "tests/gpu/run.sh", str(tmp_path)], cwd=ROOT, env=environment(), check=False)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [part["fault"] for part in results] == [None] * len(results)
    assert done.returncode == 0
    shown = (tmp_path / "report.md").read_text()
    assert all(network in shown for network in ("EDSR-light x4, fp32", "SwinIR-light x4, bf16", "NAFNet-32, bf16"))


def test_what_failed_is_in_the_report():
    parts = [("environment", None, {"machine": "m", "commit": "c"}), ("tests", "exit code 1: pytest\nlines", {})]
    parts += [("launches", "1 of 1 launches failed: ddp, bf16", {"ddp, bf16": {"fault": "no end in 3 s"}})]
    parts += [("NAFNet-32, bf16", "not run: the time was up", {})]
    timed = {"ms": {"as it is": 20.0, "compiled": 15.0}, "differ": {"as it is": 0.0, "compiled": 2e-4}}
    parts += [("ways to compute the contrast", None, timed)]
    shown = report([{"name": name, "fault": fault, "found": found} for name, fault, found in parts])
    assert "- tests: exit code 1: pytest\n" in shown
    assert "| ddp, bf16 | no end in 3 s |" in shown
    assert "| NAFNet-32, bf16 | not run: the time was up |" in shown
    assert "| compiled | 15.0 | 0.75 | 2.0e-04 |" in shown
