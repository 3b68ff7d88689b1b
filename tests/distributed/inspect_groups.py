"""Started by test_groups.py on every rank, each of which draws weights of its own: what the groups that exist wait for,
and the weights before and after training."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed import distributed_c10d

from mcir.config import load
from mcir.parallel.shards import full_params
from mcir.train.engine import build_engine


def main(config: str, output: str) -> None:
    draw = nn.Conv2d.reset_parameters

    def drawn_otherwise(layer: nn.Conv2d) -> None:
        draw(layer)
        if torch.distributed.is_initialized():
            with torch.no_grad():
                layer.weight += 1e-3 * torch.distributed.get_rank()

    nn.Conv2d.reset_parameters = drawn_otherwise
    engine = build_engine(load([config]))
    accelerator, batches, sums = engine.accelerator, iter(engine.loader), []
    for _ in range(3):
        sums.append(sum(weights.double().sum().item() for _, weights in full_params(accelerator, engine.model)))
        engine.step([next(batches)])
    backends = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
    record = {"sums": sums, "timeouts_s": [backend.options._timeout.total_seconds() for backend in backends]}
    Path(output, f"rank{accelerator.process_index}.json").write_text(json.dumps(record))
    accelerator.end_training()


main(*sys.argv[1:])
