import pytest
import torch
from pydantic import ValidationError
from spandrel.architectures.SwinIR import SwinIR as SpandrelSwinIR

from mcir.archs import build, parse
from mcir.archs.base import DropPath
from mcir.archs.swinir_network import shift_mask
from tests.archs.golden_weights import assert_equal_to_official, fill

SMALL = {"name": "swinir", "variant": "light", "embed_dim": 12, "depths": (2,), "num_heads": (2,), "image_size": 16}


def test_equals_the_official_network():
    net = build({"name": "swinir", "variant": "light", "scale": 4})
    assert_equal_to_official(net, "swinir_light_x4.safetensors")


# FACTS.md A.1; the masks of DIV2K's 48-pixel patches have 36 windows, those of 64 pixels 64.
@pytest.mark.parametrize(
    ("variant", "scale", "parameters", "keys", "windows"),
    [
        ("light", 2, 910_152, 366, 64),
        ("light", 4, 929_628, 366, 64),
        ("classical", 2, 11_752_487, 548, 36),
        ("classical", 4, 11_900_199, 550, 36),
    ],
)
def test_parameter_counts(variant, scale, parameters, keys, windows):
    net = build({"name": "swinir", "variant": variant, "scale": scale})
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == keys
    assert net.state_dict()["layers.0.residual_group.blocks.1.attn_mask"].shape == (windows, 64, 64)


@pytest.mark.parametrize(("variant", "active"), [("light", 23), ("classical", 35)])  # FACTS.md A.4
def test_stochastic_depth(variant, active):
    net = build({"name": "swinir", "variant": variant, "scale": 2})
    rates = 1 - net.keep
    assert (rates > 0).sum() == 2 * active  # attention and MLP
    assert float(rates.max()) == pytest.approx(0.1)
    assert net.train()(torch.rand(1, 3, 8, 8)).isfinite().all()


def test_what_stochastic_depth_leaves_out_is_drawn_for_each_branch_in_turn():
    """With branches that add one: what is left of them is what is drawn, as DropPath alone would draw it."""
    net = build({**SMALL, "scale": 2, "drop_path": 0.6}).train()
    x = torch.rand(64, 12, 8, 8)
    torch.manual_seed(1)
    kept = torch.stack(net._drawn(x)).flatten(0, 1)  # (branches, B, 1, 1)
    torch.manual_seed(1)
    for rate, of_branch in zip((0.0, 0.0, 0.6, 0.6), kept, strict=True):
        assert torch.allclose(DropPath(rate)(torch.ones(64, 1, 1)), of_branch)
    with torch.no_grad():
        for block in net.layers[0].residual_group.blocks:
            for branch in (block.attn.proj, block.mlp.fc2):
                branch.weight.zero_()
                branch.bias.fill_(1.0)
    block, y = net.layers[0].residual_group.blocks[1], torch.zeros(64, 64, 12)
    shown = block(y, shift_mask((8, 8), 8, 0, x.device), kept[2:])
    assert torch.allclose(shown, kept[2:].sum(0).expand_as(shown))


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (8, 8), (9, 30)])
def test_equals_the_base_at_every_size(size):
    ours = build({**SMALL, "scale": 2}).eval()
    fill(ours)
    base = SpandrelSwinIR(**ours.hyperparameters).eval()
    base.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        assert torch.allclose(ours(x), base(x), atol=1e-5)


def test_a_low_precision_input_does_not_coarsen_the_mean():
    net = build({**SMALL, "scale": 2}).eval()
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        before = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            net(x.bfloat16())
        assert torch.equal(net(x), before)


def test_given_values_replace_the_variants():
    net = build({"name": "swinir", "variant": "classical", "scale": 2, "depths": (2, 2), "num_heads": (6, 6)})
    assert (net.hyperparameters["depths"], net.hyperparameters["embed_dim"]) == ([2, 2], 180)
    descriptor = parse({**SMALL, "scale": 3}).descriptor
    assert (descriptor.scale, descriptor.size_multiple, descriptor.pad_mode) == (3, 8, "flip")
    with pytest.raises(ValidationError, match="embed_dims"):
        parse({**SMALL, "scale": 2, "embed_dims": 60})


def test_a_network_restores_after_it_was_traced():
    """Of a size that it has not seen: nothing of the trace, whose tensors hold no values, is kept."""
    net, image = build({**SMALL, "scale": 2}).eval(), torch.rand(1, 3, 24, 56)
    traced = torch.export.export(net, (image,), strict=False).module()
    with torch.no_grad():
        assert torch.allclose(net(image), traced(image), atol=1e-6)
