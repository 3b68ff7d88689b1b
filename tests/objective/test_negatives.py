import pytest
import torch
from accelerate import Accelerator
from torch import nn

from mcir import Negatives, Schedule
from mcir.errors import UserError


class Tied(nn.Module):
    """A frozen layer, two layers that share their weight, and running statistics."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.frozen = nn.Conv2d(5, 5, 1).requires_grad_(False)
        self.middle = nn.Conv2d(5, 5, 3, padding=1)
        self.again = nn.Conv2d(5, 5, 3, padding=1)
        self.again.weight = self.middle.weight
        self.last = nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, x):
        return self.last(self.again(self.middle(self.frozen(self.norm(self.first(x))))))


def trained(schedules, steps, init=None):
    """(negatives, target, the target's state after each step, the initial states of target and negatives)."""
    torch.manual_seed(0)
    accelerator, net = Accelerator(cpu=True), Tied()
    negatives = Negatives(net, schedules, init)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    model, optimizer = accelerator.prepare(net, optimizer)
    own = [{k: v.clone() for k, v in n.state_dict().items()} for n in negatives.nets]
    start = {k: v.clone() for k, v in net.state_dict().items()}
    negatives.sync(accelerator, model)
    history = []
    for step in range(1, steps + 1):
        degraded = torch.rand(2, 3, 6, 6)
        loss = (model(degraded) - degraded).abs().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        negatives.update(step)
        history.append({k: v.clone() for k, v in net.state_dict().items()})
    return negatives, net, history, start, own


def test_the_update_rule_for_parameters_and_copies_for_buffers():
    schedules = [Schedule(update_every=2, decay=0.25, start=0.1), Schedule(update_every=3, decay=0.5)]
    negatives, _, history, start, own = trained(schedules, 7, init=Tied)
    for schedule, net, mine in zip(schedules, negatives.nets, own, strict=True):
        due = [step for step in range(1, 8) if step % schedule.update_every == 0]
        for key, value in net.state_dict().items():
            if "running" in key or "num_batches" in key:
                assert torch.equal(value, history[due[-1] - 1][key])
                continue
            expected = schedule.start * mine[key] + (1 - schedule.start) * start[key]
            for step in due:
                expected = schedule.decay * expected + (1 - schedule.decay) * history[step - 1][key]
            assert torch.allclose(value, expected, atol=1e-6), key
        assert net.again.weight is net.middle.weight
        assert not net.training


def test_they_hold_no_gradients_and_give_none():
    negatives, net, *_ = trained([Schedule(), Schedule()], 1)
    degraded = torch.rand(1, 3, 4, 4, requires_grad=True)
    past = negatives(degraded)
    assert len(past) == 2
    assert not any(image.requires_grad for image in past)
    assert not any(p.requires_grad for p in negatives.parameters())
    assert not set(net.parameters()) & set(negatives.parameters())


def test_the_checksum_sees_one_bit():
    negatives, *_ = trained([Schedule()], 1)
    before = int(negatives.checksum())
    with torch.no_grad():
        weight = negatives.nets[0].first.weight
        weight.view(torch.int32).view(-1)[7] ^= 1
    assert int(negatives.checksum()) != before


def test_none_at_all():
    negatives, *_ = trained([], 2)
    assert negatives(torch.rand(1, 3, 4, 4)) == []


def test_mistakes():
    with pytest.raises(UserError, match="init"):
        Negatives(Tied(), [Schedule(start=0.1)])
    with pytest.raises(RuntimeError, match="sync"):
        Negatives(Tied(), [Schedule()])(torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match="less than 1"):
        Schedule(decay=1)
