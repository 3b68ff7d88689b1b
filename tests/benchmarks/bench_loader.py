"""One loader process of this code against one of an earlier revision, in turns: the photographs of the quick start
(38 of 256 x 256 pixels, WebP without loss), crop 192, made smaller by 4 with bicubic on the fly, batches of 16.

    python -m tests.benchmarks.bench_loader REVISION [--rounds 12]

All in processor time, which tells on a busy machine too: images/s are those of a loader process with a core to itself.
The main process copies what it made into batches.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BATCH, BATCHES = 16, 20
WAYS: dict[str, dict[str, Any]] = {
    "now, decoded each time (`keep_mib: 0`)": {"keep_mib": 0},
    "now, decoded once": {},
    "now, `degrade_on_device: true`": {"degrade_on_device": True},
}


def main() -> None:
    from tests.benchmarks.bench_before import worktree

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, worktree(arguments.revision, Path(folder) / "before") as before:
        processes = {arguments.revision: _start(before, {})}
        processes |= {name: _start(ROOT, settings) for name, settings in WAYS.items()}
        taken: dict[str, list[Sequence[float]]] = {name: [] for name in processes}
        for _ in range(arguments.rounds):
            for name, process in processes.items():
                taken[name].append(_batches(process))
        for process in processes.values():
            process.communicate()
    print("| one loader process | images/s | times as fast | µs an image | the main process's |")
    print("|---|--:|--:|--:|--:|")
    first = 0.0
    for name, times in taken.items():
        main_us, loader_us = (statistics.median(column) for column in zip(*times, strict=True))
        first = first or loader_us
        row = f"{1e6 / loader_us:.0f} | **{first / loader_us:.1f}** | {loader_us:.0f} | {main_us:.0f}"
        print(f"| {name} | {row} |")


def _start(root: Path, settings: dict[str, Any]) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", json.dumps(settings)]
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline() not in ("ready\n", ""):
        pass
    return process


def _batches(process: subprocess.Popen[str]) -> Sequence[float]:
    """Microseconds an image: of the main process, of the loader process."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("batches\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def _serve(settings: dict[str, Any]) -> None:
    """In the process of either checkout: BATCHES batches for each line."""
    import multiprocessing

    import torch

    from mcir.data.loader import Loader
    from mcir.data.stream import DataConfig

    torch.set_num_threads(1)
    source = {"format": "parquet", "path": "configs/quickstart/train"}
    train = [{"source": source, "degradation": {"name": "bicubic", "scale": 4}}]
    config = DataConfig.model_validate({"train": train, "crop_size": 192, "num_workers": 1} | settings)
    batches = iter(Loader(config, scale=4, batch_size=BATCH, seed=0))
    for _ in range(10):  # four epochs: kept images are
        next(batches)
    (worker,) = multiprocessing.active_children()

    def now() -> list[float]:
        threads = Path(f"/proc/{worker.pid}/task").iterdir()
        nanoseconds = [int((thread / "schedstat").read_text().split()[0]) for thread in threads]
        return [time.process_time(), sum(nanoseconds) / 1e9]

    print("ready", flush=True)
    for _ in sys.stdin:
        begun = now()
        for _ in range(BATCHES):
            next(batches)
        taken = [1e6 * (end - begin) / BATCHES / BATCH for begin, end in zip(begun, now(), strict=True)]
        print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(json.loads(sys.argv[2]))
    else:
        main()
