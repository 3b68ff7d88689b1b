"""Small real runs for tests: a dataset of random images in Parquet shards, and a config over it."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_dataset(
    folder: Path,
    num_rows: int = 24,
    num_shards: int = 3,
    side: int = 32,
    scale: int | None = None,
    extra: Sequence[str] = (),
) -> Path:
    """Shards of smooth random images with keys 000, 001, ...; `scale` adds a `degraded` column of that scale, `extra`
    columns of the clean images' complements."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for shard, indices in enumerate(np.array_split(np.arange(num_rows), num_shards)):
        columns: dict[str, list[Any]] = {"key": [], "clean": []}
        for index in indices:
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image = coarse.resize((side, side), Image.Resampling.BICUBIC)
            columns["key"].append(f"{index:03d}")
            columns["clean"].append({"bytes": png(np.asarray(image)), "path": None})
            if scale:
                small = image.resize((side // scale, side // scale), Image.Resampling.BICUBIC)
                columns.setdefault("degraded", []).append({"bytes": png(np.asarray(small)), "path": None})
            for name in extra:
                columns.setdefault(name, []).append({"bytes": png(255 - np.asarray(image)), "path": None})
        pq.write_table(pa.table(columns), folder / f"{shard:05d}.parquet", row_group_size=4)
    return folder


def tiny_config(folder: Path, **overrides: Any) -> dict[str, Any]:
    """The values of a run that takes milliseconds a step; `folder` gets the dataset and the runs."""
    source = {"format": "parquet", "path": str(write_dataset(folder / "data"))}
    bicubic = {"name": "bicubic", "scale": 2}
    negatives = [
        {"update_every": 2, "decay": 0.5, "start": 0.1},
        {"update_every": 3},
        {"update_every": 5, "start": 0.5},
    ]
    layers = {"relu1_1": 0.5, "relu1_2": 0.5}
    values: dict[str, Any] = {
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "steps": 6,
        "batch_size": 4,
        "arch": {"name": "edsr", "scale": 2, "num_features": 7, "num_blocks": 2},  # 7: shards of two ranks are uneven
        "data": {"train": [{"source": source, "degradation": bicubic}], "crop_size": 16, "num_workers": 0},
        "objective": {
            "contrast": {
                "name": "spn",
                "weight": 0.01,
                "features": {"layers": layers, "weights": "random"},
                "negatives": negatives,
            }
        },
        "optim": {"optimizer": {"name": "adam", "lr": 1e-3}},
        "ema_decay": 0.9,
        "checkpoint": {"every": 3},
        "tracking": {"log_every": 2},
    }
    return values | overrides
