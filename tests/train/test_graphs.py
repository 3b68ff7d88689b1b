"""Recordings exist on a GPU alone, and there these are their tests."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from mcir.config import validate
from mcir.errors import UserError
from mcir.train.engine import build_engine
from mcir.train.graphs import MAX_RECORDINGS, Recorded, _aliases
from tests.runs import tiny_config

NETWORKS = {
    "edsr": {"name": "edsr", "scale": 2, "num_features": 8, "num_blocks": 2},
    "swinir": {  # with draws: drop path
        "name": "swinir",
        "variant": "light",
        "scale": 2,
        "image_size": 16,
        "depths": [2],
        "num_heads": [6],
        "embed_dim": 12,
    },
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has them")
@pytest.mark.parametrize(
    ("field", "sentence"), [("cuda_graphs", "they are a GPU's"), ("cudnn_benchmark", "a CPU has no")]
)
def test_a_cpu_has_none(tmp_path, field, sentence):
    with pytest.raises(UserError, match=rf"compute\.{field}: {sentence}.*set it to false"):
        build_engine(validate(tiny_config(tmp_path, compute={field: True}), "run"))


def test_parameters_of_a_recording_are_others_in_the_same_memory():
    """Gradients are theirs, and no node of autograd that belongs to the parameters is asked."""
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net[2].weight = net[0].weight  # one that two modules share
    parameters, image = list(net.parameters()), torch.rand(2, 3)
    expected = torch.autograd.grad(net(image).sum(), parameters)
    with _aliases(net) as aliases:
        assert list(map(id, aliases)) == list(map(id, parameters))
        assert not set(map(id, net.parameters())) & set(map(id, parameters))
        assert [alias.data_ptr() for alias in aliases.values()] == [p.data_ptr() for p in parameters]
        found = torch.autograd.grad(net(image).sum(), list(aliases.values()))
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_replay_is_the_call_with_its_draws_statistics_and_gradients():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.5), nn.Conv2d(8, 3, 3)]
    plain = nn.Sequential(*layers).cuda().train()
    net = deepcopy(plain)
    recorded = Recorded(net)
    for step in range(3):
        found = []
        for module in (plain, net):
            torch.manual_seed(step)
            for _ in range(2):  # gradients add up
                output = module(torch.rand(2, 3, 16, 16, device="cuda"))
                output.square().mean().backward()
            found.append([output.detach().clone(), *(p.grad.clone() for p in module.parameters()), *module.buffers()])
            torch.optim.SGD(module.parameters(), 0.1).step()
            module.zero_grad()
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        net(torch.rand(1, 3, 16, 16, device="cuda"))
    assert len(recorded.recordings) == 1
    for side in range(16, 16 + 2 * MAX_RECORDINGS):
        net(torch.rand(1, 3, side, side, device="cuda"))
    assert len(recorded.recordings) == MAX_RECORDINGS
    recorded.forget()
    assert not recorded.recordings


@pytest.mark.gpu
def test_a_call_before_the_backward_pass_of_the_last_one_leaves_it_alone():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)).cuda()
    net, images = deepcopy(plain), torch.rand(2, 1, 3, 16, 16, device="cuda")
    recorded = Recorded(net)
    for module in (plain, net):
        first, second = map(module, images)
        (first.square().mean() + second.abs().mean()).backward()
    for a, b in zip(plain.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5)
    assert len(recorded.recordings) == 1


@pytest.mark.gpu
def test_a_parameter_that_a_recording_would_not_follow_is_refused():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.own = [self.weight]

        def forward(self, image):
            return image * self.own[0]

    net = Apart().cuda()
    net.own = [net.weight]
    Recorded(net)
    with pytest.raises(UserError, match=r"compute.cuda_graphs: the network reads a parameter elsewhere"):
        net(torch.rand(1, 3, 8, 8, device="cuda"))


@pytest.mark.gpu
def test_negatives_side_by_side_restore_what_each_does_alone(tmp_path):
    """In recordings, and in sizes beyond those that are recorded."""
    engine = untrained(tmp_path, "recorded", "swinir", compute={"cuda_graphs": True})
    nets = engine.negatives.nets
    assert len(nets.streams) == len(nets) == 2
    for side in range(8, 8 * (MAX_RECORDINGS + 2), 8):
        for _ in range(2):
            image = torch.rand(2, 3, side, side, device="cuda")
            side_by_side = engine.negatives(image)
            with torch.inference_mode():
                alone = [net(image) for net in nets]
            for got, expected in zip(side_by_side, alone, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    assert len(nets.forward.recordings) == MAX_RECORDINGS


def untrained(tmp_path, name, network, **changes):
    values = tiny_config(tmp_path, name=name, arch=NETWORKS[network], **changes)
    values["objective"]["contrast"]["negatives"] = [
        {"update_every": 2, "decay": 0.5, "start": 0.1},
        {"update_every": 3, "decay": 0.5, "start": 0.5},
    ]
    return build_engine(validate(values, name))


def trained(tmp_path, name, network, **changes):
    engine = untrained(tmp_path, name, network, **changes)
    engine.fit()
    return engine


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("network", ["edsr", "swinir"])
def test_recorded_networks_train_the_same(tmp_path, network, compiled):
    """Over micro-batches, updates of the negatives, which are written in place, and a change of sizes."""
    changes = {"steps": 6, "accumulate": 2, "stages": [{"after": 4, "crop_size": 32, "batch_size": 4}]}
    plain = trained(tmp_path, "plain", network, compute={"compile": compiled}, **changes)
    recorded = trained(tmp_path, "recorded", network, compute={"compile": compiled, "cuda_graphs": True}, **changes)
    # the target, the negatives together, and the features with and without gradients
    assert [len(module.recordings) for module in recorded.recorded] == [1, 1, 2]
    for module, other in ((plain.model, recorded.model), (plain.negatives, recorded.negatives)):
        for (name, a), b in zip(module.named_parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-5), name
