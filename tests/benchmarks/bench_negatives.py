"""What an update of the negatives costs: time against a training step of the same run, and bytes moved, as networks
grow.

    accelerate launch --config_file launch/accelerate/fsdp2_cpu.yaml tests/benchmarks/bench_negatives.py

prints one line a network size: the update (two negatives due at once: one gather serves both) in shares of a training
step, alone and at `update_every: 100`. Bytes are what one process receives to make the target whole. The other way that
was tried, copying in the next forward, where each module is whole anyway, is timed beside it (ddp, fsdp2)."""

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mcir.config import validate
from mcir.parallel.accelerator import strategy
from mcir.parallel.shards import full_params, unwrapped
from mcir.train.engine import Engine, build_engine
from tests.runs import tiny_config


def seconds(work, times: int) -> float:
    """Median duration."""
    durations = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        durations.append(time.perf_counter() - begin)
    return statistics.median(durations)


@contextmanager
def copying_in_the_forward(engine: Engine) -> Iterator[None]:
    """Has each module of the target, whole while it computes, copied into the negatives."""

    def copy(module: nn.Module, _: Any, name: str) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            for negative in engine.negatives.nets:
                negative.get_parameter(f"{name}.{key}").detach().lerp_(parameter.detach(), 0.9)

    modules = unwrapped(engine.accelerator, engine.model).named_modules()
    owners = [(name, module) for name, module in modules if [*module.parameters(recurse=False)]]
    handles = [module.register_forward_pre_hook(partial(copy, name=name)) for name, module in owners]
    yield
    for handle in handles:
        handle.remove()


def line(where: str, result: dict[str, float]) -> str:
    share = result["update_ms"] / result["step_ms"]
    return (
        f"{where}: {result['parameters']:>9,} parameters, step {result['step_ms']:7.1f} ms, update "
        f"{result['update_ms']:6.1f} ms = {share:6.1%} of a step, {share / 100:.3%} at every 100, "
        f"{result['received_mib']:6.1f} MiB received; in the forward {result['in_forward_ms']:6.1f} ms"
    )


def main() -> None:
    for num_features in (16, 64, 128):
        folder = Path(tempfile.mkdtemp())
        arch = {"name": "edsr", "scale": 2, "num_features": num_features, "num_blocks": 16}
        values = tiny_config(folder, arch=arch, ema_decay=None)
        values["objective"]["contrast"]["negatives"] = [{"update_every": 10**9}, {"update_every": 10**9}]
        engine = build_engine(validate(values, "benchmark"))
        batches = iter(engine.loader)
        engine.step([next(batches)])
        step = seconds(lambda: engine.step([next(batches)]), 5)  # noqa: B023
        update = seconds(lambda: engine.negatives.update(10**9), 5)  # noqa: B023
        accelerator, name = engine.accelerator, strategy(engine.accelerator)
        in_forward = math.nan
        if name in ("single", "ddp", "fsdp2"):
            pairs = []
            for _ in range(5):
                alone = seconds(lambda: engine.step([next(batches)]), 1)  # noqa: B023
                with copying_in_the_forward(engine):
                    pairs.append(seconds(lambda: engine.step([next(batches)]), 1) - alone)  # noqa: B023
            in_forward = statistics.median(pairs)
        whole = sum(t.nbytes for _, t in full_params(accelerator, engine.model))
        # DDP holds all; an all-gather brings the others' shards; ZeRO-2 makes a tensor whole by an all-reduce
        share = {"single": 0.0, "ddp": 0.0, "zero2": 2.0}.get(name, 1.0)
        received = share * whole * (accelerator.num_processes - 1) / accelerator.num_processes
        if accelerator.is_main_process:
            result = {"parameters": whole // 4, "step_ms": 1e3 * step, "update_ms": 1e3 * update}
            result["in_forward_ms"] = 1e3 * in_forward
            result["received_mib"] = received / 2**20
            print(json.dumps(result) if "--json" in sys.argv else line(f"{name} x {accelerator.num_processes}", result))
    accelerator.end_training()


main()
