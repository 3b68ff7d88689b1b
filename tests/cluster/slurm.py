"""A real Slurm of two nodes on this machine, for tests: slurmctld, two slurmd and munge, with everything they write in
one folder. Needs root and Debian's slurm-wlm and munge; no systemd. It may have more processors and memory than there
are, and its first job has another number in each test run: the number tells which processes and port are the job's."""

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

TOOLS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "srun", "scontrol", "scancel", "squeue")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
SlurmdParameters=config_overrides
FirstJobId={first_job}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=30
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname={host} Port={first} CPUs=2 RealMemory=6000
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname={host} Port={second} CPUs=2 RealMemory=6000
PartitionName=normal Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """The cluster while entered; `run` is a Slurm command's output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Slurm":
        try:
            self._bring_up()
        except BaseException:
            self._stop()
            raise
        return self

    def _bring_up(self) -> None:
        munge = self.folder / "munge"
        for path in (munge, self.folder / "state", self.folder / "spool-n1", self.folder / "spool-n2"):
            path.mkdir(parents=True)
        munge.chmod(0o711)
        port, first, second = _free_ports(3)
        self.config = self.folder / "slurm.conf"
        self.config.write_text(
            CONFIG.format(
                host=socket.gethostname(),
                port=port,
                folder=self.folder,
                first=first,
                second=second,
                first_job=os.getpid(),
            )
        )
        subprocess.run(["mungekey", "--create", f"--keyfile={munge}/key"], env=self._environment(), check=True)
        files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={munge}/socket", *files)
        _wait_for(lambda: (munge / "socket").exists(), "munged")
        self._start("slurmctld", "-D", "-c", "-f", str(self.config))
        for node in ("n1", "n2"):
            self._start("slurmd", "-D", "-f", str(self.config), "-N", node)
        self._wait_for_nodes("2 idle")

    def _wait_for_nodes(self, states: str) -> None:
        nodes = ("sinfo", "--noheader", "--partition=normal", "--format=%D %t")
        _wait_for(lambda: self.run(*nodes).strip() == states, states)

    def cut_power(self, node: str) -> None:
        """All that runs on a node ends at once, and Slurm has found out that it is gone."""
        processes = _processes()
        tasks = {pid for pid, (_, variables) in processes.items() if f"SLURMD_NODENAME={node}".encode() in variables}
        steps = {parent for parent, _ in (processes[pid] for pid in tasks)} - {1, os.getpid()}
        (daemon,) = (daemon for daemon in self._daemons if daemon.args[-1] == node)
        self._daemons.remove(daemon)
        for pid in (daemon.pid, *steps, *tasks):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=power")

    def bring_back(self, node: str) -> None:
        self._start("slurmd", "-D", "-f", str(self.config), "-N", node)
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def __exit__(self, *_: object) -> None:
        jobs = ("squeue", "--noheader", "--format=%A")
        for job in self.run(*jobs).split():
            self.run("scancel", "--signal=KILL", "--full", job)
            self.run("scancel", job)
        try:
            _wait_for(lambda: not self.run(*jobs), "the end of all jobs")  # without the daemons their steps never end
        finally:
            self._stop()

    def _stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, **variables: str) -> str:
        done = subprocess.run(
            command,
            env=self._environment() | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout + (done.stderr if done.returncode else "")

    def show(self, job: str, field: str) -> str:
        """A field of a job, such as JobState (RUNNING, PENDING, COMPLETED, ...), as scontrol says."""
        shown = self.run("scontrol", "show", "job", job)
        return next((word.split("=")[1] for word in shown.split() if word.startswith(f"{field}=")), shown)

    def _start(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("ab")
        self._daemons.append(subprocess.Popen(command, env=self._environment(), stdout=log, stderr=log))

    def _environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.config), "PATH": f"{os.environ['PATH']}:/usr/sbin"}


def _processes() -> dict[int, tuple[int, list[bytes]]]:
    """Parent and environment of each process."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit():
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                found[int(entry.name)] = int(parent), (entry / "environ").read_bytes().split(b"\0")
    return found


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = sorted(opened.getsockname()[1] for opened in sockets)
    for opened in sockets:
        opened.close()
    return ports


def _wait_for(condition, what: str, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} was not there in {timeout} s")
        time.sleep(0.2)
