"""Whose run a directory is, when it appears, and who may write in it."""

import json
import os
import subprocess
import sys

import pytest

from mcir.config import validate
from mcir.errors import UserError
from mcir.train import lock
from mcir.train.checkpoint import damage
from mcir.train.engine import build_engine
from mcir.train.record import FILE, hostname
from tests.runs import tiny_config


def build(folder, resume="never", **overrides):
    values = tiny_config(folder, objective={"spn": None}, ema_decay=None) | overrides
    return build_engine(validate(values, "test"), resume)


def saved(folder, name):
    return sorted(path.name for path in (folder / "runs" / name / "checkpoints").glob("step-*"))


def test_another_experiment_with_a_number_in_its_name_is_left_alone(tmp_path, capsys):
    for name in ("exp", "exp-2"):
        build(tmp_path, name=name, steps=3).fit()
    other = (tmp_path / "runs" / "exp-2" / FILE).read_text()
    resumed = build(tmp_path, "auto", name="exp", steps=4, checkpoint={"keep_last": 1})
    assert (resumed.run_dir.name, resumed.state.step) == ("exp", 3)
    assert "exp/checkpoints/step-00000003, step 3 of 4" in capsys.readouterr().out
    resumed.fit()
    assert saved(tmp_path, "exp") == ["step-00000004"]
    assert saved(tmp_path, "exp-2") == ["step-00000003"]
    assert (tmp_path / "runs" / "exp-2" / FILE).read_text() == other
    with pytest.raises(UserError, match=r"a run of exp-2, and this config's name is exp: set name=exp-2"):
        build(tmp_path, str(tmp_path / "runs" / "exp-2"), name="exp")
    assert build(tmp_path, name="exp").run_dir.name == "exp-3"


def test_a_start_that_fails_leaves_no_directory_and_costs_no_checkpoint(tmp_path, capsys):
    build(tmp_path, steps=3).fit()
    before = (tmp_path / "runs" / "tiny" / FILE).read_text()
    with pytest.raises(UserError, match=r"typo\.pth"):
        build(tmp_path, init_from="typo.pth")
    with pytest.raises(UserError, match="has another shape"):
        build(tmp_path, "auto", arch={"name": "edsr", "scale": 2, "num_features": 5, "num_blocks": 2})
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]
    assert (tmp_path / "runs" / "tiny" / FILE).read_text() == before  # finished, and it stays so
    with pytest.raises(UserError, match="no more disk"), build(tmp_path).record:
        raise UserError("no more disk")  # after it began, before it saved
    capsys.readouterr()
    resumed = build(tmp_path, "auto", steps=3)
    assert (resumed.run_dir.name, resumed.state.step) == ("tiny", 3)
    assert "tiny-2 failed before its first checkpoint: passed over" in capsys.readouterr().out
    assert resumed.fit() == 0
    assert "nothing is left to do, 3 of 3 steps are made" in capsys.readouterr().out


def test_a_refused_resume_leaves_a_finished_run_as_it_is(tmp_path):
    values = tiny_config(tmp_path, steps=2)
    run_dir = tmp_path / "runs" / "tiny"
    assert build_engine(validate(values, "test")).fit() == 0
    before = {name: (run_dir / name).read_bytes() for name in (FILE, "config.yaml")}
    with pytest.raises(UserError, match="order of the samples"):
        build_engine(validate(values | {"steps": 4, "seed": 7}, "test"), resume="auto")
    assert {name: (run_dir / name).read_bytes() for name in before} == before


def test_what_a_run_began_from_may_be_gone_when_it_goes_on(tmp_path):
    first = build(tmp_path, name="first", steps=1)
    first.fit()
    weights = tmp_path / "weights.safetensors"
    (first.run_dir / "checkpoints/step-00000001/model.safetensors").rename(weights)
    build(tmp_path, steps=1, init_from=str(weights)).fit()
    weights.unlink()
    resumed = build(tmp_path, "auto", steps=2, init_from=str(weights))
    assert (resumed.state.step, resumed.fit()) == (1, 0)


def test_a_run_begun_from_another_s_checkpoint_has_no_best_yet(tmp_path):
    """That one's names a directory of its own."""
    sets = {"held": {"source": {"format": "parquet", "path": str(tmp_path / "data")}, "protocol": "sr"}}
    sets["held"]["degradation"] = {"name": "bicubic", "scale": 2}
    first = build(tmp_path, steps=2, validation={"every": 1, "sets": sets})
    first.fit()
    assert first.state.best is not None
    checkpoint = str(first.run_dir / "checkpoints" / "step-00000002")
    second = build(tmp_path, checkpoint, steps=3, validation={"every": 1, "sets": sets})
    assert (second.state.step, second.state.best) == (2, None)
    second.fit()
    assert second.state.best is not None
    assert (second.run_dir / "checkpoints" / second.state.best[1]).exists()


def test_a_finished_run_stays_as_it_is_whatever_it_is_resumed_with(tmp_path):
    run_dir = tmp_path / "runs" / "tiny"
    assert build(tmp_path, steps=2).fit() == 0
    config, record = (run_dir / "config.yaml").read_bytes(), json.loads((run_dir / FILE).read_text())
    assert build(tmp_path, "auto", steps=2, tracking={"log_every": 1}, seed=0).fit() == 0
    assert (run_dir / "config.yaml").read_bytes() == config
    assert json.loads((run_dir / FILE).read_text()) | {"updated": record["updated"]} == record


@pytest.mark.parametrize("number", [0, 2, 4])
def test_another_number_of_negatives_is_refused(tmp_path, number):
    """Three are saved: fewer would be lost, and more would begin nowhere."""
    values = tiny_config(tmp_path, steps=2)
    assert build_engine(validate(values, "test")).fit() == 0
    contrast = values["objective"]["contrast"]
    contrast["negatives"] = [*contrast["negatives"], {"update_every": 7}][:number]
    with pytest.raises(UserError, match=rf"holds 3 negatives, and objective\.contrast\.negatives {number}: change"):
        build_engine(validate(values | {"steps": 4}, "test"), resume="auto")


def test_a_directory_that_does_not_say_whose_it_is_is_asked_about(tmp_path):
    engine = build(tmp_path, steps=3)
    engine.fit()
    (engine.run_dir / FILE).write_text("{")
    assert build(tmp_path, "auto").state.step == 3  # config.yaml says it
    (engine.run_dir / FILE).write_text("{")
    (engine.run_dir / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"neither its run.json nor its config.yaml .* give --resume"):
        build(tmp_path, "auto")
    assert build(tmp_path, str(engine.run_dir)).state.step == 3


def test_every_start_keeps_its_config(tmp_path):
    build(tmp_path, steps=3).fit()
    build(tmp_path, "auto", steps=4, optim={"optimizer": {"name": "adam", "lr": 1e-5}}).fit()
    starts = json.loads((tmp_path / "runs" / "tiny" / FILE).read_text())["starts"]
    assert [start["config"]["optim"]["optimizer"]["lr"] for start in starts] == [1e-3, 1e-5]
    assert [start["config"]["steps"] for start in starts] == [3, 4]


def claim(run_dir, **values):
    (run_dir / lock.FILE).write_text(json.dumps(lock._claim() | values))


def test_a_second_start_is_refused_while_the_first_lives(tmp_path):
    engine = build(tmp_path, steps=3)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        claim(engine.run_dir, pid=child.pid, started=lock._started(child.pid), token="another")
        record = (engine.run_dir / FILE).read_text()
        said = f"being written by process {child.pid} on {hostname()}"
        with pytest.raises(UserError, match=said):
            build(tmp_path, "auto")
        with pytest.raises(UserError, match=f"process {child.pid} on {hostname()} .* has taken"):  # it writes no more
            engine.fit()
        assert (engine.run_dir / FILE).read_text() == record
        assert saved(tmp_path, "tiny") == []
        assert build(tmp_path).run_dir.name == "tiny-2"
    finally:
        child.communicate(b"\n")
    assert build(tmp_path, "auto", name="tiny").run_dir.name == "tiny-2"
    again = build(tmp_path, str(engine.run_dir), steps=3)  # the owner has ended: at once
    assert again.fit() == 0
    assert damage(again.run_dir / "checkpoints" / "step-00000003") is None
    assert not (again.run_dir / lock.FILE).exists()


def test_a_claim_of_another_machine_counts_while_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_S", 2.0)
    claim(tmp_path, host="elsewhere", boot="another", token="another")
    stale = lock.acquire(tmp_path)  # nobody touched it
    assert stale.taken_over_by() is None
    stale.release()
    claim(tmp_path, host="elsewhere", boot="another", token="another")
    touch = f"import os, time\nfor _ in range(40): os.utime({str(tmp_path / lock.FILE)!r}); time.sleep(0.2)"
    child = subprocess.Popen([sys.executable, "-c", touch])
    try:
        with pytest.raises(UserError, match=r"by process .* on elsewhere"):
            lock.acquire(tmp_path)
    finally:
        child.kill()
        child.wait()


def test_of_two_starts_that_find_a_stale_claim_one_goes_on(tmp_path, monkeypatch):
    claim(tmp_path, pid=0, started=None, token="dead")
    settled = lock.time.sleep

    def another_claims_meanwhile(seconds):
        claim(tmp_path, pid=os.getppid(), token="faster")
        settled(seconds)

    monkeypatch.setattr(lock.time, "sleep", another_claims_meanwhile)
    with pytest.raises(UserError, match=f"by process {os.getppid()}"):
        lock.acquire(tmp_path)


def test_two_new_starts_of_one_name_get_a_directory_each(tmp_path, monkeypatch):
    """The second chooses its name before the first has made its directory."""
    from mcir.train import runs

    monkeypatch.setattr(runs, "_choose", lambda base, *_: (base, None))
    assert build(tmp_path).run_dir.name == "tiny"
    monkeypatch.setattr(runs.Path, "exists", lambda path: False)
    assert build(tmp_path).run_dir.name == "tiny-2"


def test_a_best_of_another_metric_or_set_starts_anew(tmp_path):
    held = {"degradation": {"name": "bicubic", "scale": 2}, "protocol": "sr"}
    held["source"] = tiny_config(tmp_path)["data"]["train"][0]["source"]
    sets = {"held": held, "other": held}

    def best(steps, **validation):
        engine = build(tmp_path, "auto", steps=steps, validation={"every": 1, "sets": sets} | validation)
        taken_over = engine.state.best
        engine.fit()
        return taken_over, json.loads((engine.run_dir / FILE).read_text())["best"]

    _, first = best(2)
    assert best(3)[0][0] >= first["value"]  # goes on
    taken_over, ssim = best(4, best="held/ssim")
    assert taken_over is None
    assert ssim["metric"] == "held/ssim"
    assert ssim["value"] < 1
    assert best(5, best="other/ssim")[0] is None
    assert best(6, best="other/ssim", sets=sets | {"other": held | {"protocol": "rgb"}})[0] is None
