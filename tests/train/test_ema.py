import pytest
import torch
from accelerate import Accelerator

from mcir.train.ema import EMA


def averaged(targets, **options):
    """The average of a single weight that is 1 at first and then takes on `targets`."""
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(net.weight)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ema = EMA(accelerator, net, optimizer, **options)
    for step, value in enumerate(targets, 1):
        torch.nn.init.constant_(net.weight, value)
        ema.update(step)
    return ema, float({name: tensor.clone() for name, tensor in ema.full()}["weight"])


def test_without_warmup_n_steps_leave_decay_to_the_n_of_the_beginning():
    _, value = averaged([0.0] * 100, decay=0.99, warmup=False)
    assert value == pytest.approx(0.99**100, rel=1e-4)


def test_with_warmup_the_beginning_is_gone_after_twenty_steps():
    """prod (1 + i) / (10 + i) = 10! (n + 1)! / (n + 10)!"""
    _, value = averaged([0.0] * 5, decay=0.999)
    assert value == pytest.approx(3628800 * 720 / 1307674368000, rel=1e-4)  # 10! 6! / 15!
    _, value = averaged([0.0] * 20, decay=0.999)
    assert 0 < value < 1e-6


def test_the_warmup_ends_at_the_decay():
    """0.9 is reached by (1 + n) / (10 + n) at n = 80; from there on it is the plain average, to the bit."""
    ema, _ = averaged([], decay=0.9)
    assert [ema.decay_at(step) for step in (1, 79, 80, 81, 10**6)] == [2 / 11, 80 / 89, 0.9, 0.9, 0.9]


def test_a_young_average_says_so():
    ema, _ = averaged([], decay=0.999)
    assert "it spans about 112 steps so far, of 1000" in str(ema.youth(1000))
    assert ema.youth(5000) is None
    plain, _ = averaged([], decay=0.999, warmup=False)
    assert "2500 steps old, 2.5 lifetimes of ema_decay 0.999: 8.2% of it are the initial weights" in str(
        plain.youth(2500)
    )
