import math

import pytest
import torch
from safetensors.torch import load_file

from mcir.config import validate
from mcir.errors import UserError
from mcir.train.config import WatchConfig
from mcir.train.engine import build_engine
from mcir.train.watch import Watch
from tests.runs import tiny_config


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value)


def calm(watch: Watch, steps: int) -> None:
    """A loss that falls and jitters by a tenth, a gradient norm that varies twofold."""
    for step in range(1, steps + 1):
        loss = (0.05 + 0.2 / step) * (1 + 0.1 * math.sin(step))
        watch.see(step, scalar(loss), scalar(-0.1 * loss), scalar(2 ** math.sin(7 * step)))


def test_an_ordinary_run_is_left_alone(tmp_path):
    watch = Watch(WatchConfig(), torch.device("cpu"))
    calm(watch, 1000)
    scalars, said = watch.report(tmp_path)
    assert said is None
    assert set(scalars.values()) == {0}
    assert not watch.in_trouble
    # the running mean is that of the last hundred steps or so
    assert float(watch.mean[0]) == pytest.approx(0.05, rel=0.05)


def test_a_spike_is_told_with_its_numbers_and_changes_little(tmp_path):
    watch = Watch(WatchConfig(), torch.device("cpu"))
    calm(watch, 300)
    usual = watch.mean.clone()
    watch.see(301, scalar(5.0), scalar(-0.005), scalar(1e4))
    scalars, said = watch.report(tmp_path)
    assert scalars == {"watch/loss_spikes": 1, "watch/grad_norm_spikes": 1}
    assert "up to 5 (usually 0.05" in said
    assert "gradient norm spiked in 1 steps, up to 1e+04" in said
    assert float((watch.mean - usual)[0]) < 0.05 * float(usual[0])
    assert watch.report(tmp_path)[1] is None


def test_a_loss_that_is_negative_has_a_band_too(tmp_path):
    """-PSNR that falls from 30 to 5 dB for good."""
    watch = Watch(WatchConfig(), torch.device("cpu"))
    for step in range(1, 201):
        watch.see(step, scalar(-30 + math.sin(step)), None, scalar(1.0))
    for step in range(201, 221):
        watch.see(step, scalar(-5.0), None, scalar(1.0))
    with pytest.raises(UserError, match=r"since step 201 .* more than 10 deviations.*at step 220 it was -5, usu"):
        watch.report(tmp_path)


def test_a_contrast_that_is_pulled_down_by_more_is_no_runaway(tmp_path):
    """CCR's is five times the L1 beside it, positive and bounded."""
    watch = Watch(WatchConfig(patience=1), torch.device("cpu"))
    for step in range(1, 30):
        watch.see(step, scalar(0.05), scalar(0.25), scalar(1.0))
    watch.report(tmp_path)
    watch.see(30, scalar(0.05), scalar(-0.051), scalar(1.0))
    with pytest.raises(UserError, match="the contrast has run away: since step 30"):
        watch.report(tmp_path)


def test_what_is_no_number_is_left_to_the_guard(tmp_path):
    watch = Watch(WatchConfig(patience=1), torch.device("cpu"))
    calm(watch, 200)
    before = {name: tensor.clone() for name, tensor in watch.state().items()}
    watch.see(201, scalar(math.nan), scalar(-1.0), scalar(math.nan))
    assert all(torch.equal(tensor, before[name]) for name, tensor in watch.state().items())
    watch.report(tmp_path)


def test_a_validation_that_collapses_is_told():
    watch = Watch(WatchConfig(max_drop=3), torch.device("cpu"))
    assert [watch.validated(psnr) for psnr in (20.0, 30.0, 27.5)] == [None] * 3
    assert "26.00 dB and was 30.00 dB" in watch.validated(26.0)


def test_a_contrast_that_runs_away_stops_the_run_with_its_weights_as_they_were(tmp_path):
    """A weight of 1e4: the log steps come long after the trouble, in which checkpoints are written."""
    values = tiny_config(tmp_path, steps=40, tracking={"log_every": 20}, checkpoint={"every": 2, "keep_last": 2})
    values["objective"]["contrast"]["weight"] = 1e4
    for schedule in values["objective"]["contrast"]["negatives"]:
        schedule["update_every"] = 5
    values["watch"] = {"patience": 8}
    engine = build_engine(validate(values, "runaway"))
    history = []
    step = engine.step

    def noted(batches):
        parts = step(batches)
        history.append([p.detach().clone() for p in engine.model.parameters()])
        return parts

    engine.step = noted
    with pytest.raises(UserError, match=r"since step 1 it has lowered .*no checkpoint is from before.*after step 8"):
        engine.fit()
    assert engine.state.step == 20
    assert all(torch.equal(a, b) for a, b in zip(history[7], history[-1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(history[6], history[7], strict=True))


def test_the_named_checkpoint_is_from_before_the_trouble(tmp_path):
    values = tiny_config(tmp_path, steps=4, checkpoint={"every": 2, "keep_last": 2}, tracking={"log_every": 1})
    good = build_engine(validate(values, "good"))
    assert good.fit() == 0
    values |= {"steps": 40, "watch": {"patience": 8}}
    values["objective"]["contrast"]["weight"] = 1e4
    bad = build_engine(validate(values, "bad"), resume="auto")
    with pytest.raises(UserError, match=r"go on from .*step-00000004, saved before that"):
        bad.fit()
    states = sorted(path.name for path in (bad.run_dir / "checkpoints").glob("step-*"))
    assert "step-00000004" in states
    followed = load_file(bad.run_dir / "checkpoints" / "step-00000004" / "followed.safetensors")
    assert float(followed["watch.count"]) == 4
