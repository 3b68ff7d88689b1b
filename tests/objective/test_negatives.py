import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from mcir import SPN, Negatives, Schedule
from mcir.errors import UserError
from mcir.objective.negatives import deal
from mcir.parallel.shards import full_params


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
    before = int(negatives.checksum().sum())
    with torch.no_grad():
        weight = negatives.nets[0].first.weight
        weight.view(torch.int32).view(-1)[7] ^= 1
    assert int(negatives.checksum().sum()) != before


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


def test_a_deal_is_even_over_the_batch_and_over_ranks():
    rng = np.random.default_rng(0)
    for num_images, k in ((16, 4), (6, 4), (3, 4), (7, 1)):
        counts = np.bincount(deal(num_images, k, rng), minlength=k)
        assert counts.sum() == num_images
        assert counts.max() - counts.min() <= 1
    dealt = deal(16, 4, rng)
    for num_ranks in (2, 4):
        for rank in range(num_ranks):
            share = np.bincount(np.split(dealt, num_ranks)[rank], minlength=4)
            assert set(share) == {4 // num_ranks}


@pytest.mark.parametrize(("num_images", "k"), [(8, 4), (6, 4), (2, 3)])
def test_any_negative_is_as_likely_for_any_image(num_images, k):
    draws = np.stack([deal(num_images, k, np.random.default_rng((7, step))) for step in range(6000)])
    shares = np.stack([(draws == negative).mean(0) for negative in range(k)])
    assert np.abs(shares - 1 / k).max() < 5 * np.sqrt(0.25 / 6000)


def test_one_negative_an_image_has_the_expectation_of_all():
    """Closed form: averaged over the K cyclic deals, each of which gives every image another negative, loss and
    gradient are those of all K. And by averaging draws of the deal itself."""
    spn = SPN(1.0, layers={"relu1_1": 1.0}, weights="random").double()
    torch.manual_seed(0)
    restored = torch.rand(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    pasts = torch.rand(3, 4, 3, 8, 8, dtype=torch.float64)  # (K, B, ...)
    images = torch.arange(4)

    def loss_and_gradient(past):
        value = spn(restored, past)
        return value.detach(), torch.autograd.grad(value, restored)[0]

    whole = loss_and_gradient(list(pasts))
    dealt = [loss_and_gradient([pasts[(images + shift) % 3, images]]) for shift in range(3)]
    for expected, *draws in zip(whole, *dealt, strict=True):
        assert torch.allclose(sum(draws) / 3, expected, rtol=1e-12, atol=1e-15)
    deals = [deal(4, 3, np.random.default_rng((1, step))) for step in range(600)]
    drawn = torch.stack([loss_and_gradient([pasts[torch.from_numpy(d), images]])[0] for d in deals])
    assert abs(float(drawn.mean() - whole[0])) < 4 * float(drawn.std()) / 600**0.5


def test_a_dealt_image_is_restored_by_the_negative_dealt_to_it():
    schedules = [Schedule(), Schedule(role="anchor"), Schedule(start=1.0), Schedule(start=1.0)]
    torch.manual_seed(0)
    accelerator, net = Accelerator(cpu=True), Tied()
    negatives = Negatives(net, schedules, Tied, per_image="one")
    with pytest.raises(RuntimeError, match="sync"):
        negatives(torch.rand(1, 3, 4, 4))
    negatives.sync(accelerator, net)
    degraded = torch.rand(7, 3, 4, 4)
    dealt, anchor = negatives(degraded, draw=(3, 1))
    nets = [negatives.nets[k] for k in (0, 2, 3)]
    for i, k in enumerate(deal(7, 3, np.random.default_rng((3, 1)))):
        assert torch.allclose(dealt[i], nets[k](degraded)[i], atol=1e-6)
    assert torch.equal(anchor, negatives.nets[1](degraded))
    assert not torch.equal(dealt, negatives(degraded, draw=(3, 2))[0])
    with pytest.raises(UserError, match="dealt from a seed"):
        negatives(degraded)


def test_views_are_the_image_and_noisy_copies_of_it():
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    schedule = Schedule(views=3, view_sigma=(25.5, 25.5), view_gray=0.5)
    negatives = Negatives(nn.Identity(), [schedule])
    negatives.sync(accelerator, nn.Identity())
    degraded = torch.full((64, 3, 16, 16), 0.5)
    first, *copies = negatives(degraded)
    assert torch.equal(first, degraded)
    for copy in copies:
        noise = copy - degraded
        assert float(noise.std()) == pytest.approx(0.1, rel=0.02)
        gray = (noise[:, 0] == noise[:, 1]).flatten(1).all(1)
        assert 0.2 < float(gray.float().mean()) < 0.8
    assert not torch.equal(copies[0], copies[1])


def test_triggered_ones_take_turns_where_the_error_is_high():
    torch.manual_seed(0)
    accelerator, net = Accelerator(cpu=True), nn.Conv2d(3, 3, 1)
    schedules = [Schedule(trigger=0.5, decay=0.25), Schedule(update_every=4), Schedule(trigger=0.5, decay=0.5)]
    negatives = Negatives(net, schedules)
    negatives.sync(accelerator, net)
    expected = [n.weight.clone() for n in negatives.nets]
    turn = iter([0, 2, 0])
    ages = []
    for step, error in enumerate([1.0, 0.5, 0.1, 0.6, 2.0], 1):
        with torch.no_grad():
            net.weight.add_(1.0)
        if error > 0.5:
            k = next(turn)
            expected[k] = schedules[k].decay * expected[k] + (1 - schedules[k].decay) * net.weight
        if step == 4:
            expected[1] = 0.1 * expected[1] + 0.9 * net.weight
        negatives.update(step, torch.tensor(error))
        ages.append(negatives.age(step))
        for own, value in zip(negatives.nets, expected, strict=True):
            assert torch.allclose(own.weight, value, rtol=1e-6)
    assert ages == [[0, 1, 1], [1, 2, 2], [2, 3, 3], [3, 0, 0], [0, 1, 1]]
    with pytest.raises(UserError, match="error"):
        negatives.update(6)


def test_the_average_as_source():
    accelerator, net = Accelerator(cpu=True), nn.Conv2d(3, 3, 1)
    averaged = nn.Conv2d(3, 3, 1)
    schedules = [Schedule(update_every=1, decay=0.25, source="ema"), Schedule(update_every=1, decay=0.0)]
    with pytest.raises(UserError, match="set ema_decay"):
        Negatives(net, schedules).sync(accelerator, net)
    negatives = Negatives(net, schedules)
    negatives.sync(accelerator, net, lambda: full_params(accelerator, averaged))
    start = net.weight.clone()
    negatives.update(1)
    assert torch.allclose(negatives.nets[0].weight, 0.25 * start + 0.75 * averaged.weight)
    assert torch.equal(negatives.nets[1].weight, net.weight)


@pytest.mark.parametrize(
    ("per_image", "more", "together"),
    [
        ("all", {}, True),
        ("all", {"role": "anchor"}, True),
        ("all", {"views": 2}, False),
        ("one", {}, False),
    ],
)
def test_what_negatives_restore_is_what_each_restores_of_its_images(per_image, more, together):
    torch.manual_seed(0)
    schedules = [Schedule(update_every=2, start=0.5), Schedule(update_every=3, start=0.5, **more)]
    accelerator, net = Accelerator(cpu=True), Tied()
    negatives = Negatives(net, schedules, Tied, per_image)
    negatives.sync(accelerator, net)
    assert negatives.see_the_same is together
    image = torch.rand(4, 3, 6, 6)
    past = negatives(image, draw=(0, 1))
    alone = [n(image) for n in negatives.nets]
    if per_image == "one":
        (past,) = past
        whose = [min((0, 1), key=lambda k, i=i: (past[i] - alone[k][i]).abs().max()) for i in range(4)]
        assert sorted(whose) == [0, 0, 1, 1]
        assert all(torch.allclose(past[i], alone[k][i], atol=1e-6) for i, k in enumerate(whose))
    else:
        assert len(past) == 1 + more.get("views", 1)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(past, alone, strict=False))
