"""What a study says of runs whose scores are known: numbers placed by hand, no training."""

import json

import numpy as np
import pytest
from PIL import Image

from mcir.errors import UserError
from mcir.evaluation.evaluate import Scores
from mcir.section import to_yaml
from mcir.study.plan import Plan, equal_steps, read_arms
from mcir.study.plots import curves_png, differences_png
from mcir.study.report import sentences, to_json, to_markdown
from mcir.study.results import collect
from mcir.study.statistics import seeds_needed
from mcir.train.scores import save
from tests.runs import tiny_config

NOISE = np.array([-0.01, 0.0, 0.01, 0.0, 0.0])
"""Of a seed, in dB: a standard deviation of 0.00707."""


@pytest.fixture
def plan(tmp_path):
    """Five seeds of four arms: `better` by 0.05 dB, `same` as plain but for noise, `failed` after one step."""
    source = {"format": "parquet", "path": "nowhere"}
    data = {"source": source, "degradation": {"name": "bicubic", "scale": 2}, "protocol": "sr"}
    metric = {"name": "import", "target": "somewhere:distance", "direction": "lower"}
    validation = {"every": 3, "sets": {"held": data}, "metrics": [metric]}
    (tmp_path / "base.yaml").write_text(to_yaml(tiny_config(tmp_path, validation=validation)))
    for name in ("plain", "better", "same", "failed"):
        (tmp_path / f"{name}.yaml").write_text(to_yaml({"ema_decay": 0.5}))
    names = [str(tmp_path / f"{name}.yaml") for name in ("plain", "better", "same", "failed")]
    arms = read_arms([str(tmp_path / "base.yaml")], [], names)
    plan = Plan(arms, 5, tmp_path / "out", None, equal_steps(arms, None))
    gains = {"plain": 0 * NOISE, "better": 0.05 + NOISE, "same": NOISE}
    for task in plan.tasks:
        if task.arm == "failed" and task.seed > 0:
            continue
        gain = gains[task.arm][task.seed] if task.arm in gains else 0.0
        for step, level in ((3, 29.0), (6, 30.0)):
            psnr = [level + task.seed / 10 + gain, level + 2 + task.seed / 10 + gain]
            values = {"psnr": psnr, "ssim": [0.9, 0.9], "distance": [0.3 - gain, 0.5 - gain]}
            save(task.run_dir, step, "target", {"held": Scores(["a", "b"], values)})
        state = "failed" if task.arm == "failed" else "finished"
        record = {"name": task.name, "state": state, "message": "it burst" if state == "failed" else None}
        record |= {"step": 6, "steps": 6, "best": None, "images_per_s": 10.0, "starts": [{}], "updated": None}
        (task.run_dir / "run.json").write_text(json.dumps(record))
        (task.run_dir / "cost.json").write_text(json.dumps([{"wall_s": 9, "cpu_s": 360, "processes": 1, "gpu": False}]))
    return plan


def test_differences_are_called_only_where_they_are_shown(plan):
    told = sentences(collect(plan))
    half = 2.776445 * np.std(NOISE, ddof=1) / np.sqrt(5)  # t of 4 degrees: any table
    interval = f"[{0.05 - half:+.3f}, {0.05 + half:+.3f}]"
    assert f"held, PSNR: `better` is better than `plain` by 0.050 dB {interval}." in told
    assert any("held, DISTANCE: `better` is better than `plain` by 0.0500" in line for line in told)  # lower is better
    assert "`same`: no difference is shown on held PSNR, held SSIM, held DISTANCE." in told
    assert not any("`same` is" in line for line in told)
    assert "`failed.seed0` is not in the tables: failed at step 6: it burst" in told
    assert "4 of 20 runs have not begun." in told


def test_the_tables_and_the_json_say_the_same(plan):
    results = collect(plan)
    text = to_markdown(results)
    spread = np.std(np.arange(5) / 10 + NOISE, ddof=1)
    assert f"|  | better | 5 | 31.250 ± {spread:.3f} | +0.050 [" in text
    assert "| DISTANCE ↓ |" in text
    assert "| plain | 5 of 5 | 6 | 10.0 | 0.5 |" in text
    content = json.loads(to_json(results, ["mcir", "study"]), parse_constant=pytest.fail)
    entry = next(e for e in content["results"] if (e["arm"], e["metric"]) == ("better", "psnr"))
    assert entry["difference"]["mean"] == pytest.approx(0.05)
    assert entry["difference"]["p_signs"] == pytest.approx(2 / 32)
    assert entry["seeds_for_0.02_db"] == seeds_needed(np.std(NOISE, ddof=1), 0.02)
    assert entry["difference"]["is_shown"] is True
    failed = next(run for run in content["runs"] if run["name"] == "failed.seed0")
    assert (failed["state"], failed["message"], failed["scores"]) == ("failed", "it burst", {})


@pytest.mark.parametrize("content", ['[{"wall_s": 9, "gpu": false}]', "[9]", "9", "[{"])
def test_a_file_of_costs_that_does_not_say_them_is_named(plan, content):
    file = plan.tasks[0].run_dir / "cost.json"
    file.write_text(content)
    with pytest.raises(UserError, match=rf"{file}: does not say wall_s, cpu_s and gpu of each start; restore it or"):
        collect(plan)


def test_the_plots_are_pictures(plan, tmp_path):
    for name, draw in (("d", differences_png), ("c", curves_png)):
        (tmp_path / f"{name}.png").write_bytes(draw(collect(plan)))
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
