"""Ranks in step: collections at given steps alone, the slowest rank by name."""

import gc
import time

import torch
from accelerate import Accelerator

from mcir.train.steady import COLLECT_EVERY, Pace, SteadyCollector
from mcir.train.tracking import Meter


def test_garbage_is_collected_at_given_steps_alone():
    before = gc.get_stats()
    with SteadyCollector() as collector:
        assert not gc.isenabled()
        started = [generation["collections"] for generation in gc.get_stats()]
        kept = [[] for _ in range(5000)]  # more than the threshold of an automatic collection
        collector.collect(COLLECT_EVERY - 1)
        assert [generation["collections"] for generation in gc.get_stats()] == started
        collector.collect(COLLECT_EVERY)
        assert gc.get_stats()[1]["collections"] == started[1] + 1
    assert gc.isenabled()
    assert len(kept) == 5000
    assert before[2]["collections"] < gc.get_stats()[2]["collections"]


class _TwoRanks:
    """What `Accelerator.gather` gives where another rank took `other` seconds."""

    device = torch.device("cpu")

    def __init__(self, other: float) -> None:
        self.other = other

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        return torch.cat([own, own.new_tensor([self.other])])


def test_the_slowest_rank_is_named():
    pace = Pace(torch.device("cpu"))
    with pace:
        time.sleep(0.01)
    uneven, slowest = pace.read(_TwoRanks(10.0), waited=0.1)
    assert slowest == 1
    assert 10.0 / 0.2 < uneven < 10.0 / 0.11
    assert pace.read(_TwoRanks(0.5), waited=1.0) == (2.0, 0)  # of this reading alone


def test_what_is_no_training_is_counted_by_itself():
    meter = Meter()
    for _ in range(2):
        meter.add({"total": torch.tensor(3.0)}, 4, 0.0)
    with meter.pause():
        time.sleep(0.2)
    meter.add({"total": torch.tensor(0.0)}, 4, 0.0)
    losses, speed = meter.read(Accelerator(cpu=True))
    assert losses["total"] == 2.0  # the steps before the pause count
    assert 0.5 < speed["maintenance"] < 1
    assert speed["images_per_s"] > 12 / 0.2
