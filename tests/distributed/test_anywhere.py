"""Two processes begin from weights of the Hub, which one of them fetches, and leave a checkpoint in a store, from which
one process goes on."""

import json
import shutil

from mcir.archs import parse
from mcir.config import load
from mcir.train.engine import build_engine
from mcir.weights.files import save_weights
from tests import hub
from tests.distributed.launch import run, write_config
from tests.runs import tiny_config


def test_weights_and_checkpoints_from_elsewhere(tmp_path, monkeypatch):
    values = tiny_config(tmp_path, steps=4)
    values |= {"init_from": "hf://owner/name@main", "checkpoint": {"every": 2, "to": str(tmp_path / "store")}}
    arch, model = parse(values["arch"]), tmp_path / "hub/models/owner/name/model.safetensors"
    model.parent.mkdir(parents=True)
    save_weights(model, arch.build().state_dict(), {"arch": arch.model_dump_json()})
    config = write_config(tmp_path / "config.yaml", values)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with hub.serve(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        done = run("ddp_cpu", "train", str(config))
        assert done.returncode == 0, done.stdout
        assert server.num_files == 1
        missing = run("ddp_cpu", "train", str(config), "init_from=hf://owner/other", "name=other")
        assert missing.returncode != 0
        assert "mcir: hf://owner/other: the Hub has no repository owner/other" in missing.stdout
    (start,) = json.loads((tmp_path / "runs/tiny/run.json").read_text())["starts"]
    assert start["environment"]["init_from"] == f"hf://owner/name/model.safetensors@{hub.COMMIT}"
    saved = tmp_path / "runs/tiny/checkpoints/step-00000004"
    there = tmp_path / "store/tiny/step-00000004"
    here = {file.name: file.read_bytes() for file in saved.iterdir()}
    assert {file.name: file.read_bytes() for file in there.iterdir()} == here
    shutil.rmtree(tmp_path / "runs")
    again = build_engine(load([config], ["steps=6", "init_from=null"]), resume="auto")
    assert again.state.step == 4
    assert again.fit() == 0
    assert (tmp_path / "store/tiny/step-00000006/manifest.json").is_file()
