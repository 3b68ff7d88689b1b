"""What strategies make of the processes: groups with the run's time limit, and replicas that are equal."""

import json

import pytest

from tests.distributed.launch import ROOT, run, write_config
from tests.runs import tiny_config


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_processes"), [("ddp", 2), ("hsdp", 4), ("zero2", 2)])
def test_groups_wait_as_long_as_the_run_and_replicas_start_alike(tmp_path, name, num_processes):
    """Also where each process draws other weights, as on other CPUs."""
    optim = {"optimizer": {"name": "adam", "lr": 1e-3}, "max_grad_norm": 0.01}
    values = tiny_config(tmp_path, compute={"timeout_s": 234}, optim=optim)
    config = write_config(tmp_path / "config.yaml", values)
    script = str(ROOT / "tests" / "distributed" / "inspect_groups.py")
    process = run(f"{name}_cpu", str(config), str(tmp_path), script=script)
    assert process.returncode == 0, process.stdout
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(num_processes)]
    assert len(ranks[0]["timeouts_s"]) >= {"ddp": 2, "hsdp": 4, "zero2": 3}[name]  # of training, of saving, and its own
    assert all(set(rank["timeouts_s"]) == {234} for rank in ranks)
    assert all(rank["sums"] == ranks[0]["sums"] for rank in ranks)
    assert len(set(ranks[0]["sums"])) == 3
