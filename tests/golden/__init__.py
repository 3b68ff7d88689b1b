"""Numbers of official code, from ../shared/golden (or $MCIR_SHARED/golden) where it is there, whole, and otherwise from
the small copies beside this file, which `python -m tests.golden.keep` makes of it: images that a seed gives are drawn,
and of a large result a few hundred values are kept."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

SHARED = Path(os.environ.get("MCIR_SHARED", Path(__file__).parents[3] / "shared"))
KEPT = Path(__file__).parent
SEEDS = {
    "ccr": 1102,
    "cr": 1103,
    "cr_resnet152": 1104,
    "pne": 1105,
    "dcr": 1107,
    "edge": 1107,
    "fft": 1108,
    "pcl": 1108,
}


def find(name: str) -> Path:
    """The whole file, else its small copy; the test is skipped where neither is there."""
    for folder in (SHARED / "golden", KEPT):
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"no golden/{name} in {SHARED} (set MCIR_SHARED)")


def read(name: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a file. Of a result that was not kept whole, NAME holds the values at the flat places
    NAME.places."""
    path = find(name)
    with safe_open(path, "pt") as file:
        meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if path.parent == KEPT and "shape" in meta:
        batch, channels, height, width = (int(side) for side in meta["shape"].split())
        tensors |= drawn(SEEDS[meta["loss"]], (batch, channels, height, width), int(meta["negatives"]))
    return meta, tensors


def drawn(seed: int, shape: tuple[int, int, int, int], num_negatives: int) -> dict[str, torch.Tensor]:
    """The fp16 images of a contrast's case: uniform clean ones y; x, J and n.k lie between y and others."""
    generator = torch.Generator().manual_seed(seed)
    y, x, j, *others = (torch.rand(shape, generator=generator) for _ in range(3 + num_negatives))
    images = {"y": y, "x": 0.4 * y + 0.6 * x, "J": 0.85 * y + 0.15 * j}
    for k, other in enumerate(others):
        share = 0.5 + 0.4 * k / max(num_negatives - 1, 1)
        images[f"n.{k}"] = share * y + (1 - share) * other
    return {key: image.half() for key, image in images.items()}


def at_places(value: torch.Tensor, key: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """`value` where `tensors[key]` knows it: everywhere, or at the places kept."""
    places = tensors.get(f"{key}.places")
    return value if places is None else value.flatten()[places.long()]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
