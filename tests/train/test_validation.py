"""Several sets in one run: each is shown, and together they may decide which checkpoint is best."""

import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mcir.cli import main
from mcir.config import validate
from mcir.errors import UserError
from mcir.train.engine import build_engine
from tests.distributed.launch import write_config
from tests.runs import tiny_config, write_dataset

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


def test_no_set_is_called_as_their_mean(tmp_path):
    values = tiny_config(tmp_path)
    sets = several_sets(tmp_path)
    values["validation"] = {"every": 1, "sets": {"mean": sets["held"]}}
    with pytest.raises(UserError, match=r"validation\.sets\.mean: that name is for the mean"):
        validate(values, "run")
