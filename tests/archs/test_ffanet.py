import pytest
import torch

from mcir.archs import build
from tests.archs.golden_weights import assert_equal_to_official


def test_equals_the_official_network():
    assert_equal_to_official(build({"name": "ffanet"}), "ffanet.safetensors")


# Counts of the official class (FACTS.md A.1): the published network, and the repository's command-line default.
@pytest.mark.parametrize(("num_blocks", "parameters"), [(19, 4_455_913), (20, 4_682_356)])
def test_parameter_counts(num_blocks, parameters):
    net = build({"name": "ffanet", "num_blocks": num_blocks})
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_takes_any_size():
    net = build({"name": "ffanet", "num_blocks": 1})
    assert net(torch.rand(2, 3, 13, 7)).shape == (2, 3, 13, 7)
