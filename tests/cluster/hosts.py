"""Hosts for tests: network namespaces with a cable between two of them, on which launch/kubernetes/start.sh is run."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.tools import end_leftovers, lacking, needs_root, tool
from tests.distributed.launch import ROOT, environment


def ip(*arguments: str, check: bool = True) -> str:
    return subprocess.run([tool("ip"), *arguments], check=check, capture_output=True, text=True).stdout


class Host:
    """A network namespace with a name and an address; what was started in it dies with it."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address, self.device = f"mcir{name}{os.getpid()}", address, f"v{name}"
        self.process: subprocess.Popen[bytes] | None = None

    def make(self) -> None:
        ip("netns", "delete", self.name, check=False)
        ip("netns", "add", self.name)
        ip("-n", self.name, "link", "set", "lo", "up")

    def launch(self, rank: int, first: "Host", log: Path, *arguments: str, **variables: str) -> None:
        """One process of a run on two hosts, of which the one of rank 0 is `first`."""
        pet = {"NNODES": 2, "NODE_RANK": rank, "NPROC_PER_NODE": 1, "MASTER_ADDR": first.address, "MASTER_PORT": 29500}
        ours = {f"PET_{name}": str(value) for name, value in pet.items()}
        ours |= {"PET_LOCAL_ADDR": self.address, "GLOO_SOCKET_IFNAME": self.device}
        ours |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.process = self.start(log, "bash", "launch/kubernetes/start.sh", *arguments, **ours | variables)

    def start(self, log: Path, *command: str, **variables: str) -> subprocess.Popen[bytes]:
        named = ["unshare", "--uts", "bash", "-c", 'hostname "$0"; exec "$@"', self.name, *command]
        return subprocess.Popen(
            [tool("ip"), "netns", "exec", self.name, *named],
            cwd=ROOT,
            env=environment() | variables,
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

    def cable(self, state: str) -> None:
        """Plug it in (`up`) or pull it (`down`)."""
        ip("-n", self.name, "link", "set", self.device, state)

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


@contextlib.contextmanager
def two_hosts(first: str = "10.77.0.1", second: str = "10.77.0.2") -> Iterator[tuple[Host, Host]]:
    """Two hosts of these addresses and the cable between them; the test is skipped where they cannot be made."""
    tool("ip")
    needs_root()
    end_leftovers()
    a, b = hosts = Host("a", first), Host("b", second)
    try:
        try:
            for host in hosts:
                host.make()
            ip("link", "add", a.device, "netns", a.name, "type", "veth", "peer", "name", b.device, "netns", b.name)
            for host in hosts:
                ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.device)
                host.cable("up")
        except subprocess.CalledProcessError as error:
            lacking(f"needs the right to make network namespaces: {error.stderr.strip()}")
        yield hosts
    finally:
        for host in hosts:
            host.remove()


def wait_for(condition, what: str, logs: Path, timeout: float = 300) -> None:
    """Until it holds; fails with the ends of the host*.log in the folder `logs`."""
    deadline = time.monotonic() + timeout
    while not condition():
        said = "\n".join(file.read_text()[-2000:] for file in sorted(logs.glob("host*.log")))
        assert time.monotonic() < deadline, f"not in {timeout} s: {what}\n{said}"
        time.sleep(0.1)
