"""What a save costs training: how long it stands still, against writing in the loop (waiting for the checkpoint before
the next step), in turns in one run.

    python -m tests.benchmarks.bench_saving

A NAFNet of 68 M parameters with one negative and an EMA, at a small crop; the checkpoint is hashed, flushed to the
disk and read again."""

import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from mcir.config import validate
from mcir.train.engine import build_engine
from tests.runs import tiny_config

ROUNDS = 3


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        values = tiny_config(Path(folder), arch={"name": "nafnet", "width": 64}, batch_size=1)
        values["checkpoint"] = {"keep_last": 1}
        values["data"]["train"][0]["degradation"] = {"name": "gaussian_blur"}
        values["objective"]["contrast"]["negatives"] = [{"update_every": 10**9}]
        engine = build_engine(validate(values, "benchmark"))
        state, checkpointer, batches = engine.state, engine.checkpointer, iter(engine.loader)
        seconds: dict[str, list[float]] = defaultdict(list)

        def step(name: str) -> None:
            begin = time.perf_counter()
            engine.step([next(batches)])
            seconds[name].append(time.perf_counter() - begin)

        def save(name: str, join: bool) -> Path:
            begin = time.perf_counter()
            path = state.save(checkpointer)
            if join:
                checkpointer.join()
            seconds[name].append(time.perf_counter() - begin)
            return path

        step("first")
        for _ in range(ROUNDS):
            step("step")
            save("in the loop", join=True)
            step("step")
            path = save("stall", join=False)
            while "save_s" not in checkpointer.times:
                step("step beside")
            seconds["beside"].append(checkpointer.times["save_s"])
            checkpointer.join()
        num_bytes = sum(file.stat().st_size for file in path.iterdir())
    took = {name: statistics.median(times) for name, times in seconds.items()}
    print("| a save | s | / in the loop |\n|---|--:|--:|")
    named = {
        "in the loop": "in the loop: training waits",
        "stall": "training stands still",
        "beside": "written beside it",
    }
    for name, shown in named.items():
        print(f"| {shown} | {took[name]:.2f} | {took[name] / took['in the loop']:.2f} |")
    num = sum(p.numel() for p in engine.model.parameters())
    print(
        f"\n{num:,} parameters, {num_bytes / 2**20:.0f} MiB, as much memory until it is written; median of {ROUNDS}. A "
        f"step takes {took['step']:.2f} s alone and {took['step beside']:.2f} s beside the writing."
    )


if __name__ == "__main__":
    main()
