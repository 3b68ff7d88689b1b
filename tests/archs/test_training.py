"""Networks train through the engine: three of spandrel's with negatives, and each of our own in bf16."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mcir.archs import parse
from mcir.config import validate
from mcir.parallel.accelerator import precision_of
from mcir.train.engine import Engine, build_engine
from tests.runs import tiny_config, write_dataset

ZOO: dict[str, tuple[dict[str, Any], int]] = {  # arguments of the class, degraded crop
    "DAT": ({"upscale": 2, "embed_dim": 64, "depth": [2], "num_heads": [2], "split_size": [4, 8]}, 16),
    "SCUNet": ({"dim": 64, "config": [1, 1, 1, 1, 1, 1, 1]}, 64),
    "Compact": ({"upscale": 2, "num_feat": 8, "num_conv": 2}, 16),
}
OWN: dict[str, tuple[dict[str, Any], int]] = {
    "edsr": ({"name": "edsr", "scale": 2, "num_features": 8, "num_blocks": 2}, 16),
    "swinir": (
        {"name": "swinir", "variant": "light", "scale": 2, "depths": [2], "num_heads": [2], "embed_dim": 12},
        16,
    ),
    "ffanet": ({"name": "ffanet", "dim": 16, "num_blocks": 1}, 16),
    "dehazeformer": ({"name": "dehazeformer", "variant": "t", "depths": [1, 2, 2, 1, 1]}, 32),
    "idt": ({"name": "idt", "embed_dim": 16, "mlp_ratio": 0.25}, 128),
    "nafnet": ({"name": "nafnet", "width": 4, "num_encoder_blocks": [1, 1, 1, 1], "tlc": True}, 32),
}


def engine_of(arch: dict[str, Any], size: int, folder: Path, **overrides: Any) -> Engine:
    """A run of `arch` on pairs of its scale with degraded crops of `size`, two negatives and random features."""
    scale = parse(arch).descriptor.scale
    data = write_dataset(folder / "pairs", num_rows=4, num_shards=1, side=size * scale, scale=scale)
    values = tiny_config(folder, arch=arch, steps=4, batch_size=2, **overrides)
    values["data"] |= {"train": [{"source": {"format": "parquet", "path": str(data)}}], "crop_size": size * scale}
    values["objective"]["contrast"]["negatives"] = [
        {"update_every": 1, "decay": 0.5, "start": 0.1},
        {"update_every": 3},
    ]
    return build_engine(validate(values, "training test"))


def train(engine: Engine, num_steps: int) -> list[dict[str, float]]:
    batch = next(iter(engine.loader))
    return [{name: float(value) for name, value in engine.step([batch]).items()} for _ in range(num_steps)]


@pytest.mark.parametrize("architecture", ZOO)
def test_networks_of_spandrel_train_with_negatives(architecture, tmp_path):
    parameters, size = ZOO[architecture]
    arch = {"name": "zoo", "architecture": architecture, "parameters": parameters}
    engine = engine_of(arch, size, tmp_path)
    initial = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    negative = engine.negatives.nets[0]
    first_negative = {name: p.clone() for name, p in negative.named_parameters()}
    history = train(engine, 4)
    assert all(math.isfinite(value) for parts in history for value in parts.values())
    assert all(parts["contrast"] < 0 and parts["skipped"] == 0 for parts in history)
    assert history[-1]["reconstruction"] < history[0]["reconstruction"]  # four steps on one batch
    still = [name for name, p in engine.model.named_parameters() if p.equal(initial[name])]
    assert not still
    assert not [name for name, p in negative.named_parameters() if p.equal(first_negative[name])]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "idt")) for name in OWN])
def test_our_networks_train_in_bf16_where_they_say_so(name, tmp_path):
    arch, size = OWN[name]
    assert parse(arch).descriptor.bf16
    torch.manual_seed(0)
    engine = engine_of(arch, size, tmp_path, compute={"precision": "bf16"})
    assert precision_of(engine.accelerator) == "bf16"
    seen: list[torch.dtype] = []
    layer = next(m for m in engine.model.modules() if isinstance(m, torch.nn.Conv2d))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    history = train(engine, 2)
    assert set(seen) == {torch.bfloat16}  # the arithmetic
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}  # the weights
    assert {p.dtype for p in engine.negatives.parameters()} == {torch.float32}
    assert all(math.isfinite(value) for parts in history for value in parts.values())
    assert all(parts["contrast"] < 0 and parts["skipped"] == 0 for parts in history)

    in_fp32 = engine_of(arch, size, tmp_path / "fp32", compute={"precision": "fp32"})
    expected = train(in_fp32, 1)[0]
    assert history[0]["reconstruction"] == pytest.approx(expected["reconstruction"], rel=0.03)
