import torch
from accelerate import Accelerator

from mcir.parallel.scaling import LossScale


def test_it_moves_as_torchs_gradient_scaler_does():
    """Against torch.amp.GradScaler over 4100 steps, three of which overflow."""
    reference = torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scale = LossScale(Accelerator(cpu=True), optimizer)
    for step in range(4100):
        skipped = float(step in (7, 2100, 2101))
        weight.grad = torch.full((3,), float("inf") if skipped else 1.0)
        reference.scale(torch.ones(()))
        reference.step(optimizer)
        reference.update()
        scale.update(torch.tensor(skipped))
        assert scale.state()[0] == reference.get_scale(), step


def test_scaling_and_unscaling_round_nothing():
    scale = LossScale(Accelerator(cpu=True), torch.optim.SGD([torch.ones(1)], lr=0.1))
    values = torch.randn(1000)
    scaled = scale(values)
    assert not torch.equal(values, scaled)
    scale.unscale([scaled])
    assert torch.equal(values, scaled)
