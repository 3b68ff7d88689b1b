import pytest
import torch

from mcir.config import validate
from mcir.errors import UserError
from mcir.train.optim import OptimConfig
from tests.runs import tiny_config


def optim(schedule, lr=1.0, **values):
    return OptimConfig.model_validate({"optimizer": {"name": "adam", "lr": lr}, "schedule": schedule, **values})


def test_flat_then_cosine_is_torchs_sequence_of_both():
    """As Restormer's 92,000 flat and 208,000 falling steps, here 4 and 6."""
    config = optim({"name": "segments", "pieces": [
        {"until": 4, "schedule": {"name": "constant"}},
        {"until": 10, "schedule": {"name": "cosine", "min_lr": 0.1}},
    ]})  # fmt: skip
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    flat = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6, eta_min=0.1)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [flat, falling], milestones=[4])
    for step in range(1, 11):
        assert config.lr(step, 10) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9), step
        optimizer.step()
        scheduler.step()


def test_cosine_cycles_have_their_own_rates_and_floors():
    """Against torch's warm restarts, a cycle at a time."""
    cycles = [(10, 1.0, 0.1), (20, 0.5, 0.01), (30, 0.25, 0.0)]
    config = optim({"name": "segments", "pieces": [
        {"until": until, "lr": lr, "schedule": {"name": "cosine", "min_lr": floor}} for until, lr, floor in cycles
    ]})  # fmt: skip
    for until, lr, floor in cycles:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, eta_min=floor)
        for step in range(until - 9, until + 1):
            assert config.lr(step, 30) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9), step
            optimizer.step()
            scheduler.step()


def test_a_line_up_and_a_last_piece_to_the_end_of_the_run():
    config = optim({"name": "segments", "pieces": [
        {"until": 4, "schedule": {"name": "linear", "start_lr": 0.0}},
        {"schedule": {"name": "cosine", "warmup_steps": 2}},
    ]})  # fmt: skip
    assert [config.lr(step, 12) for step in (1, 2, 3, 4)] == [0, 0.25, 0.5, 0.75]
    assert config.lr(5, 12) == 0.5  # the first of two steps of its own warm-up
    assert config.lr(9, 12) == pytest.approx(0.5)  # halfway through 8 steps
    assert [config.lr(step, 12) for step in (9, 3, 9)] == [config.lr(9, 12), 0.5, config.lr(9, 12)]


def test_a_schedule_that_moves_once_an_epoch():
    """CosineAnnealingLR stepped an epoch of 3 steps, behind a warm-up of two epochs."""
    config = optim({"name": "cosine", "warmup_steps": 6}, lr_every=3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for epoch in range(4):
        rate = optimizer.param_groups[0]["lr"] * min(1, (epoch + 1) / 2)
        for step in range(3 * epoch + 1, 3 * epoch + 4):
            assert config.lr(step, 12) == pytest.approx(rate, abs=1e-9), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (
            [{"until": 6, "schedule": {"name": "constant"}}, {"until": 6, "schedule": {"name": "constant"}}],
            r"pieces\.1 does not end after",
        ),
        (
            [{"schedule": {"name": "constant"}}, {"until": 6, "schedule": {"name": "constant"}}],
            r"pieces\.1 does not end after",
        ),
        ([{"until": 5, "schedule": {"name": "constant"}}], "the last ends at step 5, the run at 6"),
        ([{"schedule": {"name": "cosin"}}], r"pieces\.0\.schedule\.name: cosin is none of .*do you mean cosine"),
        ([{"schedule": {"name": "cosine", "floor": 0}}], r"pieces\.0\.schedule\.floor: no such field"),
    ],
)
def test_pieces_that_do_not_follow_each_other(tmp_path, pieces, message):
    values = tiny_config(tmp_path)
    values["optim"]["schedule"] = {"name": "segments", "pieces": pieces}
    with pytest.raises(UserError, match=message):
        validate(values, "tiny")
