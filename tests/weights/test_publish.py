"""A run's weights on the Hub: uploaded by one command, measured from there by another."""

import json
import sys

import pytest
import yaml
from PIL import Image

from mcir.cli import main
from mcir.config import validate
from mcir.errors import UserError
from mcir.train.engine import build_engine
from mcir.weights.publish import publish
from mcir.weights.trained import checksum, open_trained
from tests.hub import COMMIT
from tests.runs import tiny_config


@pytest.fixture
def run_dir(tmp_path):
    """Trained for two steps, validated, with averaged weights."""
    values = tiny_config(tmp_path, steps=2)
    source = values["data"]["train"][0]["source"]
    bicubic = {"name": "bicubic", "scale": 2}
    values["validation"] = {"every": 2, "sets": {"seen": {"source": source, "degradation": bicubic, "protocol": "sr"}}}
    engine = build_engine(validate(values, "test"))
    assert engine.fit() == 0
    return engine.run_dir


def said(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mcir", *map(str, arguments)])
    with pytest.raises(SystemExit) as error:
        main()
    captured = capsys.readouterr()
    assert not error.value.code, captured.err
    return captured.out


def test_published_and_measured_from_there(run_dir, the_hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    to_hub = ["--to", "hub", "--repo", "owner/name"]
    out = said(monkeypatch, capsys, "export", run_dir, *to_hub, "--private", "--license", "cc-by-4.0")
    assert out.strip() == f"{the_hub.endpoint}/owner/name/commit/{COMMIT}"
    model = tmp_path / "hub/models/owner/name"
    picture = "seen-000-degraded-restored-clean.png"
    assert {file.name for file in model.iterdir()} == {
        *("README.md", "config.yaml", "model.safetensors", ".private", picture)
    }
    card = (model / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header == {
        "license": "cc-by-4.0",
        "library_name": "mcir",
        "pipeline_tag": "image-to-image",
        "tags": ["image-restoration", "super-resolution", "edsr", "mcir"],
    }
    for part in ("## Data", "## Metrics", "seen/psnr (ema)", "mcir train config.yaml", "## Network", f"]({picture})"):
        assert part in card
    assert "mcir evaluate --weights hf://owner/name --data config.yaml" in card
    assert Image.open(model / picture).size == (96, 32 + 18 + 4 + 24)  # three of 32 x 32, labels, details
    assert "hf_secret" not in "".join(file.read_text(errors="ignore") for file in model.iterdir())
    (here,) = open_trained([str(run_dir)])
    results = tmp_path / "r.json"
    data = model / "config.yaml"
    said(monkeypatch, capsys, "evaluate", "--weights", "hf://owner/name", "--data", data, "--json", results)
    about = json.loads(results.read_text())["weights"]["name"]
    assert about["origin"] == f"hf://owner/name/model.safetensors@{COMMIT}"
    assert about["sha256"] == checksum(model / "model.safetensors")
    (there,) = open_trained(["hf://owner/name"])
    assert there.kind == here.kind == "ema"
    assert all((a == b).all() for a, b in zip(there.net.parameters(), here.net.parameters(), strict=True))
    said(monkeypatch, capsys, "export", run_dir, *to_hub, "--revision", "v2")
    assert "v2" in the_hub.revisions


def test_a_hub_that_does_not_take_it(run_dir, the_hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (trained,) = open_trained([str(run_dir)])
    with pytest.raises(UserError, match=r"^--repo owner/name: the Hub does not take it .* the token \(HF_TOKEN"):
        publish(trained, "owner/name")


def test_a_folder_that_may_not_be_written_is_said_before_the_hub_is_asked(run_dir, the_hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (trained,) = open_trained([str(run_dir)])
    with pytest.raises(UserError, match="holds what a run wrote"):
        publish(trained, "owner/name", output=run_dir)
    assert not (tmp_path / "hub/models").exists()
