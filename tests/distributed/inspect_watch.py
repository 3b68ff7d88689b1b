"""Started by test_watch.py on every rank: runs that leave their sane band, by what one rank alone sees."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState

from mcir.config import load
from mcir.data.loader import Batch
from mcir.errors import UserError
from mcir.parallel.shards import full_params
from mcir.train.engine import Engine, build_engine


def end_of(engine: Engine, change: Callable[[int, Batch], Batch] = lambda step, batch: batch) -> dict:
    """What the run ended with; `change` is made to what this rank trains on."""
    step = engine.step
    engine.step = lambda batches: step([change(engine.state.step + 1, batch) for batch in batches])  # type: ignore
    try:
        said = f"exit code {engine.fit()}"
    except UserError as error:
        said = str(error)
    weights = {name: tensor.double().sum().item() for name, tensor in full_params(engine.accelerator, engine.model)}
    state = {name: tensor.tolist() for name, tensor in engine.state.followed().items()}
    AcceleratorState._reset_state()  # another run in this process; the process group stays
    return {"said": said, "step": engine.state.step, "weights": weights, "state": state}


def main(output: str, contrastive: str, plain: str) -> None:
    rank = PartialState(cpu=True).process_index
    records = {}

    records["good"] = end_of(build_engine(load([contrastive], ["steps=6"])))
    weight = "objective.contrast.weight=1e4"
    bad = build_engine(load([contrastive], [weight]), resume="auto")
    records["runaway"] = end_of(bad)
    again = build_engine(load([contrastive], ["steps=6"]), resume=str(bad.run_dir / "checkpoints" / "step-00000006"))
    records["again"] = end_of(again)

    def on_rank_1(step: int, batch: Batch) -> Batch:
        if step == 130:
            with torch.no_grad():  # the average alone is ruined, and validated
                for shard in engine.ema.shards if engine.ema else ():
                    shard.fill_(1)
        far = rank == 1 and (step == 113 or step > 130)
        return replace(batch, clean=batch.clean + 10) if far else batch

    engine = build_engine(load([plain]))
    records["one rank"] = end_of(engine, on_rank_1)
    Path(output, f"rank{rank}.json").write_text(json.dumps(records))
    PartialState().destroy_process_group()


main(*sys.argv[1:])
