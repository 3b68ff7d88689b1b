"""Networks of one's own: they train, or one sentence says what is wrong before the first step."""

import sys

import pytest
import torch

from mcir.archs import parse
from mcir.archs.base import images_of
from mcir.config import validate
from mcir.errors import UserError
from mcir.restoration.inference import infer
from mcir.train.engine import build_engine
from mcir.weights.trained import open_trained
from tests.runs import tiny_config

NETWORKS = """
import torch
from torch import nn

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.tail = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 12, 3, padding=1)
    def forward(self, x):
        return nn.functional.pixel_shuffle(self.tail(self.head(x).relu()), 2)

class WeightNorm(Base):
    def __init__(self):
        super().__init__()
        self.head = nn.utils.weight_norm(self.head)

class InPlace(Base):
    def forward(self, x):
        x -= 0.4
        return super().forward(x)

class Scales(Base):
    def forward(self, x):
        y = super().forward(x)
        return [y[..., ::4, ::4], y[..., ::2, ::2], y]

class Tied(Base):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1)] * 3)
    def forward(self, x):
        return nn.functional.pixel_shuffle(self.tail(self.body(self.head(x))), 2)

class Complex(Base):
    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.ones(4, 1, 1, dtype=torch.cfloat))

class SameSize(Base):
    def forward(self, x):
        return super().forward(x)[..., ::2, ::2]

class Extra(Base):
    def get_extra_state(self):
        return {"v": 1}

class Looking(Base):
    def forward(self, x):
        return super().forward(x) * (2 if x.mean().item() > 9 else 1)

class Broken(Base):
    def forward(self, x):
        return super().forward(x.view(len(x), 3, -1, 7))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name, **more: {"name": "import", "target": f"own_networks:{name}", "scale": 2, **more}
    sys.modules.pop("own_networks", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Complex", "filter is complex"),
        ("Extra", "Extra has an extra state"),
        ("SameSize", r"makes \(2, 3, 8, 8\) of \(2, 3, 8, 8\), where with arch.scale 2 \(2, 3, 16, 16\)"),
        ("Scales", "returns list of 3 in training instead of an image"),
        ("Broken", "cannot be trained: with data.crop_size 16 "),
    ],
)
def test_what_cannot_be_trained_is_a_sentence_and_leaves_no_run(own, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        build_engine(validate(tiny_config(tmp_path, arch=own(name)), "test"))
    assert not list((tmp_path / "runs").glob("*/checkpoints"))


@pytest.mark.parametrize("blocks", [["Conv2"], ["Block"]])
def test_blocks_that_the_network_has_not_are_an_error(own, tmp_path, blocks):
    with pytest.raises(UserError, match=r"arch\.blocks: the network has no module of a class"):
        build_engine(validate(tiny_config(tmp_path, arch=own("Base", blocks=blocks)), "test"))


def test_a_network_that_looks_at_values_trains_and_is_not_planned(own, tmp_path):
    values = tiny_config(tmp_path, arch=own("Looking"), steps=1)
    assert build_engine(validate(values, "test")).fit() == 0
    with pytest.raises(UserError, match=r"cannot be planned, since it looks at values \(.*set accumulate to a number"):
        build_engine(validate(values | {"accumulate": "auto"}, "test"))


def test_activations_of_no_block_cannot_be_computed_again(own, tmp_path):
    values = tiny_config(tmp_path, arch=own("Base"), compute={"checkpoint_activations": True})
    with pytest.raises(UserError, match=r"checkpoint_activations: the network has no repeated blocks.*arch\.blocks"):
        build_engine(validate(values, "test"))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("name", "more"), [("WeightNorm", {}), ("Tied", {}), ("Scales", {"result": "last"})])
def test_it_trains_resumes_and_is_opened_again(own, tmp_path, name, more):
    values = tiny_config(tmp_path, arch=own(name, **more), steps=2, checkpoint={"every": 2})
    first = build_engine(validate(values, "test"))
    assert first.fit() == 0
    resumed = build_engine(validate(values | {"steps": 3}, "test"), resume="auto")
    assert resumed.state.step == 2
    device = resumed.accelerator.device
    image = torch.rand(1, 3, 8, 8, device=device)
    trained = open_trained([str(first.run_dir)], kind="target", allow_import=True)[0]
    restored = infer(trained.net_on(device), trained.arch.descriptor, image)
    assert restored.shape == (1, 3, 16, 16)
    assert torch.equal(restored, images_of(resumed.model.eval()(image))[0])
    assert resumed.fit() == 0


def test_a_network_that_changes_its_input_changes_a_copy(own):
    arch = parse(own("InPlace"))
    net, image = arch.build().eval(), torch.rand(1, 3, 8, 8)
    given = image.clone()
    restored = infer(net, arch.descriptor, image, ensemble=True)
    assert torch.equal(image, given)
    plain = parse(own("Base")).build().eval()
    plain.load_state_dict(net.state_dict())
    assert torch.allclose(restored, infer(plain, arch.descriptor, image - 0.4, ensemble=True), atol=1e-6)
