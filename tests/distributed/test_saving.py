"""Checkpoints that are written beside the training of two processes: what one of them meets is what both do."""

import json
import subprocess

from tests.distributed.launch import ROOT, run, write_config
from tests.runs import tiny_config


def test_ranks_write_beside_the_training_and_end_alike(tmp_path):
    values = tiny_config(tmp_path, steps=1000, checkpoint={"every": 50})
    config = write_config(tmp_path / "config.yaml", values)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]  # where only root may, that part is left out
    mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    script = str(ROOT / "tests" / "distributed" / "inspect_saving.py")
    try:
        process = run("fsdp2_cpu", str(config), str(tmp_path), str(disk) if mounted else "", script=script)
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)
    assert process.returncode == 0, process.stdout
    records = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert records[0] == records[1]
    record = records[0]
    assert not record["there before all have written"]
    assert record["damage"] is None
    assert record["step"] == 2
    assert record["as it was"]
    assert not record["as it is now"]
    if mounted:  # 600 KiB a rank
        assert "needs 1.2 MiB and the disk has 1.0 MiB" in record["too small"]
    assert "step 50 could not be written" in record["error"]
    assert "File too large" in record["error"]
    assert 50 < record["failed at"] < 100
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
    state = json.loads((tmp_path / "runs" / "tiny" / "run.json").read_text())
    assert state["state"] == "failed"
    assert "step 50 could not be written" in state["message"]
