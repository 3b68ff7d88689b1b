"""The watch on two gloo processes: both see what one sees, stop after the same step, and name a checkpoint from before
the trouble."""

import json
from pathlib import Path

import pytest

from mcir.train.checkpoint import damage, is_healthy
from tests.distributed.launch import ROOT, run, write_config
from tests.runs import tiny_config


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, str, list[dict]]:
    folder = tmp_path_factory.mktemp("watch")
    values = tiny_config(folder, name="contrastive", steps=60, checkpoint={"every": 2}, tracking={"log_every": 30})
    values["objective"]["contrast"] |= {"negatives": [{"update_every": 5, "start": 0.1}]}
    values["watch"] = {"patience": 12}
    contrastive = write_config(folder / "contrastive.yaml", values)
    held = {"source": values["data"]["train"][0]["source"], "degradation": {"name": "bicubic", "scale": 2}}
    values |= {
        "name": "plain",
        "steps": 200,
        "objective": {"reconstruction": {"name": "mse"}, "contrast": None},
        "tracking": {"log_every": 10},
    }
    values["checkpoint"] = {"every": 5}
    values["validation"] = {"every": 10, "weights": "ema", "sets": {"held": held | {"protocol": "sr"}}}
    values["optim"]["optimizer"]["lr"] = 1e-4
    values["watch"] |= {"max_drop": 3}
    plain = write_config(folder / "plain.yaml", values)
    script = str(ROOT / "tests" / "distributed" / "inspect_watch.py")
    process = run("ddp_cpu", str(folder), str(contrastive), str(plain), script=script)
    assert process.returncode == 0, process.stdout
    return folder / "runs", process.stdout, [json.loads((folder / f"rank{i}.json").read_text()) for i in range(2)]


def test_a_contrast_that_runs_away_stops_both_and_what_was_before_is_named(ended):
    runs, _, (first, second) = ended
    assert first["runaway"] == second["runaway"]
    told = first["runaway"]["said"]
    print(f"\n{told}")
    assert "since step 7 it has lowered the loss by more than 1 of" in told
    good = runs / "contrastive" / "checkpoints" / "step-00000006"
    assert f"go on from {good}, saved before that" in told
    assert "left alone after step 18;" in told  # 12 steps of patience; read at step 30
    assert first["runaway"]["step"] == 30
    assert is_healthy(good)
    assert damage(good) is None
    # what is gone on with has the means, and the weights, of before
    assert first["again"]["weights"] == first["good"]["weights"]
    assert first["again"]["state"] == first["good"]["state"]
    assert first["good"]["state"]["watch.count"] == 6


def test_both_ranks_see_what_one_is_given(ended):
    runs, printed, (first, second) = ended
    assert first["one rank"] == second["one rank"]
    assert "step 120: the loss spiked in 1 steps, up to 5" in printed
    assert "the gradient norm spiked in 1 steps" in printed
    assert "while the training loss is in its usual band" in printed.partition("the loss has left its band")[0]
    told = first["one rank"]["said"]
    print(f"\n{told}")
    assert "the loss has left its band: since step 131 " in told
    assert "left alone after step 142" in told
    assert first["one rank"]["step"] == 150
    assert f"go on from {runs / 'plain' / 'checkpoints' / 'step-00000130'}, saved before that" in told
