import math

import pytest
import torch

from mcir.objective.weight import TargetRatio, Weight


def test_the_share_settles_at_the_target_whatever_the_scales():
    """A contrast that is negative and 1000 times too small, beside a loss that is negative."""
    weight = Weight(TargetRatio(target_ratio=0.05))
    for step in range(400):
        noise = 1 + 0.1 * math.sin(step)
        weight.follow(torch.tensor(-30.0 * noise), weight.value * torch.tensor(-2e-2))
    assert float(weight.value * 2e-2 / 30) == pytest.approx(0.05, rel=0.02)


def test_it_moves_by_five_percent_a_step_at_most_and_never_by_what_is_no_number():
    weight = Weight(TargetRatio(target_ratio=0.05, initial=0.01))
    weight.follow(torch.tensor(1.0), torch.tensor(0.01) * 1e-9)
    assert float(weight.value) == pytest.approx(0.01 * 1.05)
    before = weight.value.clone(), weight.means.clone()
    for reconstruction, contrast in ((1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)):
        weight.follow(torch.tensor(reconstruction), torch.tensor(contrast))
    assert torch.equal(weight.value, before[0])
    assert torch.equal(weight.means, before[1])


def test_a_number_stays():
    weight = Weight(0.3)
    weight.follow(torch.tensor(1.0), torch.tensor(9.0))
    assert float(weight.value) == pytest.approx(0.3)
