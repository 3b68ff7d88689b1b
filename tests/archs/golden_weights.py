"""The weights that the golden outputs of the official networks were made with: drawn per parameter name."""

import json
import zlib

import torch
from torch import nn

from tests.golden import at_places, digest, read


def fill(net: nn.Module) -> None:
    """Overwrite every parameter with values that depend on its name and shape alone (FACTS.md, golden data)."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            n = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            matrix = sum(s > 1 for s in p.shape) >= 2
            last = name.rsplit(".", 1)[-1]
            if matrix and last == "weight":
                n = 0.4 * n * p[0].numel() ** -0.5
            elif not matrix and last in ("weight", "beta", "gamma"):
                n = 1 + 0.1 * n
            else:
                n = 0.1 * n
            p.copy_(n)


def assert_equal_to_official(net: nn.Module, name: str, tolerance: float = 1e-5) -> None:
    """Same keys, shapes, parameter count and output (relative to the largest value) as the official network."""
    meta, tensors = read(name)
    shapes = {k: list(v.shape) for k, v in net.state_dict().items()}
    if "state_dict" in meta:
        assert shapes == json.loads(meta["state_dict"])
    else:
        assert digest(json.dumps(shapes, sort_keys=True)) == meta["state_dict.sha256"]
    assert sum(p.numel() for p in net.parameters()) == int(meta["parameters"])
    fill(net)
    with torch.no_grad():
        out = at_places(net.eval()(tensors["input"]), "output", tensors)
    expected = tensors["output"]
    assert out.shape == expected.shape
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()
