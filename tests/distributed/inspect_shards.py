"""Started by test_strategies.py on every rank: trains a few steps and records what can only be seen inside the
processes."""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from mcir.config import load
from mcir.data.loader import Batch
from mcir.parallel.accelerator import strategy
from mcir.parallel.shards import full_params, local_masters
from mcir.train.engine import build_engine


def main(config: str, output: str) -> None:
    engine = build_engine(load([config]))
    accelerator = engine.accelerator
    net = accelerator.unwrap_model(engine.model)
    masters = local_masters(accelerator, engine.model, engine.optimizer)
    batches, checksums, skipped = iter(engine.loader), [], []
    for step in range(1, 7):
        batch = next(batches)
        if step == 3 and accelerator.process_index == 1:  # a bad batch on one rank only
            batch = Batch(batch.degraded, batch.clean * float("nan"), batch.key)
        skipped.append(float(engine.step([batch])["skipped"]))
        checksums.append(accelerator.gather(engine.negatives.checksum().sum().reshape(1)).tolist())
    weights = dict(full_params(accelerator, engine.model))
    record = {
        "strategy": strategy(accelerator),
        "rank": accelerator.process_index,
        "local": sum(master.numel() for master in masters),
        "uneven": [list(p.to_local().shape) for p in net.parameters() if isinstance(p, DTensor)][:1],
        "global": sum(w.numel() for w in weights.values()),
        "partitioned": sum(getattr(p, "ds_tensor", p).numel() for p in net.parameters()),
        "checksums": checksums,
        "skipped": skipped,
        "finite": all(bool(w.isfinite().all()) for w in weights.values()),
        "negative_dtypes": sorted({str(p.dtype) for p in engine.negatives.parameters()}),
        "negative_gradients": any(p.requires_grad for p in engine.negatives.parameters()),
        "weights": float(torch.stack([w.double().sum() for w in weights.values()]).sum()),
    }
    Path(output, f"rank{accelerator.process_index}.json").write_text(json.dumps(record))
    accelerator.end_training()


main(*sys.argv[1:])
