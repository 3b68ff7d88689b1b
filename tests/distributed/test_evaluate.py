"""Two processes measure what one measures, however few images there are, and one waits for the other without end."""

import json

import pytest

from mcir.archs import build
from mcir.weights.files import save_weights
from tests.distributed.launch import run
from tests.runs import write_dataset

ARCH = {"name": "edsr", "scale": 2, "num_features": 4, "num_blocks": 1}
SLOW = """
import sys, time
from mcir.evaluation.config import ValidationSet
from mcir.evaluation.evaluate import evaluate
from mcir.parallel.accelerator import build_accelerator

accelerator = build_accelerator(batch_size=2, timeout_s=3)

def restore(degraded):
    time.sleep(8 if accelerator.is_main_process else 0)
    return degraded.repeat_interleave(2, 2).repeat_interleave(2, 3)

data = ValidationSet(source={"format": "parquet", "path": sys.argv[1]}, protocol="sr")
scores, _ = evaluate(restore, data, 2, accelerator)
accelerator.wait_for_everyone()
print(f"both have {len(scores.keys)}\\n", end="", flush=True)  # in one write
accelerator.end_training()
"""


def test_two_processes_give_what_one_gives(tmp_path):
    """Three images for two processes, and one."""
    sets = [str(write_dataset(tmp_path / name, num, num_shards=1)) for name, num in (("three", 3), ("one", 1))]
    weights = []
    for name in "ab":
        save_weights(tmp_path / f"{name}.safetensors", build(ARCH).state_dict(), {"arch": json.dumps(ARCH)})
        weights.append(str(tmp_path / f"{name}.safetensors"))

    def arguments(output):
        files = ["--json", str(output / "r.json"), "--save-images", str(output / "images")]
        return ["evaluate", "--weights", *weights, "--data", *sets, *files, "--divergence", str(output / "maps")]

    process = run("single", *arguments(tmp_path / "alone"))
    assert process.returncode == 0, process.stdout
    process = run("ddp_cpu", *arguments(tmp_path / "shared"), timeout=300)
    assert process.returncode == 0, process.stdout
    assert process.stdout.count("PSNR, dB") == 2  # two tables once, not once a process
    alone, shared = (json.loads((tmp_path / name / "r.json").read_text()) for name in ("alone", "shared"))
    assert (alone.pop("num_processes"), shared.pop("num_processes")) == (1, 2)
    assert alone == shared
    assert [len(shared["results"][name]["a"]["images"]) for name in ("three", "one")] == [3, 1]
    pictures = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.png")}
        for name in ("alone", "shared")
    ]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == 3 * 4 + 2


@pytest.mark.slow
def test_a_rank_waits_longer_than_a_collective_may_take(tmp_path):
    data = write_dataset(tmp_path / "data", num_rows=2, num_shards=1, scale=2)
    (tmp_path / "slow.py").write_text(SLOW)
    process = run("ddp_cpu", str(data), script=str(tmp_path / "slow.py"), timeout=300)
    assert process.returncode == 0, process.stdout
    assert process.stdout.count("both have 2") == 2
