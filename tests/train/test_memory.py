"""`accumulate: auto`. The plan itself is compared with real processes in tests/distributed/test_memory.py."""

import pytest
import torch
from accelerate import Accelerator

from mcir.config import load, validate
from mcir.errors import UserError
from mcir.train.engine import build_engine
from mcir.train.memory import USABLE, micro_batches, plan
from tests.runs import tiny_config


def test_the_largest_micro_batch_that_fits(tmp_path):
    values, accelerator = tiny_config(tmp_path, batch_size=12), Accelerator(cpu=True)
    config = validate(values | {"accumulate": "auto"}, "auto")
    for accumulate, next_one in ((1, 2), (2, 3), (3, 4), (4, 6), (6, 12)):
        needed = sum(plan(validate(values | {"accumulate": accumulate}, "n"), "single", 1).values())
        assert micro_batches(config, accelerator, int(1.02 * needed / USABLE)) == accumulate
        assert micro_batches(config, accelerator, int(0.98 * needed / USABLE)) == next_one
    needed = sum(plan(validate(values | {"accumulate": 12}, "n"), "single", 1).values())
    with pytest.raises(UserError, match=r"one sample and the weights need .* GiB under single"):
        micro_batches(config, accelerator, int(0.98 * needed / USABLE))


def test_a_number_is_taken_as_it_is(tmp_path):
    config = validate(tiny_config(tmp_path, accumulate=2), "two")
    assert micro_batches(config, Accelerator(cpu=True), 1) == 2


@pytest.mark.usefixtures("deterministic")
def test_the_run_and_its_checkpoint_hold_the_number(tmp_path):
    engines = []
    for accumulate in ("auto", 1):
        values = tiny_config(tmp_path, name=f"run-{accumulate}", steps=1, accumulate=accumulate)
        engine = build_engine(validate(values, "test"))
        engine.fit()
        assert load([engine.run_dir / "config.yaml"]).accumulate == 1
        assert load([engine.run_dir / "checkpoints" / "step-00000001" / "config.yaml"]).accumulate == 1
        engines.append(engine)
    first, second = (list(engine.model.parameters()) for engine in engines)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_neither_a_number_nor_auto_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="accumulate"):
        validate(tiny_config(tmp_path, accumulate="many"), "test")
