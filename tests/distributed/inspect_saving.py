"""Started by test_saving.py on every rank: saves while one rank's thread is held up, on a disk that has room for each
rank's share alone, while rank 0 copies for longer than a collective may take, and where one rank's thread fails."""

import json
import resource
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from mcir.config import load
from mcir.errors import UserError
from mcir.parallel.shards import full_params
from mcir.train.checkpoint import Checkpointer, damage, to_cpu
from mcir.train.engine import build_engine


def main(config: str, output: str, small_disk: str) -> None:
    engine = build_engine(load([config]))
    accelerator, checkpointer, batches = engine.accelerator, engine.checkpointer, iter(engine.loader)
    rank, record = accelerator.process_index, {}

    for _ in range(2):
        engine.step([next(batches)])
    expected = {name: to_cpu(t) for name, t in full_params(accelerator, engine.model)}
    go_on = threading.Event()
    if rank == 1:
        checkpointer._thread.submit(go_on.wait)
    path = engine.state.save(checkpointer)
    for _ in range(2):
        engine.step([next(batches)])
    now = {name: to_cpu(t) for name, t in full_params(accelerator, engine.model)}
    record["there before all have written"] = path.exists()
    accelerator.wait_for_everyone()
    go_on.set()
    checkpointer.join()
    saved = load_file(path / "model.safetensors")
    record |= {"damage": damage(path), "step": json.loads((path / "state.json").read_text())["step"]}
    record["as it was"] = saved.keys() == expected.keys() and all(torch.equal(saved[k], expected[k]) for k in saved)
    record["as it is now"] = all(torch.equal(saved[k], now[k]) for k in saved)

    if small_disk:
        other = Checkpointer(accelerator, Path(small_disk))
        try:
            other.save(1, {f"{rank}.safetensors": {"w": torch.zeros(150 * 2**10)}}, dict, {})
        except UserError as error:
            record["too small"] = str(error)

    slow = Checkpointer(accelerator, Path(output, "slow"), timeout_s=4, copy=lambda path: time.sleep(6))
    slow.save(1, {f"{rank}.safetensors": {"w": torch.zeros(3)}}, lambda: {"state.json": "{}"}, {})
    slow.join()

    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    try:
        engine.fit()
    except UserError as error:
        record |= {"failed at": engine.state.step, "error": str(error)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    Path(output, f"rank{rank}.json").write_text(json.dumps(record))
    accelerator.end_training()


main(*sys.argv[1:])
