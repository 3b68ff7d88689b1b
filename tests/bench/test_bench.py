"""What a step costs: the numbers against closed forms, the reference step against the engine's own losses."""

import json
import sys

import pytest
import torch

from mcir.archs import build
from mcir.bench.bench import PARTS, Reference, Stopwatch, as_published, bench, open_engine, report
from mcir.bench.counts import count_flops, count_operators
from mcir.bench.peaks import utilisation
from mcir.bench.sweep import Trial, dump, overlay
from mcir.cli import main
from mcir.config import load, validate
from tests.distributed.launch import write_config
from tests.runs import tiny_config


@pytest.fixture
def config(tmp_path):
    return validate(tiny_config(tmp_path), "test")


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["mcir", *map(str, arguments)])
    try:
        main()
    except SystemExit as error:
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_stopwatch_adds_up_each_part_of_each_step(monkeypatch):
    watch = Stopwatch(torch.device("cpu"))
    marks = [(0, "data"), (1, "target"), (3, "features"), (7, "target"), (15, "data"), (31, "update"), (63, "data")]
    for now, part in marks:
        monkeypatch.setattr("mcir.bench.bench.time.perf_counter", lambda now=now: now)
        watch.begin(part)
    assert watch.read() == [{"data": 1, "target": 2 + 8, "features": 4}, {"data": 16, "update": 32}]
    assert watch.read() == []


def test_the_parts_make_up_the_step(config):
    result = bench(config, steps=4, rounds=1)
    assert set(result["parts_ms"]) == set(PARTS)
    assert sum(result["parts_ms"].values()) * 4 <= 1e3 * 4 * config.batch_size / result["images_per_s"]
    assert all(result["parts_ms"][part] > 0 for part in PARTS)
    assert set(result["compared_ms"]) == {"mcir", "plain", "reference"}
    low, high = result["step_ms_quartiles"]
    assert 0 < low <= result["step_ms"] <= high
    assert (result["negatives"], result["batch_size"]) == (3, 4)
    assert result["mfu"] is None or 0 < result["mfu"] < 1
    json.dumps(result)


def test_flops_of_a_plain_step_are_those_of_its_convolutions(tmp_path):
    """Forward, and twice that backward, but for the first layer, whose input needs no gradient."""
    values = tiny_config(tmp_path) | {"objective": {"contrast": None}, "ema_decay": None}
    engine = open_engine(validate(values, "test"), str(tmp_path))
    batches = [next(iter(engine.loader))]
    side, features, blocks, batch = 8, 7, 2, 4  # EDSR x2: head, blocks of two, one after them, up, tail

    def conv(inputs, outputs, side):
        return 2 * batch * 9 * inputs * outputs * side**2

    head = conv(3, features, side)
    body = (2 * blocks + 1) * conv(features, features, side) + conv(features, 4 * features, side)
    tail = conv(features, 3, 2 * side)
    assert count_flops(engine.step, batches) == 2 * head + 3 * (body + tail)


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA RTX A1000", None),
        ("x86_64", None),
    ],
)
def test_the_share_of_a_known_device_s_peak(device, teraflops):
    """Dense bf16, of NVIDIA's data sheets."""
    found = utilisation(10**12, 10, device, "bf16")
    assert found == (teraflops and pytest.approx(100 / teraflops))


@pytest.mark.parametrize(
    ("kind", "groups"), [("Conv2d", 1), ("Conv2d", 8), ("ConvTranspose2d", 1), ("ConvTranspose2d", 4)]
)
def test_gradients_of_a_convolution_cost_what_it_costs(kind, groups):
    """Each of its two; torch's own counter takes a depthwise one's gradient for a whole one's."""
    layer = getattr(torch.nn, kind)(8, 8, 3, padding=1, groups=groups)
    x = torch.rand(2, 8, 6, 6, requires_grad=True)
    once = 2 * (2 * 6**2) * 9 * 8 * 8 // groups
    assert count_flops(lambda batches: layer(x).sum().backward(), []) == 3 * once
    assert count_flops(lambda batches: layer(x.detach()).sum().backward(), []) == 2 * once


def test_operators_are_counted_but_views_are_not():
    assert count_operators(lambda batches: (torch.ones(2, 3).relu().view(6).view(3, 2).t() + 1).sum(), []) == 4


def test_the_reference_step_has_the_engine_s_loss(config, tmp_path):
    engine = open_engine(config, str(tmp_path))
    reference = Reference(engine)
    reference.net.load_state_dict(engine.model.state_dict())
    for own, negative in zip(reference.negatives, engine.negatives.nets, strict=True):
        own.load_state_dict(negative.state_dict())
    batches = [next(iter(engine.loader))]
    expected = engine.step(batches)["total"]
    assert torch.allclose(reference.step(batches)["total"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "section",
    [
        {"name": "swinir", "variant": "light", "scale": 2, "image_size": 16, "depths": [2], "num_heads": [6]},
        {"name": "nafnet", "width": 8},
    ],
    ids=["swinir", "nafnet"],
)
def test_the_reference_trains_the_published_network(section):
    ours = build(section).eval()
    published = as_published(ours).eval()
    assert type(published).__module__.startswith("spandrel.")
    image = torch.rand(1, 3, 16, 16)
    assert torch.allclose(published(image), ours(image), atol=1e-5)
    assert all(parameter.requires_grad for parameter in published.parameters())


@pytest.mark.parametrize("outputs", ["Stages", "Scales"])
def test_the_reference_step_knows_networks_of_several_outputs(tmp_path, outputs):
    """MPRNet's stages and MIMO-UNet's scales, each compared with the clean image of its size."""
    values = tiny_config(tmp_path)
    result = "first" if outputs == "Stages" else "last"
    values["arch"] = {"name": "import", "target": f"tests.standins:{outputs}", "arguments": {}, "result": result}
    values["data"]["train"][0]["degradation"] = {"name": "noise"}
    engine = open_engine(validate(values, "test"), str(tmp_path))
    reference = Reference(engine)
    reference.net.load_state_dict(engine.model.state_dict())
    for own, negative in zip(reference.negatives, engine.negatives.nets, strict=True):
        own.load_state_dict(negative.state_dict())
    batches = [next(iter(engine.loader))]
    assert len(reference.net(batches[0].degraded)) == 3
    expected = engine.step(batches)["total"]
    assert torch.allclose(reference.step(batches)["total"], expected, rtol=1e-5)


def test_a_reference_that_does_not_fit_is_left_out(config, monkeypatch):
    def step(self, batches):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Reference, "step", step)
    result = bench(config, steps=1, rounds=1)
    assert (set(result["compared_ms"]), result["out_of_memory"]) == ({"mcir", "plain"}, ["reference"])
    assert "the reference step does not fit into memory" in list(report(result))


def test_bench_leaves_nothing_behind(config, tmp_path):
    bench(config, steps=1, rounds=1, compare=False)
    assert not (tmp_path / "runs").exists()


def test_json_is_all_there_is_on_stdout(tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path / "c.yaml", tiny_config(tmp_path))
    code, out, _ = run(monkeypatch, capsys, "bench", path, "--steps", "1", "--rounds", "1", "--json")
    assert code == 0
    assert json.loads(out)["name"] == "tiny"
    code, out, _ = run(monkeypatch, capsys, "bench", path, "--steps", "1", "--rounds", "1", "ema_decay=null")
    assert code == 0
    assert "reference" in out
    assert "images/s" in out


def test_what_a_sweep_kept_is_a_config(tmp_path):
    path = write_config(tmp_path / "c.yaml", tiny_config(tmp_path))
    trials = [
        Trial({}, 10.0, 400.0, 1.0),
        Trial({"compute.precision": "bf16"}, 15.0, 300.0, 1.0, kept=True),
        Trial({"compute.compile": True}, None, None, None, fault="no compiler"),
        Trial({"compute.channels_last": True}, 16.0, 280.0, 1.0, kept=True),
        Trial({"batch_size": 8}, 20.0, 400.0, 1.0, kept=True),
        Trial({"batch_size": 16}, 20.1, 800.0, 1.0),
    ]
    assert overlay(trials) == {"compute": {"precision": "bf16", "channels_last": True}, "batch_size": 8}
    (tmp_path / "o.yaml").write_text(dump(trials))
    assert "20 images/s with these settings, 10 without" in dump(trials)
    config = load([path, tmp_path / "o.yaml"])
    assert (config.batch_size, config.compute.precision, config.compute.compile) == (8, "bf16", False)
    (tmp_path / "nothing.yaml").write_text(dump(trials[:1]))
    assert load([path, tmp_path / "nothing.yaml"]) == load([path])


def test_a_config_that_cannot_be_timed_is_one_sentence(tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path / "c.yaml", tiny_config(tmp_path))
    code, out, err = run(monkeypatch, capsys, "bench", path, "data.crop_size=64", "--sweep")
    assert (code, out) == (1, "")
    assert "cannot be timed: mcir: " in err
    assert "smaller than the crop" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(monkeypatch, capsys, "bench", path, "--sweep")
    assert code == 1
    assert "without a launcher" in err
