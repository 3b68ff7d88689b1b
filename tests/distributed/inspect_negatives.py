"""Started by test_strategies.py on every rank: tied, frozen and uneven parameters, ranks with other statistics."""

import json
import sys
import time
from pathlib import Path

import torch

from mcir.objective.negatives import Negatives, Schedule
from mcir.parallel.accelerator import build_accelerator
from mcir.parallel.shards import full_params, is_zero
from tests.objective.test_negatives import Tied


def main(output: str) -> None:
    accelerator = build_accelerator(batch_size=4, blocks=("BatchNorm2d",))
    torch.manual_seed(0)
    net = Tied()
    torch.manual_seed(accelerator.process_index)  # each rank draws another initialisation: rank 0's counts
    negatives = Negatives(net, [Schedule(update_every=2, decay=0.25, start=0.1), Schedule(update_every=3)], init=Tied)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(net, optimizer)
    negatives.sync(accelerator, model)
    expected = [{k: v.clone() for k, v in n.state_dict().items()} for n in negatives.nets]
    for step in range(1, 7):
        degraded = torch.rand(2, 3, 6, 6) + accelerator.process_index  # other data, so other running statistics
        with accelerator.accumulate(model):
            loss = (model(degraded) - degraded).abs().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        negatives.update(step)
        target = {k: v.clone() for k, v in full_params(accelerator, model)}
        for state, schedule in zip(expected, negatives.schedules, strict=True):
            if step % schedule.update_every == 0:
                for key, value in target.items():
                    if "running" in key or "tracked" in key:
                        state[key] = value
                    else:
                        state[key] = schedule.decay * state[key] + (1 - schedule.decay) * value
                state["again.weight"] = state["middle.weight"]
    errors = [
        float((value - state[key]).abs().max())
        for state, negative in zip(expected, negatives.nets, strict=True)
        for key, value in negative.state_dict().items()
    ]
    statistics = torch.cat([n.norm.running_mean for n in negatives.nets])
    record = {
        "error": max(errors),
        "keys": sorted(target),
        "checksums": accelerator.gather(negatives.checksum().sum().reshape(1)).tolist(),
        "statistics": accelerator.gather(statistics[None]).tolist(),
        "own_statistics_differ": accelerator.gather(accelerator.unwrap_model(model).norm.running_mean[None]).tolist(),
        "frozen": torch.equal(negatives.nets[1].frozen.weight, target["frozen.weight"].float()) or is_zero(accelerator),
    }
    Path(output, f"rank{accelerator.process_index}.json").write_text(json.dumps(record))
    accelerator.end_training()
    time.sleep(1)  # gloo's threads may hold the last tensors for a moment, and abort an interpreter that ends meanwhile


main(*sys.argv[1:])
