"""Several sets in one run: each is shown, and together they may decide which checkpoint is best."""

import json
import os
import signal
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mcir.cli import main
from mcir.config import validate
from mcir.errors import UserError
from mcir.train.engine import build_engine
from tests.distributed.launch import write_config
from tests.runs import png, tiny_config, write_dataset

BICUBIC = {"name": "bicubic", "scale": 2}


def several_sets(folder):
    held = write_dataset(folder / "held", num_rows=3, num_shards=1)
    other = write_dataset(folder / "other", num_rows=2, num_shards=1, side=48)
    return {
        name: {"source": {"format": "parquet", "path": str(path)}, "degradation": BICUBIC, "protocol": "sr"}
        for name, path in (("held", held), ("other", other))
    }


def test_the_best_checkpoint_of_several_sets_and_what_is_published_of_them(tmp_path, monkeypatch, capsys):
    values = tiny_config(tmp_path, steps=2)
    sets = several_sets(tmp_path)
    sets["other"]["published"] = {"plain": [26.04, 0.7849], "+SPN": [26.12, 0.7878]}
    values["validation"] = {"every": 1, "sets": sets, "best": "mean/psnr"}
    engine = build_engine(validate(values, "run"))
    engine.fit()
    events = EventAccumulator(str(engine.run_dir / "tensorboard")).Reload()
    held, other, mean = (events.Scalars(f"validation/{name}/psnr") for name in ("held", "other", "mean"))
    for a, b, both in zip(held, other, mean, strict=True):
        assert both.value == pytest.approx((a.value + b.value) / 2, rel=1e-6)
    assert engine.state.best[0] == pytest.approx(max(value.value for value in mean), rel=1e-6)
    shown = capsys.readouterr().out
    assert "step 2: the average of the weights is 2 steps old" in shown
    assert "2 sets" in shown  # the row of the mean in the last table

    config = write_config(tmp_path / "config.yaml", values)
    arguments = ["evaluate", "--weights", str(engine.run_dir), "--data", str(config), "--published"]
    monkeypatch.setattr(sys, "argv", ["mcir", *arguments, "--json", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "published: +SPN" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["sets"]["other"]["published"]["plain"] == [26.04, 0.7849]
    monkeypatch.setattr(sys, "argv", ["mcir", *arguments, "--protocol", "rgb"])  # other numbers than the published ones
    with pytest.raises(SystemExit, match=r"[^0]"):
        main()
    assert "no set holds published results" in capsys.readouterr().err


def test_the_closing_table_and_pictures_are_of_images_that_both_could_restore(tmp_path, capsys):
    """The first image is the only one of its size, and too large for the network."""
    (tmp_path / "held").mkdir()
    rng = np.random.default_rng(0)
    for name, side in (("a", 48), ("b", 32), ("c", 32)):
        pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
        (tmp_path / "held" / f"{name}.png").write_bytes(png(pixels))
    values = tiny_config(tmp_path, steps=1, tracking={"num_images": 2})
    held = {"source": {"format": "folders", "clean": str(tmp_path / "held")}, "degradation": BICUBIC, "protocol": "sr"}
    values["validation"] = {"every": 1, "sets": {"held": held}}
    engine = build_engine(validate(values, "run"))
    restore = engine.validation.restore

    def small_ones(degraded, *others):
        if degraded.shape[-1] > 16:
            raise UserError("too large")
        return restore(degraded, *others)

    engine.validation.restore = small_ones
    assert engine.fit() == 0
    assert (engine.run_dir / "held.png").exists()
    assert engine.state.measured["held/psnr (ema)"] > 0
    shown = capsys.readouterr().out
    assert "held without 1 images, the first: too large" in shown
    (tmp_path / "held" / "a.png").unlink()
    other = build_engine(validate(values, "run"))
    other.fit()
    assert row_of("held", capsys.readouterr().out) == row_of("held", shown)  # bicubic's mean is of the same two


def row_of(name, shown):
    return [line.split()[1:] for line in shown.splitlines() if line.strip("│ ").startswith(f"{name} ")][-1]


def test_a_stop_does_not_wait_for_a_validation_which_the_next_start_makes(tmp_path):
    values = tiny_config(tmp_path, steps=6)
    values["validation"] = {"every": 2, "sets": {"held": several_sets(tmp_path)["held"]}}
    whole = build_engine(validate(values | {"name": "whole"}, "run"))
    whole.fit()
    stopped = build_engine(validate(values, "run"))
    step = stopped.step

    def signalled(batches):
        if stopped.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batches)

    stopped.step = signalled
    assert (stopped.fit(), stopped.state.step) == (75, 4)
    scores = [engine.run_dir / "validation" / "step-00000004.json" for engine in (whole, stopped)]
    assert not scores[1].exists()
    resumed = build_engine(validate(values, "run"), resume="auto")
    assert resumed.fit() == 0
    assert scores[1].read_text() == scores[0].read_text()
    assert resumed.state.best == whole.state.best


def test_super_resolution_noise_and_haze_in_one_run(tmp_path, capsys):
    """Each source has its curves, whose mean, weighted by its share, is that of the run."""
    values = tiny_config(tmp_path, steps=6, arch={"name": "nafnet", "width": 4, "num_encoder_blocks": [1, 1]})
    source = values["data"]["train"][0]["source"]
    values["arch"] |= {"num_middle_blocks": 1, "num_decoder_blocks": [1, 1]}
    degradations = [
        ("noise", {"name": "noise", "sigma": 50}), ("haze", {"name": "haze"}), ("x4", {"name": "low_resolution"}),
    ]  # fmt: skip
    values["data"]["train"] = [
        {"source": source, "degradation": degradation, "label": label, "weight": 1 + (label == "haze")}
        for label, degradation in degradations
    ]
    values["objective"]["reconstruction"] = [{"name": "l1"}, {"name": "fft", "weight": 0.1}]
    values["tracking"] = {"log_every": 3}
    engine = build_engine(validate(values, "run"))
    engine.fit()
    events = EventAccumulator(str(engine.run_dir / "tensorboard")).Reload()

    def curve(tag):
        return [point.value for point in events.Scalars(tag)]

    parts = ("share", "loss", "psnr")
    curves = {label: [curve(f"source/{label}/{part}") for part in parts] for label, _ in degradations}
    whole = curve("loss/reconstruction")
    for step, loss in enumerate(whole):
        assert sum(share[step] for share, _, _ in curves.values()) == pytest.approx(1)
        assert sum(share[step] * losses[step] for share, losses, _ in curves.values()) == pytest.approx(loss, rel=1e-5)
        terms = [curve(f"loss/reconstruction/{name}")[step] for name in ("l1", "fft")]
        assert sum(terms) == pytest.approx(loss, rel=1e-5)
    assert all(5 < value < 60 for _, _, psnr in curves.values() for value in psnr)
    shown = capsys.readouterr().out
    assert all(label in shown.split("share of samples")[1] for label, _ in degradations)


def test_two_sources_of_one_label(tmp_path):
    values = tiny_config(tmp_path)
    (source,) = values["data"]["train"]
    values["data"]["train"] = [source | {"label": "a"}, source | {"label": "a"}]
    with pytest.raises(UserError, match="two sources are labelled a"):
        validate(values, "run")


def test_no_set_is_called_as_their_mean(tmp_path):
    values = tiny_config(tmp_path)
    sets = several_sets(tmp_path)
    values["validation"] = {"every": 1, "sets": {"mean": sets["held"]}}
    with pytest.raises(UserError, match=r"validation\.sets\.mean: that name is for the mean"):
        validate(values, "run")
