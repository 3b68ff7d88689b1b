"""The scores that a run leaves are those of its weights, and read back equal."""

import json
import math

import pytest
from accelerate import Accelerator
from safetensors import safe_open

from mcir.config import validate
from mcir.errors import UserError
from mcir.evaluation.evaluate import Scores, evaluate
from mcir.restoration.inference import infer
from mcir.train.engine import build_engine
from mcir.train.scores import load, save
from mcir.weights.trained import open_trained
from tests.runs import tiny_config, write_dataset


def test_each_validation_leaves_its_scores(tmp_path):
    source = {"format": "parquet", "path": str(write_dataset(tmp_path / "heldout", num_rows=3, num_shards=1))}
    sets = {"heldout": {"source": source, "degradation": {"name": "bicubic", "scale": 2}, "protocol": "sr"}}
    config = validate(tiny_config(tmp_path, validation={"every": 4, "sets": sets}), "tiny")
    engine = build_engine(config)
    assert engine.fit() == 0
    found = load(engine.run_dir, config.steps)
    assert list(found) == [4, 6]

    weights = engine.run_dir / "checkpoints" / "step-00000006" / "ema.safetensors"
    (trained,), accelerator = open_trained([str(weights)]), Accelerator()
    net = trained.net_on(accelerator.device)
    assert config.validation is not None
    expected, _ = evaluate(
        lambda degraded: infer(net, trained.arch.descriptor, degraded),
        config.validation.sets["heldout"],
        2,
        accelerator,
    )
    assert found[6]["heldout"] == expected
    with safe_open(weights, "pt") as handle:
        measured = json.loads(handle.metadata()["metrics"])
    assert measured["heldout/psnr (ema)"] == pytest.approx(found[6]["heldout"].mean()["psnr"], abs=1e-4)
    assert trained.metadata["step"] == "6"


def test_scores_read_back_equal(tmp_path):
    scores = {"a": Scores(["x", "y"], {"psnr": [30.123456789012345, math.inf], "ssim": [0.9, 1.0]})}
    save(tmp_path, 20, "ema", {"a": Scores(["z"], {"psnr": [1.0]})})
    save(tmp_path, 20, "ema", scores)  # trained again after a resume
    save(tmp_path, 40, "ema", scores)
    assert load(tmp_path, 20) == {20: scores}
    file = tmp_path / "validation" / "step-00000040.json"
    json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    file.write_text('{"step": 40')
    with pytest.raises(UserError, match=r"step-00000040\.json: is no record of a validation"):
        load(tmp_path, 40)
