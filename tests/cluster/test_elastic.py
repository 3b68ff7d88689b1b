"""PET_NNODES=1:2: of two hosts one loses its power, the other goes on alone from the last checkpoint, and they are two
again when it is back; no sample is lost or taken twice. The hosts are network namespaces."""

import json
import re
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cluster.hosts import Host, two_hosts, wait_for
from tests.cluster.noting import write_numbered
from tests.distributed.launch import ROOT, run, write_config
from tests.runs import tiny_config

pytestmark = pytest.mark.cluster

STEPS, NUM_ROWS, BATCH = 180, 24, 4
TIMEOUT_S = 15
TOGETHER = 10
"""Steps to take together before the power cut, and after the return."""


class Elastic:
    """A run on one or two hosts, of which the first has the higher address: rank 0, which writes, is on the other."""

    def __init__(self, folder: Path, hosts: tuple[Host, Host], launch_file: str, on_each: int = 1, **variables) -> None:
        self.folder, self.hosts, self.processes = folder, hosts, 2 * on_each
        self.variables = {"PET_NNODES": "1:2", "PET_NPROC_PER_NODE": str(on_each), "LAUNCH": launch_file} | variables
        self.run_dir = folder / "runs" / "tiny"
        noting = {"folder": str(folder / "notes"), "processes": self.processes}
        arch = {"name": "import", "target": "tests.cluster.noting:Noting", "scale": 2, "arguments": noting}
        values = tiny_config(folder, steps=STEPS, batch_size=BATCH, arch=arch, checkpoint={"every": 5})
        values["data"]["train"][0]["source"]["path"] = str(write_numbered(folder / "numbered", NUM_ROWS))
        values |= {"tracking": {"log_every": 1}, "compute": {"timeout_s": TIMEOUT_S}}
        values["optim"] = {"optimizer": {"name": "adam", "lr": 1e-4}}
        self.config = write_config(folder / "config.yaml", values)

    def launch(self, rank: int, *overrides: str) -> None:
        log, arguments = self.folder / f"host{rank}.log", (str(self.config), *overrides)
        self.hosts[rank].launch(rank, self.hosts[0], log, *arguments, **self.variables)

    def record(self) -> dict:
        file = self.run_dir / "run.json"
        return json.loads(file.read_text()) if file.exists() else {"starts": [], "step": 0}

    def wait_for_start(self, number: int, world_size: int, steps: int) -> None:
        """Until the run has made some steps since its start of this number."""

        def made() -> bool:
            record = self.record()
            return len(record["starts"]) == number and record["step"] >= record["starts"][-1]["step"] + steps

        wait_for(made, f"{steps} steps after start {number}", self.folder)
        assert self.record()["starts"][-1]["environment"]["world_size"] == world_size

    def notes(self) -> list[dict[int, list[int]]]:
        """Of each start, in order, the numbers of the images in the batch of a step since it."""
        files = sorted((self.folder / "notes").iterdir(), key=lambda file: file.stat().st_ctime)
        starts, sizes = [], [start["environment"]["world_size"] for start in self.record()["starts"]]
        assert len(files) == sum(sizes)
        for size in sizes:
            batches: dict[int, list[int]] = {}
            for file in files[:size]:
                for line in file.read_text().splitlines():
                    step, world_size, *numbers = map(int, line.split())
                    assert world_size == size
                    batches.setdefault(step, []).extend(numbers)
            starts.append(batches)
            files = files[size:]
        return starts


@pytest.mark.parametrize(
    ("launch_file", "on_each", "place", "lost"),
    [
        ("ddp_cpu", 1, "the first host", 1),
        ("fsdp2_cpu", 1, "a store", 0),
        ("hsdp_cpu", 2, "a shared file", 0),  # two replicas of two shards, one, and two again
    ],
)
def test_a_lost_host_costs_the_steps_since_the_last_checkpoint_and_comes_back(
    tmp_path, launch_file, on_each, place, lost
):
    """They meet on the first, which must then stay, or elsewhere, as launch/README.md says: then any may go."""
    with two_hosts("10.77.0.2", "10.77.0.1") as hosts:
        places = {"a shared file": str(tmp_path / "meet-1"), "a store": f"{hosts[1].address}:29500"}
        elsewhere = {"PET_RDZV_ENDPOINT": places[place]} if place in places else {}
        if place == "a store":
            (code,) = re.findall(r"`python -c '(.*)'`", (ROOT / "launch" / "README.md").read_text())
            hosts[1].start(tmp_path / "store.log", sys.executable, "-c", code)
        elastic = Elastic(tmp_path, hosts, launch_file, on_each, **elsewhere)
        elastic.launch(0)
        elastic.launch(1)
        elastic.wait_for_start(1, 2 * on_each, TOGETHER)
        hosts[lost].cable("down")  # first: nobody is told that its processes have ended
        hosts[lost].kill()
        elastic.wait_for_start(2, on_each, 6)
        hosts[lost].cable("up")
        elastic.launch(lost)
        elastic.wait_for_start(3, 2 * on_each, TOGETHER)
        processes = [host.process for host in hosts]
        wait_for(lambda: all(p.poll() is not None for p in processes), "the end on both hosts", tmp_path)
        assert [process.returncode for process in processes] == [0, 0]

    record = elastic.record()
    assert (record["state"], record["step"]) == ("finished", STEPS)
    begun = [start["step"] for start in record["starts"]]
    assert len(begun) == 3
    assert begun[0] == 0
    assert begun[1] >= 5
    assert begun[1] % 5 == 0  # the last checkpoint; before the other is let in, one is written
    assert begun[2] >= begun[1] + 6

    ends = [*begun[1:], STEPS]
    history = [
        batches[step - begin]
        for begin, end, batches in zip(begun, ends, elastic.notes(), strict=True)
        for step in range(begin + 1, end + 1)
    ]
    assert len(history) == STEPS
    assert {len(batch) for batch in history} == {BATCH}
    seen = [number for batch in history for number in batch]
    for epoch in range(STEPS * BATCH // NUM_ROWS):
        assert sorted(seen[epoch * NUM_ROWS :][:NUM_ROWS]) == list(range(NUM_ROWS))

    arguments = ["name=undisturbed", f"arch.arguments.folder={tmp_path / 'others'}"]
    undisturbed = run(launch_file, "train", str(elastic.config), *arguments)
    assert undisturbed.returncode == 0, undisturbed.stdout
    last = Path("checkpoints", f"step-{STEPS:08d}", "model.safetensors")
    expected, got = load_file(tmp_path / "runs" / "undisturbed" / last), load_file(elastic.run_dir / last)
    assert expected.keys() == got.keys()
    furthest = max(float((expected[key] - got[key]).abs().max()) for key in expected)
    print(f"\n{launch_file}, {place}, starts at {begun}: weights at most {furthest:.1e} from an undisturbed run's")
    assert furthest < 1e-5


def test_the_loss_of_the_host_where_they_meet_ends_the_run_which_goes_on_when_it_is_started_again(tmp_path):
    with two_hosts() as hosts:
        elastic = Elastic(tmp_path, hosts, "ddp_cpu")
        elastic.launch(0)
        elastic.launch(1)
        elastic.wait_for_start(1, 2, TOGETHER)
        worker = hosts[1].worker()
        hosts[0].cable("down")
        hosts[0].kill()
        wait_for(lambda: not Path(f"/proc/{worker}/exe").exists(), "the end of the other's worker", tmp_path)
        hosts[0].cable("up")  # a launcher whose store has gone silent waits for its kernel, as long as that does
        wait_for(lambda: hosts[1].process.poll() is not None, "the end of the other's launcher", tmp_path)
        assert hosts[1].process.returncode != 0
        assert len(elastic.record()["starts"]) == 1

        elastic.launch(0, "steps=30")
        elastic.launch(1, "steps=30")
        processes = [host.process for host in hosts]
        wait_for(lambda: all(p.poll() is not None for p in processes), "the end on both hosts", tmp_path)
        assert [process.returncode for process in processes] == [0, 0]
    record = elastic.record()
    assert (record["state"], record["step"]) == ("finished", 30)
    assert record["starts"][1]["step"] >= 5


def test_a_batch_that_a_smaller_number_of_nodes_cannot_share_is_said_before_the_first_launch(tmp_path):
    with two_hosts() as hosts:
        elastic = Elastic(tmp_path, hosts, "ddp_cpu", PET_NNODES="1:3")
        elastic.launch(0)
        wait_for(lambda: hosts[0].process.poll() is not None, "the end", tmp_path)
        assert hosts[0].process.returncode == 1
    said = (tmp_path / "host0.log").read_text()
    assert said.strip() == "mcir: batch_size: 4 cannot be shared equally by 3 processes; multiples of 6 can"
    assert not elastic.run_dir.exists()
