"""Whatever the user points at becomes the network and the weights that it means, or a sentence."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from mcir.archs import build, parse
from mcir.errors import UserError
from mcir.weights.files import save_weights
from mcir.weights.trained import checksum, default_name, open_trained
from tests.distributed.launch import write_config
from tests.runs import tiny_config

ARCH = {"name": "edsr", "scale": 2, "num_features": 4, "num_blocks": 1}


def save(file: Path, value: float, **metadata) -> Path:
    """Weights that are `value` everywhere, so that they can be told apart."""
    file.parent.mkdir(parents=True, exist_ok=True)
    net = build(ARCH)
    tensors = {name: torch.full_like(tensor, value) for name, tensor in net.state_dict().items()}
    save_weights(file, tensors, {"arch": json.dumps(ARCH), **metadata})
    return file


def value(trained) -> float:
    values = {float(v) for parameter in trained.net.parameters() for v in parameter.detach().aminmax()}
    assert len(values) == 1
    return values.pop()


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run of three checkpoints, the second the best, with an EMA."""
    for step in (1, 2, 3):
        folder = tmp_path / "runs" / "spn" / "checkpoints" / f"step-{step:08d}"
        save(folder / "model.safetensors", step, step=str(step))
        save(folder / "ema.safetensors", step + 0.5, step=str(step))
        (folder / "state.json").write_text(json.dumps({"best": [30.0, "step-00000002"]}))
    return tmp_path / "runs" / "spn"


def test_a_run_means_its_best_checkpoint(run_dir):
    trained = open_trained([str(run_dir)])[0]
    assert (value(trained), trained.name, trained.metadata["step"]) == (2.5, "spn", "2")
    assert trained.arch == parse(ARCH)
    assert not trained.net.training
    assert value(open_trained([str(run_dir)], "target")[0]) == 2


def test_a_checkpoint_and_a_file_mean_themselves(run_dir):
    first = run_dir / "checkpoints" / "step-00000001"
    places = [str(first), f"named={first / 'model.safetensors'}"]
    opened = open_trained(places)
    assert [(value(trained), trained.name) for trained in opened] == [(1.5, "spn-step-00000001"), (1, "named")]
    assert default_name(first / "model.safetensors") == "spn-step-00000001-model"


def test_raw_weights_where_the_run_validates_them(tmp_path):
    config = json.dumps({"validation": {"weights": "target"}})
    save(tmp_path / "model.safetensors", 1, config=config)
    save(tmp_path / "ema.safetensors", 2, config=config)
    assert value(open_trained([str(tmp_path)])[0]) == 1
    assert value(open_trained([str(tmp_path)], "ema")[0]) == 2


def test_a_damaged_file_is_refused(tmp_path):
    file = save(tmp_path / "model.safetensors", 1)
    manifest = {"model.safetensors": {"bytes": 1, "sha256": checksum(file)}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert open_trained([str(tmp_path)])[0].sha256 == checksum(file)
    save(file, 2)
    with pytest.raises(UserError, match="is damaged"):
        open_trained([str(tmp_path)])


def test_published_files_are_opened_with_a_description(tmp_path):
    tensors = {name: torch.full_like(tensor, 3.0) for name, tensor in build(ARCH).state_dict().items()}
    averaged = {name: torch.full_like(tensor, 4.0) for name, tensor in tensors.items()}
    torch.save({"params": tensors, "params_ema": averaged}, tmp_path / "both.pth")
    torch.save({"params": tensors}, tmp_path / "raw.pth")
    both, raw, arch = str(tmp_path / "both.pth"), str(tmp_path / "raw.pth"), json.dumps(ARCH)
    assert value(open_trained([both], archs=[arch])[0]) == 4
    assert value(open_trained([both], "target", [arch])[0]) == 3
    config = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", arch=ARCH))
    opened = open_trained([both, raw], archs=[arch, str(config)])
    assert [(value(trained), trained.name) for trained in opened] == [(4, "both"), (3, "raw")]
    assert [value(trained) for trained in open_trained([both, raw], archs=[arch])] == [4, 3]
    for archs, kind, message in (
        ([], None, "does not say what network it is of; give --arch"),
        ([arch], "ema", "raw.pth: holds no averaged weights"),
        ([arch, arch, arch], None, "one for all 2 such files"),
        (["{name: edsr, scale: 7}"], None, "scale"),
        (["nothing.yaml"], None, "neither a config file nor a mapping"),
    ):
        with pytest.raises(UserError, match=message):
            open_trained([both, raw], kind, archs)


@pytest.mark.parametrize(
    ("make", "kind", "archs", "message"),
    [
        (lambda p: None, None, [], "no such weights file"),
        (lambda p: p.mkdir(), None, [], "neither a run directory, a checkpoint nor an export"),
        (lambda p: (p / "checkpoints").mkdir(parents=True), None, [], "no checkpoint yet"),
        (lambda p: (p / "checkpoints" / "step-00000001").mkdir(parents=True), None, [], "is damaged"),
        (lambda p: save(p / "model.safetensors", 1), "ema", [], "has no ema.safetensors"),
        (lambda p: save(p / "model.safetensors", 1), None, ["{name: idt}"], "--arch: all weights files describe"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, make, kind, archs, message):
    make(tmp_path / "place")
    with pytest.raises(UserError, match=message):
        open_trained([str(tmp_path / "place")], kind, archs)


def test_names_must_differ(tmp_path):
    file = save(tmp_path / "a.safetensors", 1)
    with pytest.raises(UserError, match="two weights are called a"):
        open_trained([str(file), str(file)])


def test_the_newest_in_place_of_a_best_that_is_gone_is_said(run_dir, caplog):
    with caplog.at_level(logging.WARNING):
        open_trained([str(run_dir)])
        assert not caplog.text
        shutil.rmtree(run_dir / "checkpoints" / "step-00000002")
        assert value(open_trained([str(run_dir)])[0]) == 3.5
    assert "its best checkpoint, step-00000002, is gone: step-00000003, the newest, is taken" in caplog.text


@pytest.mark.parametrize("state", ["[]", "7", '{"best": 5}', '{"best": [30.0]}', '{"best": [30.0, 5]}', "{"])
def test_a_state_that_names_no_best_checkpoint_is_damaged(run_dir, state):
    (run_dir / "checkpoints" / "step-00000003" / "state.json").write_text(state)
    with pytest.raises(UserError, match=r"step-00000003: is damaged"):
        open_trained([str(run_dir)])
