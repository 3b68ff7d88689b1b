"""Started by test_contrasts.py on every rank: trains each config through, goes on from the middle of that run, and
records after each step what all ranks must hold alike."""

import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState

from mcir.config import load
from mcir.objective.negatives import checksums
from mcir.objective.pcl import PCL, PCLConfig
from mcir.parallel.accelerator import strategy
from mcir.train.engine import Engine, build_engine


def trained(engine: Engine) -> list[dict]:
    """A record a step: checksums of the history and of all else that a contrast changes, and its numbers."""
    records, step = [], engine.step

    def noted(batches):
        parts = step(batches)
        followed = engine.state.followed()
        records.append(
            {
                "step": engine.state.step,
                "strategy": strategy(engine.accelerator),
                "negatives": engine.negatives.checksum().tolist(),
                "followed": dict(zip(followed, checksums(followed.values()).tolist(), strict=True)),
                "numbers": {name: value.item() for name, value in followed.items() if value.numel() == 1},
                "age": engine.negatives.age(engine.state.step),
            }
        )
        return parts

    engine.step = noted  # type: ignore[method-assign]
    assert engine.fit() == 0
    return records


def draw_otherwise(rank: int) -> None:
    """Another CPU may draw other initial weights from one seed."""
    build = PCLConfig.build

    def built(config: PCLConfig) -> PCL:
        pcl = build(config)
        pcl.embedding.head.bias.data += 1e-3 * rank
        return pcl

    PCLConfig.build = built  # type: ignore[method-assign]


def main(output: str, middle: str, *configs: str) -> None:
    records = {}
    draw_otherwise(PartialState(cpu=True).process_index)
    for config in configs:
        whole = build_engine(load([config]))
        records[whole.config.name] = trained(whole)
        AcceleratorState._reset_state()  # another run in this process; the process group stays
        name = f"resumed-{whole.config.name}"
        resumed = build_engine(load([config], [f"name={name}"]), resume=str(whole.run_dir / "checkpoints" / middle))
        records[name] = trained(resumed)
        AcceleratorState._reset_state()
    Path(output, f"rank{PartialState().process_index}.json").write_text(json.dumps(records))
    PartialState().destroy_process_group()


main(*sys.argv[1:])
