"""Measuring: closed forms, what cannot be measured, and that a run's validation is the same measurement."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mcir.cli import main
from mcir.config import validate
from mcir.data.rows import Units
from mcir.data.sources import FolderSource
from mcir.errors import UserError
from mcir.evaluation.config import ValidationConfig, ValidationSet
from mcir.evaluation.evaluate import evaluate, mean_of_sets, pair_of, try_first
from mcir.parallel.accelerator import build_accelerator
from mcir.train.engine import build_engine
from tests.distributed.launch import write_config
from tests.runs import tiny_config, write_dataset


def write_pairs(folder, offsets, side=24):
    """Grey images of 100 and, `offset` levels brighter, their degraded halves."""
    for name, image in [(f"{i}", offset) for i, offset in enumerate(offsets)]:
        for half, level in (("clean", 100), ("degraded", 100 + image)):
            (folder / half).mkdir(parents=True, exist_ok=True)
            pixels = np.full((side, side, 3), level, np.uint8)
            Image.fromarray(pixels).save(folder / half / f"{name}.png")
    source = FolderSource(format="folders", clean=str(folder / "clean"), degraded=str(folder / "degraded"))
    return ValidationSet(source=source, protocol="rgb")


def test_the_value_of_each_image_and_their_mean(tmp_path):
    offsets = [1, 10, 51]
    scores, pictures = evaluate(lambda image: image, write_pairs(tmp_path, offsets), 1, build_accelerator(), 2)
    expected = [20 * math.log10(255 / offset) for offset in offsets]
    assert scores.keys == ["0", "1", "2"]
    assert scores.values["psnr"] == pytest.approx(expected, rel=1e-12)
    assert scores.mean()["psnr"] == pytest.approx(sum(expected) / 3, rel=1e-12)
    assert [picture.key for picture in pictures] == ["0", "1"]
    assert pictures[1].degraded.eq(110 / 255).all()
    assert pictures[1].clean.eq(100 / 255).all()


def test_each_set_weighs_the_same_in_the_mean_of_sets():
    means = mean_of_sets({"small": {"psnr": 30.0, "ssim": 0.9}, "large": {"psnr": 20.0, "ssim": 0.5}})
    assert means["mean"] == {"psnr": 25.0, "ssim": pytest.approx(0.7)}
    assert means["large"] == {"psnr": 20.0, "ssim": 0.5}


def test_what_a_visitor_returns_joins_the_scores(tmp_path):
    data = write_pairs(tmp_path, [1, 2])
    brightness = evaluate(
        lambda image: 2 * image, data, 1, build_accelerator(), visit=lambda p: {"mean": float(p.restored.mean())}
    )[0].values["mean"]
    assert brightness == pytest.approx([202 / 255, 204 / 255])


def test_what_cannot_be_measured_is_said_in_a_sentence(tmp_path):
    accelerator, data = build_accelerator(), write_pairs(tmp_path / "small", [1], side=8)
    with pytest.raises(UserError, match=r"0.png: Images of 8 x 8 are too small for protocol rgb"):
        evaluate(lambda image: image, data, 1, accelerator)
    data = write_pairs(tmp_path / "pairs", [1])
    with pytest.raises(UserError, match=r"0.png: degraded is 24 x 24 and clean 24 x 24; at scale 2"):
        evaluate(lambda image: image, data, 2, accelerator)

    def full(image):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"0.png: 24 x 24 pixels do not fit into memory"):
        evaluate(full, data, 1, accelerator)


def test_an_image_that_the_visitor_refuses_costs_no_other(tmp_path):
    """Such as one whose key is too long for the name of a picture."""

    def visit(picture):
        if picture.key == "1":
            raise UserError("the pictures of 1 cannot be written")
        return {}

    scores, _ = evaluate(lambda image: image, write_pairs(tmp_path, [1, 2, 3]), 1, build_accelerator(), visit=visit)
    assert (scores.keys, scores.failed) == (["0", "2"], {1: "the pictures of 1 cannot be written"})


def test_no_images_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(FolderSource, "open", lambda self, extra=(): Units((), lambda unit, start: iter(())))
    with pytest.raises(UserError, match="no images"):
        evaluate(lambda image: image, write_pairs(tmp_path, [1]), 1, build_accelerator())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"format": "folders", "clean": "none"}, "none is not a folder"),
        ({"format": "parquet", "path": "{}/data"}, "has no degraded image"),
        ({"format": "folders", "clean": "{}/small/clean", "degraded": "{}/small/degraded"}, "at scale 2"),
    ],
)
def test_a_set_that_cannot_be_measured_on_stops_the_run_before_its_first_step(tmp_path, source, message):
    write_pairs(tmp_path / "small", [1])
    values = tiny_config(tmp_path)
    bicubic = {"name": "bicubic", "scale": 2}
    source = {key: value.format(tmp_path) for key, value in source.items()}
    good = {"source": values["data"]["train"][0]["source"], "degradation": bicubic, "protocol": "sr"}
    values["validation"] = {"every": 3, "sets": {"good": good, "bad": {"source": source, "protocol": "sr"}}}
    with pytest.raises(UserError, match=rf"^validation\.sets\.bad(\.source\.clean)?: .*{message}"):
        build_engine(validate(values, "run"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("case", ["ema", "target", "tiles"])
def test_validation_in_a_run_is_mcir_evaluate_to_the_last_digit(tmp_path, monkeypatch, case):
    values = tiny_config(tmp_path, steps=4, checkpoint={"every": 2}, objective={"contrast": None})
    held = write_dataset(tmp_path / "held", num_rows=5, num_shards=2)
    data = {"source": {"format": "parquet", "path": str(held)}, "protocol": "sr"}
    sets = {"held": data | {"degradation": {"name": "bicubic", "scale": 2}}}
    values["validation"] = {
        "every": 2,
        "sets": sets,
        **{"target": {"weights": "target"}, "tiles": {"tile": 8}}.get(case, {}),
    }
    engine = build_engine(validate(values, "run"))
    engine.fit()
    checkpoint = engine.run_dir / "checkpoints" / "step-00000004"
    file = checkpoint / ("model.safetensors" if case == "target" else "ema.safetensors")
    config = write_config(tmp_path / "config.yaml", values)
    output = tmp_path / "results.json"
    arguments = ["evaluate", "--weights", f"x={checkpoint}", f"y={file}", "--data", str(config), "--json", str(output)]
    monkeypatch.setattr(sys, "argv", ["mcir", *arguments])
    with pytest.raises(SystemExit, match="0"):
        main()
    content = json.loads(output.read_text())
    results = content["results"]["held"]
    events = EventAccumulator(str(engine.run_dir / "tensorboard")).Reload()
    for name in ("x", "y"):
        measured = results[name]["mean"]
        for metric in ("psnr", "ssim"):
            logged = events.Scalars(f"validation/held/{metric}")[-1]
            assert logged.step == 4
            assert logged.value == np.float32(measured[metric])  # TensorBoard keeps 24 bits
        assert len(results[name]["images"]) == 5
    best, which = json.loads((checkpoint / "state.json").read_text())["best"]
    assert which == "step-00000004"  # so that this is the value of the same weights, with all its digits
    assert results["x"]["mean"]["psnr"] == best


def test_a_set_degraded_from_a_column_of_its_source(tmp_path):
    """The column holds the clean images' complements, so that d = 1 - red."""
    source = {
        "format": "parquet",
        "path": str(write_dataset(tmp_path / "data", num_rows=2, num_shards=1, extra=("depth",))),
    }
    haze = {"name": "haze", "beta": 1.4, "airlight": 0.9, "depth": "depth"}
    data = ValidationSet(source=source, degradation=haze, protocol="rgb")
    for row in data.open():
        degraded, clean = pair_of(row, data, 1, torch.device("cpu"))
        t = torch.exp(-1.4 * (1 - clean[:, :1]))
        torch.testing.assert_close(degraded, clean * t + 0.9 * (1 - t), atol=0.501 / 255, rtol=0)
    missing = ValidationSet(source=source, degradation=haze | {"depth": "d"}, protocol="rgb")
    config = ValidationConfig(every=1, sets={"hazy": missing})
    field = r"validation\.sets\.hazy\."
    with pytest.raises(UserError, match=rf"^{field}source\.path: .*no column d, which {field}degradation names"):
        try_first(config, 1, torch.device("cpu"))
