"""One graph a block class, none after warm-up. The graphs are counted as they are traced; how they are turned into
machine code is torch's concern."""

import pytest
import torch
import torch._inductor.config

from mcir.archs import parse
from mcir.archs.base import blocks_of, checkpoint_activations, compile_blocks
from mcir.errors import UserError
from tests.archs.test_every_network import NETWORKS
from tests.archs.test_zoo import NETWORKS as ZOO

# Of a block class: one for each width and side in a U-shape, and for attention or none and shift of a DehazeFormer.
NUM_GRAPHS = {
    "edsr": 2,  # and the upsampler
    "swinir-light": 1,
    "swinir": 1,
    "ffanet": 1,
    "nafnet": 9,  # and a step up to each of four widths
    "nafnet-tlc": 9,
    "dehazeformer-t": 7,
    "dehazeformer-m": 6,
    "idt": 17,
    "transformer": 2,
    "unet": 3,
    "plain": 1,
}
CASES = {name: (parse(config), size) for name, (config, size) in NETWORKS.items()} | {
    name: (parse({"name": "zoo", **section}), (side, side))
    for name, (section, _, side) in ZOO.items()
    if name != "compact"
}
CASES["plain"] = (
    parse({"name": "zoo", "architecture": "RealPLKSR", "parameters": {"dim": 8, "n_blocks": 3}}),
    (16, 16),
)
SLOW = {"dehazeformer-t", "dehazeformer-m", "idt", "nafnet-tlc", "swinir", "transformer", "unet"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES])
def test_blocks_are_one_graph_and_are_not_compiled_again(name):
    arch, size = CASES[name]
    torch.compiler.reset()
    torch.manual_seed(0)
    net = arch.build().eval()
    image, graphs = torch.rand(1, 3, *size), []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    def target_and_negative():
        with torch.autocast("cpu", torch.bfloat16):  # where the stream changes precision on its way
            net.train()(image).float().square().mean().backward()
            with torch.inference_mode():
                net.eval()(image)
        return len(graphs)

    compile_blocks(net, arch.descriptor, backend=count)
    assert target_and_negative() == 2 * NUM_GRAPHS[name]
    assert target_and_negative() == 2 * NUM_GRAPHS[name]
    twin = arch.build().eval()
    twin.load_state_dict(net.state_dict())
    with torch.inference_mode():
        assert torch.allclose(net(image), twin(image), atol=1e-6)


@pytest.mark.parametrize("name", ["edsr", "swinir-light", pytest.param("nafnet", marks=pytest.mark.slow)])
def test_blocks_that_are_computed_again_are_compiled_too(name):
    arch, size = CASES[name]
    torch.compiler.reset()
    torch.manual_seed(0)
    net, plain, graphs = arch.build(), arch.build(), []
    plain.load_state_dict(net.state_dict())

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    checkpoint_activations(net, arch.descriptor)
    compile_blocks(net, arch.descriptor, backend=count)
    image = torch.rand(1, 3, *size)
    for network in (net, net, plain):
        torch.manual_seed(0)
        network.zero_grad()
        network(image).square().mean().backward()
    assert len(graphs) == NUM_GRAPHS[name]
    for own, other in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(own.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_a_missing_compiler_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    arch = parse({"name": "edsr", "scale": 2, "num_features": 4, "num_blocks": 1})
    with pytest.raises(
        UserError, match=r"compute\.compile: it needs a C\+\+ compiler.*install one, or set it to false"
    ):
        compile_blocks(arch.build(), arch.descriptor)


def test_blocks_that_are_not_there_are_an_error():
    arch = parse({"name": "zoo", "architecture": "Compact", "parameters": {"num_feat": 8, "num_conv": 2}})
    with pytest.raises(UserError, match="no repeated blocks to compile"):
        compile_blocks(arch.build(), arch.descriptor)
    typo = parse({"name": "zoo", "architecture": "RealPLKSR", "parameters": {"n_blocks": 3}, "blocks": ["PLKBlok"]})
    with pytest.raises(UserError, match=r"arch\.blocks: .* PLKBlok: did you mean PLKBlock\?"):
        blocks_of(typo.build(), typo.descriptor)
