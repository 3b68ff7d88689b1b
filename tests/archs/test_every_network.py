"""What training asks of every network alike."""

import copy

import pytest
import torch
from pydantic import ValidationError

from mcir.archs import build, parse

NETWORKS = {
    "edsr": ({"name": "edsr", "scale": 4, "num_blocks": 2}, (8, 10)),
    "swinir-light": (
        {"name": "swinir", "variant": "light", "scale": 2, "depths": (2, 2), "num_heads": (6, 6)},
        (16, 24),
    ),
    "swinir": ({"name": "swinir", "variant": "classical", "scale": 4, "depths": (2,), "num_heads": (6,)}, (16, 16)),
    "ffanet": ({"name": "ffanet", "num_blocks": 2}, (9, 13)),
    "dehazeformer-t": ({"name": "dehazeformer", "variant": "t"}, (32, 29)),
    "dehazeformer-m": ({"name": "dehazeformer", "variant": "m", "depths": (2, 2, 2, 1, 1)}, (32, 29)),
    "idt": ({"name": "idt", "embed_dim": 16, "mlp_ratio": 0.25}, (128, 128)),
    "nafnet": ({"name": "nafnet", "width": 8}, (20, 17)),
    "nafnet-tlc": ({"name": "nafnet", "width": 8, "tlc": True, "tlc_size": 16}, (20, 17)),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    config, size = NETWORKS[request.param]
    return parse(config), torch.rand(1, 3, *size)


def test_every_parameter_gets_a_gradient(case):
    arch, image = case
    torch.manual_seed(0)  # the four ReLUs of DehazeFormer's fusion are all shut under some weights
    net = arch.build().eval()  # without the chance that stochastic depth leaves a block out
    with torch.no_grad():
        for p in net.parameters():  # away from NAFNet's zeros
            p.add_(0.05 * torch.randn_like(p))
    net(image).square().mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_bf16_autocast_trains_and_output_keeps_its_size(case):
    arch, image = case
    net = arch.build()
    with torch.autocast("cpu", torch.bfloat16):
        restored = net(image)
        loss = restored.float().square().mean()
    loss.backward()
    scale = arch.descriptor.scale
    assert restored.shape == (1, 3, scale * image.shape[2], scale * image.shape[3])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_bf16_as_a_whole_is_close_to_fp32(case):
    """As DeepSpeed runs it: parameters, buffers and input in bf16, without autocast."""
    arch, image = case
    net = arch.build().eval()
    with torch.no_grad():
        expected = net(image)
        restored = net.bfloat16()(image.bfloat16())
    assert restored.dtype == torch.bfloat16
    assert (restored - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_deepcopy_is_independent_and_equal(case):
    arch, image = case
    net = arch.build().eval()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        expected = net(image)
        for p in net.parameters():
            p.zero_()
        assert torch.equal(twin(image), expected)


def test_the_same_seed_builds_the_same_network(case):
    arch, _ = case
    torch.manual_seed(3)
    first = arch.build().state_dict()
    torch.manual_seed(3)
    second = build(arch.model_dump()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_blocks_of_the_descriptor_exist_and_repeat(case):
    arch, _ = case
    names = [type(m).__name__ for m in arch.build().modules()]
    assert arch.descriptor.blocks
    assert all(block in names for block in arch.descriptor.blocks)
    assert max(map(names.count, arch.descriptor.blocks)) > 1


def test_state_dict_holds_no_constant_of_ours(case):
    arch, _ = case
    assert not {"mean", "std", "rgb_mean"} & arch.build().state_dict().keys()
    assert parse(arch.model_dump()) == arch


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "swinir", "variant": "light", "scale": 2, "embed_dim": 61}, "61 does not divide into 6 heads"),
        ({"name": "swinir", "variant": "light", "scale": 2, "depths": (6, 6)}, "depths has 2 entries and num_heads 4"),
        ({"name": "dehazeformer", "variant": "t", "embed_dims": (24, 48, 96, 24, 24)}, "end as they began"),
        ({"name": "dehazeformer", "variant": "t", "num_heads": (2, 4, 5, 1, 1)}, "96 does not divide into 5 heads"),
        ({"name": "idt", "num_heads": (3, 2, 4, 8, 16, 16, 8, 4, 2)}, "32 features of stage 0"),
        ({"name": "idt", "num_heads": (1, 2, 4, 128, 16, 16, 8, 4, 2)}, "64 features of stage 3"),
        ({"name": "nafnet", "num_encoder_blocks": (1, 1)}, "as many entries"),
        ({"name": "ffanet", "dim": 20}, "multiple of 16"),
        ({"name": "swinirr"}, "'swinir'"),
    ],
)
def test_values_that_do_not_fit_together_are_errors_before_building(config, message):
    with pytest.raises(ValidationError, match=message):
        parse(config)
