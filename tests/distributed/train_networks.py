"""Started by test_networks.py on every rank: trains one network after the other, and continues each from its
checkpoint."""

import json
import sys
from pathlib import Path

import torch

from mcir.config import load
from mcir.parallel.accelerator import strategy
from mcir.parallel.shards import full_params
from mcir.train.engine import build_engine
from mcir.train.memory import micro_batches
from mcir.weights.trained import open_trained


def main(output: str, *configs: str) -> None:
    for path in configs:
        config = load([path])
        engine = build_engine(config)
        accelerator = engine.accelerator
        before = {name: tensor.clone() for name, tensor in full_params(accelerator, engine.model)}
        batches = iter(engine.loader)
        parts = [{k: float(v) for k, v in engine.step([next(batches)]).items()} for _ in range(config.steps)]
        checkpoint = engine.state.save(engine.checkpointer)
        engine.checkpointer.join()
        after = {name: tensor.clone() for name, tensor in full_params(accelerator, engine.model)}
        resumed = build_engine(config, resume=str(checkpoint))
        again = dict(full_params(accelerator, resumed.model))
        scarce = 2**20 * (8 + 40 * accelerator.process_index)  # the second process has more memory
        large = config.model_copy(update={"batch_size": 64, "accumulate": "auto"})
        (exported,) = open_trained([str(checkpoint)], "target")
        record = {
            "strategy": strategy(accelerator),
            "parts": parts,
            "still": [k for k, v in exported.net.named_parameters() if v.requires_grad and before[k].equal(after[k])],
            "checksums": accelerator.gather(engine.negatives.checksum().sum().reshape(1)).tolist(),
            "accumulate": micro_batches(large, accelerator, scarce) if config.arch.name == "edsr" else None,
            "resumed": all(torch.equal(after[name], again[name]) for name in after),
            "exported": all(torch.equal(v, after[name].cpu()) for name, v in exported.net.state_dict().items()),
            "layouts": sorted({str(p.is_contiguous()) for p in engine.negatives.nets.parameters() if p.dim() == 4}),
        }
        Path(output, f"{config.name}-{accelerator.process_index}.json").write_text(json.dumps(record))
        accelerator.wait_for_everyone()
    accelerator.end_training()


main(*sys.argv[1:])
