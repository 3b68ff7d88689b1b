import pytest
import torch
from pydantic import ValidationError

from mcir.archs import build, parse
from mcir.archs.base import DropPath
from tests.archs.golden_weights import assert_equal_to_official


@pytest.fixture(scope="module")
def net():
    return build({"name": "idt"})


def test_equals_the_official_network():
    assert_equal_to_official(build({"name": "idt"}), "idt.safetensors")


def test_stochastic_depth(net):
    # FACTS.md A.4: 24 active modules, rates from 0.022 to 0.1; off in eval.
    rates = [m.rate for m in net.modules() if isinstance(m, DropPath)]
    active = [rate for rate in rates if rate > 0]
    assert len(active) == 24
    assert (min(active), max(active)) == pytest.approx((0.1 / 4.5, 0.1), rel=1e-3)
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(net.eval()(image), net(image))
        assert not torch.equal(net.train()(image), net(image))


def test_initialisation(net):
    linear = net.bottle.blocks[0].mlp.linear1[0]
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert linear.bias.abs().max() == 0
    assert net.bottle.blocks[0].attn.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.1)


def test_takes_one_size_only(net):
    descriptor = parse({"name": "idt"}).descriptor
    assert (descriptor.fixed_size, descriptor.tile_overlap) == (128, 20)
    for size in [(64, 64), (120, 120), (256, 256), (128, 160)]:  # the sizes that the official network refuses too
        with pytest.raises(ValueError, match="128 x 128"):
            net(torch.rand(1, 3, *size))
    with pytest.raises(ValidationError, match="multiple of 16 windows, 128"):
        parse({"name": "idt", "image_size": 192})
