"""Two hosts, each a network namespace with one process, FSDP2 over gloo, started as the pods of a cluster: what happens
when a worker dies, a host dies, or the cable between them is pulled."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mcir.train.checkpoint import damage
from tests.cluster.tools import end_leftovers, lacking, needs_root, tool
from tests.distributed.launch import ROOT, environment, write_config
from tests.runs import tiny_config

pytestmark = pytest.mark.cluster

TIMEOUT_S, JOIN_TIMEOUT_S = 15, 30


def ip(*arguments: str, check: bool = True) -> str:
    return subprocess.run([tool("ip"), *arguments], check=check, capture_output=True, text=True).stdout


class Host:
    """A network namespace with one address; what was started in it dies with it."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address, self.device = f"mcir{name}{os.getpid()}", address, f"v{name}"
        self.process: subprocess.Popen[bytes] | None = None

    def make(self) -> None:
        ip("netns", "delete", self.name, check=False)
        ip("netns", "add", self.name)
        ip("-n", self.name, "link", "set", "lo", "up")

    def launch(self, rank: int, first: "Host", log: Path, max_restarts: int, *arguments: str) -> None:
        pet = {"NNODES": 2, "NODE_RANK": rank, "NPROC_PER_NODE": 1, "MASTER_ADDR": first.address, "MASTER_PORT": 29500}
        ours = {f"PET_{name}": str(value) for name, value in pet.items()}
        ours |= {"PET_LOCAL_ADDR": self.address, "GLOO_SOCKET_IFNAME": self.device, "LAUNCH": "fsdp2_cpu"}
        ours |= {"MAX_RESTARTS": str(max_restarts), "JOIN_TIMEOUT_S": str(JOIN_TIMEOUT_S)}
        ours |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.process = subprocess.Popen(
            [tool("ip"), "netns", "exec", self.name, "bash", "launch/kubernetes/start.sh", *arguments],
            cwd=ROOT,
            env=environment() | ours,
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def pids(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.name, check=False).split()]

    def worker(self) -> int:
        """The process that trains: it alone has RANK in its environment."""
        for pid in self.pids():
            with contextlib.suppress(OSError):
                if any(v.startswith(b"RANK=") for v in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                    return pid
        raise AssertionError(f"no worker on {self.name}")

    def kill(self) -> None:
        """As a power cut: all processes at once."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process:
            self.process.wait()

    def remove(self) -> None:
        self.kill()
        ip("netns", "delete", self.name, check=False)


class Pair:
    """Two hosts with a cable between them, and a run on both."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "runs" / "tiny"
        values = tiny_config(folder, steps=100_000, checkpoint={"every": 10}, tracking={"log_every": 1})
        self.config = write_config(folder / "config.yaml", values | {"compute": {"timeout_s": TIMEOUT_S}})
        self.hosts = [Host("a", "10.77.0.1"), Host("b", "10.77.0.2")]

    def connect(self) -> None:
        for host in self.hosts:
            host.make()
        a, b = self.hosts
        ip("link", "add", a.device, "netns", a.name, "type", "veth", "peer", "name", b.device, "netns", b.name)
        for host in self.hosts:
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.device)
            ip("-n", host.name, "link", "set", host.device, "up")

    def launch(self, *overrides: str, max_restarts: int = 0) -> None:
        for rank, host in enumerate(self.hosts):
            log = self.folder / f"host{rank}.log"
            host.launch(rank, self.hosts[0], log, max_restarts, str(self.config), *overrides)

    def record(self) -> dict:
        file = self.run_dir / "run.json"
        return json.loads(file.read_text()) if file.exists() else {"starts": [], "step": 0}

    def wait_for(self, condition, what: str, timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            logs = "\n".join(file.read_text()[-2000:] for file in sorted(self.folder.glob("host*.log")))
            assert time.monotonic() < deadline, f"not in {timeout} s: {what}\n{logs}"
            time.sleep(0.1)

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
    tool("ip")
    needs_root()
    end_leftovers()
    made = Pair(tmp_path)
    try:
        try:
            made.connect()
        except subprocess.CalledProcessError as error:
            lacking(f"needs the right to make network namespaces: {error.stderr.strip()}")
        yield made
    finally:
        for host in made.hosts:
            host.remove()


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
    ip("-n", pair.hosts[0].name, "link", "set", pair.hosts[0].device, "down")
    workers = [host.worker() for host in pair.hosts]
    begun = time.monotonic()
    pair.wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in workers), "the end of both workers", 120)
    assert time.monotonic() - begun < TIMEOUT_S + 60
    first, cut_off = pair.hosts
    pair.wait_for(lambda: first.process.poll() not in (None, 0), "the end of the launcher on the first host")
    # The other launcher, whose store is behind the cable, waits for its kernel to give the connection up: a quarter of
    # an hour. A scheduler ends it, as it ends whatever is left of a job.
    cut_off.kill()
    ip("-n", pair.hosts[0].name, "link", "set", pair.hosts[0].device, "up")
    pair.start_again_and_finish()
