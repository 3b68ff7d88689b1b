import pytest
import torch
from pydantic import ValidationError

from mcir.archs import build, parse
from tests.archs.golden_weights import assert_equal_to_official


def test_equals_the_official_network():
    net = build({"name": "dehazeformer", "variant": "t"})
    # The golden run is the official network's own, on [-1, 1]: its file stores both images in [0, 1].
    assert_equal_to_official(net, "dehazeformer_t.safetensors")


# Parameters and keys of the official classes (FACTS.md A.1).
@pytest.mark.parametrize(
    ("variant", "parameters", "keys"),
    [
        ("t", 687_404, 258),
        ("s", 1_284_884, 496),
        ("b", 2_517_612, 972),
        ("m", 4_635_952, 710),
        ("w", 9_686_724, 972),
        ("d", 4_983_068, 1924),
        ("l", 25_451_652, 1004),
    ],
)
def test_parameter_counts(variant, parameters, keys):
    with torch.device("meta"):
        net = build({"name": "dehazeformer", "variant": variant})
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == keys


# Attention blocks of each stage (FACTS.md A.1).
@pytest.mark.parametrize(
    ("variant", "blocks"), [("t", [0, 2, 4, 0, 0]), ("s", [2, 4, 6, 0, 0]), ("b", [4, 8, 12, 0, 0])]
)
def test_attention_is_in_the_last_blocks(variant, blocks):
    with torch.device("meta"):
        keys = build({"name": "dehazeformer", "variant": variant}).state_dict()
    assert [sum(k.startswith(f"layer{i}.") and k.endswith("QK.bias") for k in keys) for i in range(1, 6)] == blocks


def test_pads_inside_down_to_its_minimum_size():
    arch = parse({"name": "dehazeformer", "variant": "s"})
    net = arch.build()
    assert arch.descriptor.min_size == 25
    assert net(torch.rand(1, 3, 25, 30)).shape == (1, 3, 25, 30)
    with pytest.raises(RuntimeError, match="Padding size"):
        net(torch.rand(1, 3, 24, 30))


def test_initialisation():
    net = build({"name": "dehazeformer", "variant": "b"})
    block = net.layer3.blocks[-1]
    # Xavier: sqrt(2 / (fan_in + fan_out)); all but QK shrunk by (8 * 64 blocks)^(-1/4).
    assert block.mlp.mlp[0].weight.std().item() == pytest.approx((2 / (96 + 384)) ** 0.5 * 512**-0.25, rel=0.03)
    assert block.attn.QK.weight.std().item() == pytest.approx((2 / (96 + 192)) ** 0.5, rel=0.03)
    assert block.attn.QK.bias.abs().max() == 0
    assert (block.norm1.meta1.bias == 1).all()
    assert (block.norm1.meta2.bias == 0).all()


def test_unknown_variant_is_an_error():
    with pytest.raises(ValidationError, match="variant"):
        parse({"name": "dehazeformer", "variant": "xl"})
