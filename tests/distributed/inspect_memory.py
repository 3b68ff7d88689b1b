"""Started by test_memory.py on every rank: what the process really holds of a large network, part by part."""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from mcir.config import load
from mcir.parallel.accelerator import strategy
from mcir.parallel.shards import is_zero, local_masters
from mcir.train.engine import build_engine


def num_bytes(tensors) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in local}.values())


def resident(field: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the most since the last `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def main(config: str, output: str) -> None:
    engine = build_engine(load([config]))
    accelerator = engine.accelerator
    inner = engine.optimizer.optimizer.optimizer if is_zero(accelerator) else engine.optimizer.optimizer
    gradients: list[int] = [0]

    def note_gradients(optimizer, *_):
        held = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients[0] = max(gradients[0], num_bytes(held))

    inner.register_step_pre_hook(note_gradients)
    batches = iter(engine.loader)
    for _ in range(2):
        engine.step([next(batches)])
    net = accelerator.unwrap_model(engine.model)
    weights = [getattr(p, "ds_tensor", p.data) for p in net.parameters()] + list(net.buffers())
    masters = local_masters(accelerator, engine.model, engine.optimizer) if is_zero(accelerator) else []
    states = [v for state in inner.state.values() for v in state.values() if torch.is_tensor(v) and v.numel() > 1]

    engine.negatives.update(2)  # what the first one leaves allocated is not its peak
    before = reset_peak()
    engine.negatives.update(2)
    peak = resident("VmHWM") - before
    record = {
        "strategy": strategy(accelerator),
        "target": num_bytes([*weights, *masters]),
        "gradients": gradients[0],
        "optimizer": num_bytes(states),
        "evaluation EMA": num_bytes(engine.ema.shards),
        "negatives": num_bytes([*engine.negatives.nets.parameters(), *engine.negatives.nets.buffers()]),
        "validation and export copy": num_bytes(
            [*engine.validation.replica.parameters(), *engine.validation.replica.buffers()]
        ),
        "features": num_bytes(engine.objective.parameters()),
        "peak of an update": peak,
    }
    Path(output, f"rank{accelerator.process_index}.json").write_text(json.dumps(record))
    accelerator.end_training()


main(*sys.argv[1:])
