import json
from pathlib import Path

import pytest
import torch

from mcir.config import RunConfig, dump, load, require_shared, validate
from mcir.data.stream import SampleStream
from mcir.errors import UserError
from mcir.evaluation.evaluate import try_first
from tests.runs import tiny_config

OVERLAYS = ("contrasts", "arms")
"""Folders of files that are merged over a config, and are none by themselves."""
CONFIGS = sorted(p for p in (Path(__file__).parents[1] / "configs").glob("**/*.yaml") if p.parent.name not in OVERLAYS)


def mistakes(values) -> str:
    with pytest.raises(UserError) as caught:
        validate(values, "test")
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=[str(path.relative_to(CONFIGS[0].parents[1])) for path in CONFIGS])
def test_shipped_configs_are_valid_and_load_back_equal(path, tmp_path):
    config = load([path])
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load([tmp_path / "resolved.yaml"]) == config


def test_every_mistake_is_reported_at_once_with_its_path(tmp_path):
    values = tiny_config(tmp_path)
    values["batchsize"] = 4
    values["arch"]["num_feature"] = 16
    values["optim"]["optimizer"]["learning_rate"] = 1
    values["optim"]["schedule"] = {"name": "cosin"}
    values["data"]["train"][0]["degradation"]["scal"] = 2
    values["data"]["train"][0]["source"]["format"] = "parket"
    values["objective"]["contrast"]["negatives"][1]["decay"] = 1.5
    values["objective"]["contrast"]["features"]["layers"] = {"relu9_9": 1.0}
    del values["steps"]
    text = mistakes(values)
    for line in [
        "batchsize: no such field, do you mean batch_size?",
        "arch.num_feature: no such field, do you mean num_features?",
        "optim.optimizer.learning_rate: no such field",
        "optim.schedule.name: cosin is none of constant, linear, cosine, multistep, segments, do you mean cosine?",
        "data.train.0.degradation.scal: no such field, do you mean scale?",
        "data.train.0.source.format: parket is none of",
        "objective.contrast.negatives.1.decay: Input should be less than 1 (given: 1.5)",
        "objective.contrast.features.layers: no layer relu9_9",
        "steps: required and not given",
    ]:
        assert line in text
    assert "9 mistakes" in text


def test_contradictions_are_reported_with_the_other_mistakes_a_line_each(tmp_path):
    values = tiny_config(tmp_path)
    values["batchsize"] = 4
    values["arch"]["num_feature"] = 16
    values["steps"] = "many"
    values["accumulate"] = 3
    values["data"]["crop_size"] = 17
    values["validation"] = {"every": 1, "sets": {}, "weights": "ema", "best": "x/psnr"}
    lines = mistakes(values).splitlines()
    assert lines[0] == "test: 6 mistakes"
    assert sorted(line.split(":")[0] for line in lines[1:]) == [
        "  arch.num_feature",
        "  batch_size",
        "  batchsize",
        "  data.crop_size",
        "  steps",
        "  validation.sets",
    ]
    values = tiny_config(tmp_path, accumulate=3)
    values["data"]["crop_size"] = 17
    assert mistakes(values).splitlines()[0] == "test: 2 mistakes"


def test_home_and_variables_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/mnt/data")
    values = tiny_config(tmp_path, runs_dir="~/runs", init_from="~/w.safetensors")
    folders = {"format": "folders", "clean": "${DATA}/hr", "degraded": "${DATA}/lr"}
    values["data"]["train"] = [{"source": folders}, {"source": {"format": "tars", "path": "~/x-*.tar"}}]
    values["objective"]["contrast"]["features"]["weights"] = "${DATA}/vgg.pth"
    config = validate(values, "test")
    assert (config.runs_dir, config.init_from) == ("/home/me/runs", "/home/me/w.safetensors")
    first, second = config.data.train
    assert (first.source.clean, first.source.degraded) == ("/mnt/data/hr", "/mnt/data/lr")
    assert second.source.path == "/home/me/x-*.tar"
    assert config.objective.contrast.features.weights == "/mnt/data/vgg.pth"
    values["runs_dir"] = "${NOWHERE_SET}/runs"
    assert "runs_dir: the environment variable NOWHERE_SET is not set" in mistakes(values)


def test_a_source_that_cannot_be_opened_is_named_by_its_field(tmp_path):
    values = tiny_config(tmp_path)
    values["data"]["train"].append({"source": {"format": "parquet", "path": "none/*.parquet"}})
    with pytest.raises(UserError, match=r"^data\.train\.1\.source\.path: no Parquet files at none"):
        SampleStream(validate(values, "test").data, scale=2, seed=0, num_lanes=4)
    held = {"source": {"format": "folders", "clean": str(tmp_path), "degraded": "nowhere"}, "protocol": "rgb"}
    config = validate(values | {"validation": {"every": 1, "sets": {"held": held}}}, "test")
    with pytest.raises(UserError, match=r"^validation\.sets\.held\.source\.degraded: "):
        try_first(config.validation, 2, torch.device("cpu"))


def test_one_loss_or_a_list_of_them(tmp_path):
    values = tiny_config(tmp_path)
    terms = [{"name": "charbonnier", "eps": 1e-6}, {"name": "edge", "weight": 0.05}]
    values["objective"]["reconstruction"] = terms
    config = validate(values, "two")
    assert [(term.name, term.weight) for term in config.objective.reconstruction] == [
        ("charbonnier", 1),
        ("edge", 0.05),
    ]
    (tmp_path / "two.yaml").write_text(dump(config))
    assert load([tmp_path / "two.yaml"]) == config
    values["objective"]["reconstruction"] = [*terms, {"name": "edge", "wait": 1}]
    assert "objective.reconstruction.2.wait: no such field, do you mean weight?" in mistakes(values)
    values["objective"]["reconstruction"] = {"name": "edge", "wait": 1}
    assert "objective.reconstruction.wait: no such field, do you mean weight?" in mistakes(values)
    values["objective"]["reconstruction"] = {"name": "egde"}
    assert "objective.reconstruction.name: egde is none of" in mistakes(values)
    values["objective"]["reconstruction"] = {"name": "ms_ssim"}
    assert "ms_ssim needs at least 161 pixels, data.crop_size is 16" in mistakes(values)


def test_a_seed_that_no_generator_takes(tmp_path):
    assert "seed" in mistakes(tiny_config(tmp_path, seed=-1))
    assert "seed" in mistakes(tiny_config(tmp_path, seed=2**32))
    assert validate(tiny_config(tmp_path, seed=2**32 - 1), "largest").seed == 2**32 - 1


def test_contradictions_between_fields(tmp_path):
    values = tiny_config(tmp_path, batch_size=5, accumulate=2)
    values["data"]["crop_size"] = 15
    values["data"]["train"][0]["degradation"]["scale"] = 3
    text = mistakes(values)
    assert "batch_size: 5 is no multiple of accumulate, 2" in text
    assert "data.crop_size: 15 is no multiple of the network's scale 2" in text
    assert "data.train.0.degradation: its scale is 3, the network's is 2" in text
    values = tiny_config(tmp_path, compute={"cuda_graphs": True, "checkpoint_activations": True})
    assert "compute.cuda_graphs: not with checkpoint_activations" in mistakes(values)


def test_stages_that_cannot_be(tmp_path):
    stages = [
        {"after": 3, "crop_size": 15, "batch_size": 4},
        {"after": 3, "crop_size": 16, "batch_size": 3},
        {"after": 6, "crop_size": 32, "batch_size": 2},
    ]
    text = mistakes(tiny_config(tmp_path, stages=stages, accumulate=2))
    assert "stages.0.crop_size: 15 is no multiple of the network's scale 2" in text
    assert "stages.1.batch_size: 3 is no multiple of accumulate, 2" in text
    assert "stages.1.after: 3, and it should begin after step 3 and before the last, 6" in text
    assert "stages.2.after: 6, and it should begin after step 3 and before the last, 6" in text


def test_numbers_of_processes_that_cannot_share_a_batch_are_named(tmp_path):
    stages = [{"after": 3, "crop_size": 16, "batch_size": 12}]
    config = validate(tiny_config(tmp_path, batch_size=24, stages=stages, accumulate=2), "staged")
    require_shared(config, [1, 2, 3, 6])
    with pytest.raises(UserError) as error:
        require_shared(config, [6, 4, 5, 4])
    assert str(error.value).splitlines() == [
        "batch_size: 24 in 2 micro-batches cannot be shared equally by 5 processes; multiples of 120 can",
        "stages.0.batch_size: 12 in 2 micro-batches cannot be shared equally by 4, 5 processes; multiples of 120 can",
    ]


def test_one_pixel_cannot_be_normalised(tmp_path):
    config = validate(tiny_config(tmp_path, batch_size=4, objective={"contrast": {"name": "pcl"}}), "one")
    require_shared(config, [1, 2])
    with pytest.raises(UserError, match=r"batch_size: a process gets one sample at a time, of which pcl's embedding"):
        require_shared(config, [4])


def test_a_contrast_that_needs_what_the_run_has_not(tmp_path):
    values = tiny_config(tmp_path, ema_decay=None)
    values["objective"]["contrast"] |= {"name": "ratio", "negatives": [{}, {"source": "ema"}]}
    values["objective"]["contrast"]["curriculum"] = {"thresholds": [30, 31]}
    text = mistakes(values)
    assert "objective.contrast.negatives.1.source: ema, but ema_decay is not set" in text
    assert "objective.contrast.curriculum: it goes by the validated PSNR, and there is no validation" in text
    values["objective"]["contrast"]["curriculum"] = {"thresholds": [30]}
    assert "curriculum.thresholds: 1 for 2 negatives" in mistakes(values)
    values["objective"]["contrast"] = {"name": "infonce", "negatives": []}
    assert "nothing to push away from" in mistakes(values)


def test_files_merge_left_to_right_and_overrides_come_last(tmp_path):
    (tmp_path / "a.yaml").write_text(dump(validate(tiny_config(tmp_path), "tiny")))
    overlay = (
        "optim: {schedule: {name: multistep, milestones: [3]}}\nsteps: 7\nobjective: {reconstruction: {name: psnr}}\n"
    )
    (tmp_path / "b.yaml").write_text(overlay)
    paths = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    config = load(paths, ["optim.optimizer.lr=1e-4", "objective.contrast.negatives.1.decay=0.25", "name=no"])
    assert config.steps == 7
    assert config.optim.schedule.name == "multistep"  # replaces the constant schedule, whose fields are not its own
    assert [term.name for term in config.objective.reconstruction] == ["psnr"]
    assert config.optim.optimizer.lr == 1e-4
    assert config.objective.contrast is not None
    assert config.objective.contrast.negatives[1].decay == 0.25
    assert config.objective.contrast.negatives[0].decay == 0.5
    assert config.name == "no"  # YAML 1.2: not a boolean


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2\n", "line 2"),
        ("steps: [1\n", "line"),
        ("- 1\n", "is not a mapping"),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path, text, message):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load([tmp_path / "broken.yaml"])
    assert "broken.yaml" in str(caught.value)


def test_missing_file_and_bad_overrides(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read"):
        load([tmp_path / "nowhere.yaml"])
    (tmp_path / "a.yaml").write_text(dump(validate(tiny_config(tmp_path), "tiny")))
    for override, message in [
        ("steps", "path=value"),
        ("objective.contrast.negatives.9.decay=0.5", "9 is no place in a list of 3"),
        ("steps.x=1", "steps.x: no such field|inside a plain value|steps"),
    ]:
        with pytest.raises(UserError, match=message):
            load([tmp_path / "a.yaml"], [override])


def test_configs_of_before_the_contrasts_still_load(tmp_path):
    values = tiny_config(tmp_path)
    old = dict(values["objective"]["contrast"])
    assert old.pop("name") == "spn"
    assert validate(values | {"objective": {"spn": old}}, "old") == validate(values, "new")
    assert validate(values | {"objective": {"spn": None}}, "old").objective.contrast is None
    values["objective"]["spn"] = None
    assert "objective.spn is now objective.contrast" in mistakes(values)


def test_every_section_of_the_schema_is_described():
    schema = RunConfig.model_json_schema()
    json.dumps(schema)
    for name, section in schema["$defs"].items():
        assert section.get("description") or "properties" not in section, name
