"""Two hosts, each a network namespace with one process, FSDP2 over gloo, started as the pods of a cluster: what happens
when a worker dies, a host dies, or the cable between them is pulled."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from mcir.train.checkpoint import damage
from tests.cluster.hosts import Host, two_hosts, wait_for
from tests.distributed.launch import write_config
from tests.runs import tiny_config

pytestmark = pytest.mark.cluster

TIMEOUT_S, JOIN_TIMEOUT_S = 15, 30


class Pair:
    """Two hosts with a cable between them, and a run on both."""

    def __init__(self, folder: Path, hosts: tuple[Host, Host]) -> None:
        self.folder, self.hosts, self.run_dir = folder, hosts, folder / "runs" / "tiny"
        values = tiny_config(folder, steps=100_000, checkpoint={"every": 10}, tracking={"log_every": 1})
        self.config = write_config(folder / "config.yaml", values | {"compute": {"timeout_s": TIMEOUT_S}})

    def launch(self, *overrides: str, max_restarts: int = 0) -> None:
        for rank, host in enumerate(self.hosts):
            log = self.folder / f"host{rank}.log"
            variables = {"LAUNCH": "fsdp2_cpu", "JOIN_TIMEOUT_S": str(JOIN_TIMEOUT_S)}
            variables |= {"MAX_RESTARTS": str(max_restarts)}
            host.launch(rank, self.hosts[0], log, str(self.config), *overrides, **variables)

    def record(self) -> dict:
        file = self.run_dir / "run.json"
        return json.loads(file.read_text()) if file.exists() else {"starts": [], "step": 0}

    def wait_for(self, condition, what: str, timeout: float = 300) -> None:
        wait_for(condition, what, self.folder, timeout)

    def wait_for_steps(self, start: int) -> None:
        """Until the run has saved a checkpoint and gone on after its start of this number."""

        def gone_on() -> bool:
            starts = self.record()["starts"]
            assert len(starts) <= start, f"it ended by itself: {starts[-1]['reason']}"
            return len(starts) == start and self.record()["step"] >= starts[-1]["step"] + 15

        self.wait_for(gone_on, f"15 steps after start {start}")

    def wait_for_end(self, timeout: float) -> list[int]:
        """Exit codes of the launchers that were not killed."""
        processes = [host.process for host in self.hosts if host.process]
        self.wait_for(lambda: all(p.poll() is not None for p in processes), "the end on all hosts", timeout)
        return [process.returncode for process in processes]

    def last_saved(self) -> int:
        saved = sorted((self.run_dir / "checkpoints").glob("step-*"))
        assert damage(saved[-1]) is None
        return int(saved[-1].name.removeprefix("step-"))

    def start_again_and_finish(self) -> None:
        """Both hosts go on from the last checkpoint, to the end."""
        last, number = self.last_saved(), len(self.record()["starts"])
        self.launch(f"steps={last + 20}")
        assert self.wait_for_end(300) == [0, 0]
        record = self.record()
        assert (record["state"], record["step"]) == ("finished", last + 20)
        assert [start["step"] for start in record["starts"]][number:] == [last]


@pytest.fixture
def pair(tmp_path):
    with two_hosts() as hosts:
        yield Pair(tmp_path, hosts)


def test_a_dead_worker_is_restarted_and_all_go_on_from_the_last_checkpoint(pair):
    pair.launch(max_restarts=3)
    pair.wait_for_steps(1)
    os.kill(pair.hosts[1].worker(), signal.SIGKILL)
    pair.wait_for_steps(2)
    restart = pair.record()["starts"][1]
    assert restart["step"] >= 10
    assert restart["step"] % 10 == 0
    assert restart["environment"]["world_size"] == 2
    assert all(host.process.poll() is None for host in pair.hosts)


def test_a_dead_host_ends_the_run_which_goes_on_when_it_is_started_again(pair):
    pair.launch()
    pair.wait_for_steps(1)
    pair.hosts[1].kill()
    assert pair.wait_for_end(TIMEOUT_S + JOIN_TIMEOUT_S + 120)[0] != 0
    pair.start_again_and_finish()


def test_a_pulled_cable_ends_the_run_within_the_timeout(pair):
    pair.launch()
    pair.wait_for_steps(1)
    pair.hosts[0].cable("down")
    workers = [host.worker() for host in pair.hosts]
    begun = time.monotonic()
    pair.wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in workers), "the end of both workers", 120)
    assert time.monotonic() - begun < TIMEOUT_S + 60
    first, cut_off = pair.hosts
    pair.wait_for(lambda: first.process.poll() not in (None, 0), "the end of the launcher on the first host")
    # The other launcher, whose store is behind the cable, waits for its kernel to give the connection up: a quarter of
    # an hour. A scheduler ends it, as it ends whatever is left of a job.
    cut_off.kill()
    pair.hosts[0].cable("up")
    pair.start_again_and_finish()
