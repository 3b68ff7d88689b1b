"""A step of this code against one of an earlier revision, each in a process of its own, in turns: EDSR-light x4, batch
2, crop 192, SPN with 4 negatives, on one thread.

    python -m tests.benchmarks.bench_before REVISION [--rounds 10]

Processor time is what a busy machine changes least."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    from tests.distributed.launch import write_config
    from tests.runs import tiny_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, worktree(arguments.revision, Path(folder) / "before") as before:
        values = tiny_config(Path(folder), arch={"name": "edsr", "scale": 4}, steps=1000)
        spn = {"weight": 1e-3, "features": {"weights": "random"}, "negatives": [{"update_every": 100}] * 4}
        values["objective"] = {"spn": spn}  # as both write it
        values["data"]["train"][0]["degradation"]["scale"] = 4
        config = write_config(Path(folder) / "config.yaml", values)
        both = [_start(root, config) for root in (before, ROOT)]
        taken: list[list[tuple[float, float]]] = [[], []]
        for i in range(arguments.rounds + 1):
            for process, times in zip(both, taken, strict=True):
                took = _step(process)
                times += [took] if i else []  # the first warms up
        for process in both:
            process.communicate()
    wall, processor = ([statistics.median(t[kind] for t in times) for times in taken] for kind in (0, 1))
    print("| a step | ms | ratio | processor ms | ratio |\n|---|--:|--:|--:|--:|")
    print(f"| {arguments.revision} | {wall[0]:.0f} | 1.00 | {processor[0]:.0f} | 1.000 |")
    print(f"| now | {wall[1]:.0f} | {wall[1] / wall[0]:.2f} | {processor[1]:.0f} | {processor[1] / processor[0]:.3f} |")


@contextmanager
def worktree(revision: str, folder: Path) -> Iterator[Path]:
    subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", folder, revision], check=True)
    yield folder
    subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder], check=True)


def _start(root: Path, config: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(config), root.name]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while process.stdout.readline() not in ("ready\n", ""):
        pass
    return process


def _step(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Wall and processor milliseconds."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    wall, processor = json.loads(process.stdout.readline())
    return wall, processor


def _serve(config: str, name: str) -> None:
    """In the process of either checkout: a step for each line."""
    import torch

    from mcir.config import load
    from mcir.data.loader import Batch

    try:
        from mcir.train.engine import build_engine
    except ImportError:
        from mcir.engine import build_engine  # type: ignore[import-not-found, no-redef]

    engine = build_engine(load([config], [f"name={name}"]))
    batch = Batch(torch.rand(2, 3, 48, 48), torch.rand(2, 3, 192, 192), ["a", "b"])
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter(), time.process_time()
        engine.step([batch])
        taken = [
            1e3 * (end - begin) for begin, end in zip(begun, (time.perf_counter(), time.process_time()), strict=True)
        ]
        print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(*sys.argv[2:])
    else:
        main()
