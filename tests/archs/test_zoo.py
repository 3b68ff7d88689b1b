import copy
import importlib.util
import sys

import pytest
import torch
from pydantic import ValidationError
from spandrel import ModelLoader
from spandrel.architectures.HAT import HAT
from torch import nn

from mcir.archs import build, parse
from mcir.errors import UserError

HAT_SMALL = {
    "upscale": 2,
    "img_size": 16,
    "window_size": 8,
    "embed_dim": 12,
    "depths": [2],
    "squeeze_factor": 4,
    "num_heads": [2],
    "upsampler": "pixelshuffle",
}
NETWORKS = {
    "transformer": ({"architecture": "HAT", "parameters": HAT_SMALL}, 2, 16),
    "unet": (
        {"architecture": "MixDehazeNet", "parameters": {"depths": [2] * 5, "embed_dims": [8, 16, 24, 16, 8]}},
        1,
        40,
    ),
    "compact": ({"architecture": "Compact", "parameters": {"num_feat": 8, "num_conv": 2, "upscale": 4}}, 4, 12),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_trains_a_few_steps_away_from_a_copy_of_itself(kind):
    """The exercise of mcir: the network learns, a frozen copy restores the same input."""
    section, scale, side = NETWORKS[kind]
    arch = parse({"name": "zoo", **section})
    assert arch.descriptor.scale == scale
    torch.manual_seed(0)
    net = arch.build()
    negative = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    degraded, clean = torch.rand(2, 3, side, side), torch.rand(2, 3, scale * side, scale * side)
    losses = []
    for _ in range(4):
        restored = net(degraded)
        assert restored.shape == clean.shape
        loss = (restored - clean).abs().mean()
        (loss - 0.01 * (restored - negative(degraded)).abs().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("kind", "blocks"), [("transformer", ("HAB",)), ("unet", ("MixStructureBlock",)), ("compact", ())]
)
def test_describes_what_it_builds(kind, blocks):
    section, _, side = NETWORKS[kind]
    arch = parse({"name": "zoo", **section})
    assert arch.descriptor.blocks == blocks
    assert arch.descriptor.min_size <= side
    assert parse(arch.model_dump(mode="json")) == arch


def test_size_requirements_are_spandrels():
    descriptor = parse({"name": "zoo", "architecture": "Uformer"}).descriptor
    assert (descriptor.size_multiple, descriptor.square) == (128, True)


def test_describing_does_not_move_the_random_generator():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    parse({"name": "zoo", "architecture": "Compact", "parameters": {"num_conv": 3}})
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("wrapped", [False, True])
def test_reads_architecture_and_weights_from_a_file(tmp_path, wrapped):
    source = HAT(**HAT_SMALL).eval()
    torch.save({"params_ema": source.state_dict()} if wrapped else source.state_dict(), tmp_path / "hat.pth")
    arch = parse({"name": "zoo", "weights": str(tmp_path / "hat.pth")})
    assert (arch.architecture, arch.descriptor.scale) == ("HAT", 2)
    net, image = arch.build(), torch.rand(1, 3, 16, 16)
    assert net.training
    with torch.no_grad():
        assert torch.equal(net.eval()(image), source(image))
    assert parse(arch.model_dump(mode="json")) == arch
    # A value that is not in the weights may be given beside them.
    changed = parse({"name": "zoo", "weights": str(tmp_path / "hat.pth"), "parameters": {"drop_path_rate": 0.3}})
    assert changed.build().hyperparameters["drop_path_rate"] == 0.3


def test_output_is_what_spandrel_gives():
    """MixDehazeNet restores in [-1, 1] and FBCNN returns a pair; neither is for the trainer to know."""
    arch = parse({"name": "zoo", "architecture": "MixDehazeNet", "parameters": {"depths": [1] * 5}})
    net, image = arch.build().eval(), torch.rand(1, 3, 48, 48)
    expected = ModelLoader().load_from_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.allclose(copy.deepcopy(net)(image).clamp(0, 1), expected(image), atol=1e-6)
    fbcnn = build({"name": "zoo", "architecture": "FBCNN", "parameters": {"nc": [8, 8, 8, 512], "nb": 2}})
    assert fbcnn(image).shape == image.shape


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"architecture": "hatt"}, "did you mean 'HAT'"),
        ({"architecture": "HAT", "parameters": {"windowsize": 8}}, "did you mean 'window_size'"),
        ({"architecture": "SAFMN"}, "needs the arguments dim"),
        ({"architecture": "HAT", "parameters": {**HAT_SMALL, "window_size": 0}}, "refuses these parameters"),
        ({"architecture": "LaMa"}, "takes a mask"),
        ({"architecture": "DnCNN"}, "images have 3"),
        ({}, "give the architecture"),
        ({"weights": "nowhere.pth"}, "nowhere.pth: no such weights file"),
        ({"architecture": "HAT", "parameter": {}}, "parameter"),
    ],
)
def test_wrong_descriptions_are_errors_before_anything_starts(section, message):
    with pytest.raises(ValidationError, match=message):
        parse({"name": "zoo", **section})


def test_a_file_of_no_known_architecture(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "net.pth")
    with pytest.raises(ValidationError, match="no architecture that spandrel knows"):
        parse({"name": "zoo", "weights": str(tmp_path / "net.pth")})


@pytest.mark.skipif(not importlib.util.find_spec("spandrel_extra_arches"), reason="spandrel_extra_arches not installed")
def test_extra_architectures():
    assert parse({"name": "zoo", "architecture": "Restormer"}).descriptor.size_multiple == 8


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, width, depth=1):\n"
        "        super().__init__()\n"
        "        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1))\n"
        "    def forward(self, x):\n"
        "        return x + self.body(x)\n"
        "def function():\n    raise SystemError('called')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_networks", None)


def test_imports_the_users_network_from_the_working_directory(own_module):
    arch = parse({"name": "import", "target": "my_networks:Net", "arguments": {"width": 4}, "size_multiple": 8})
    assert (arch.descriptor.scale, arch.descriptor.size_multiple) == (1, 8)
    assert arch.build()(torch.rand(1, 3, 8, 8)).shape == (1, 3, 8, 8)


def test_a_network_of_a_named_repository_may_be_missing_until_it_is_built(own_module):
    section = {"name": "import", "target": "their_networks.net:Net", "repository": "github.com/they/theirs", "scale": 2}
    arch = parse(section)
    assert arch.descriptor.scale == 2
    with pytest.raises(UserError, match=r"(?i)no module.*their_networks.*get github\.com/they/theirs and put"):
        arch.build()
    with pytest.raises(ValidationError, match="did you mean 'width'"):  # what is there is checked
        parse({"name": "import", "target": "my_networks:Net", "repository": "r", "arguments": {"widht": 4}})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"target": "my_networks"}, "package.module:Class"),
        ({"target": "my_networks:Nett", "arguments": {"width": 4}}, "did you mean 'Net'"),
        ({"target": "my_network:Net"}, "cannot be imported"),
        ({"target": "my_networks:function"}, "has no network 'function'"),
        ({"target": "my_networks:Net", "arguments": {"widht": 4}}, "did you mean 'width'"),
        ({"target": "my_networks:Net"}, "needs the arguments width"),
    ],
)
def test_wrong_imports_are_errors(own_module, section, message):
    with pytest.raises(ValidationError, match=message):
        parse({"name": "import", **section})
