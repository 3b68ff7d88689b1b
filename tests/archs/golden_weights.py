"""The weights that the golden outputs of the official networks were made with: drawn per parameter name."""

import json
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn


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


def assert_equal_to_official(net: nn.Module, path: Path, tolerance: float = 1e-5) -> None:
    """Same keys, shapes, parameter count and output (relative to the largest value) as the official network."""
    with safe_open(path, "pt") as f:
        meta, x, expected = f.metadata(), f.get_tensor("input"), f.get_tensor("output")
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == json.loads(meta["state_dict"])
    assert sum(p.numel() for p in net.parameters()) == int(meta["parameters"])
    fill(net)
    with torch.no_grad():
        out = net.eval()(x)
    assert out.shape == expected.shape
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()
