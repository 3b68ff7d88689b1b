import pytest
import torch
from pydantic import ValidationError

from mcir.archs import build, parse
from tests.archs.golden_weights import assert_equal_to_official


def test_equals_the_official_network():
    assert_equal_to_official(build({"name": "edsr", "scale": 4}), "edsr_light_x4.safetensors")


# Counts of BasicSR's class (FACTS.md A.1).
@pytest.mark.parametrize(("scale", "parameters", "keys"), [(2, 1_369_859, 72), (3, 1_554_499, 72), (4, 1_517_571, 74)])
def test_parameter_counts(scale, parameters, keys):
    net = build({"name": "edsr", "scale": scale})
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == keys
    assert net(torch.rand(1, 3, 5, 7)).shape == (1, 3, 5 * scale, 7 * scale)


def test_unknown_argument_and_scale_are_errors():
    with pytest.raises(ValidationError, match="num_feat"):
        parse({"name": "edsr", "scale": 2, "num_feat": 64})
    with pytest.raises(ValidationError, match="scale"):
        parse({"name": "edsr", "scale": 5})
