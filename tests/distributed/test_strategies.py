"""ddp, fsdp2, zero2 and zero3 on two gloo processes, hsdp on four, through the user's command: the same training, the
same negatives."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.launch import ROOT, run, write_config
from tests.runs import tiny_config

pytest.importorskip("deepspeed")
STRATEGIES = ["ddp", "fsdp2", "hsdp", "zero2", "zero3"]
PAIRS = [name for name in STRATEGIES if name != "hsdp"]  # of processes; hsdp's two replicas of two shards are four
INSIDE = [name if name == "fsdp2" else pytest.param(name, marks=pytest.mark.slow) for name in PAIRS]
MIDDLE, LAST = "step-00000010", "step-00000020"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    if shutil.which("c++") is None:
        pytest.skip("DeepSpeed compiles its shared-memory collective once: a C++ compiler is needed")
    folder = tmp_path_factory.mktemp("strategies")
    values = tiny_config(folder, steps=20, checkpoint={"every": 10}, tracking={"log_every": 1})
    # none starts as the target: of what is equal but for rounding, the L1 distance's gradient is the rounding's sign
    values["objective"]["contrast"]["negatives"][1]["start"] = 0.2
    write_config(folder / "config.yaml", values)
    return folder


Trained = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(folder) -> Trained:
    """The run directory of 20 steps with three negatives under a strategy, trained when it is first asked for."""

    @cache
    def train(name: str, channels_last: bool = False) -> Path:
        run_name = f"{name}-nhwc" if channels_last else name
        layout = f"compute.channels_last={str(channels_last).lower()}"
        launch_file = name if name == "single" else f"{name}_cpu"
        process = run(launch_file, "train", str(folder / "config.yaml"), f"name={run_name}", layout)
        assert process.returncode == 0, process.stdout
        return folder / "runs" / run_name

    return train


def losses(run_dir: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [event.value for event in events.Scalars(tag)]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint; the optimizer's are one set however many processes wrote them."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return {f"{file.name.split('-')[0]}:{key}": value for file in files for key, value in load_file(file).items()}


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    largest = max(float((value.double() - b[key].double()).abs().max()) for key, value in a.items() if value.numel())
    print(f"\n{len(a)} tensors: at most {largest:.1e} apart")
    for key, value in a.items():
        assert torch.allclose(value, b[key], rtol=1e-5, atol=1e-5), (key, (value - b[key]).abs().max())


def layouts(default: Sequence[str], nhwc: Sequence[str]) -> list:
    """Each strategy in torch's default layout and in NHWC; those that are not named are left to the slow tests."""
    return [
        pytest.param(name, channels_last, id=f"{name}{suffix}", marks=() if name in fast else pytest.mark.slow)
        for channels_last, suffix, fast in ((False, "", default), (True, "-nhwc", nhwc))
        for name in STRATEGIES
    ]


@pytest.mark.parametrize(("name", "channels_last"), layouts(["ddp", "fsdp2", "zero3"], ["fsdp2"]))
def test_every_strategy_trains_what_one_process_trains(trained, name, channels_last):
    runs = {"single": trained("single"), name: trained(name, channels_last)}
    for tag in ("loss/total", "loss/reconstruction", "loss/contrast"):
        single, sharded = losses(runs["single"], tag), losses(runs[name], tag)
        assert len(single) == 20
        largest = max(abs(a - b) for a, b in zip(single, sharded, strict=True))
        print(f"\n{name}, {tag}: at most {largest:.1e} apart")
        assert largest < 1e-5
    single = tensors(runs["single"] / "checkpoints" / LAST)
    assert {"model.safetensors:body.0.conv1.weight", "negatives.safetensors:2.conv_last.bias"} <= single.keys()
    assert {"ema.safetensors:conv_first.bias", "optimizer:body.0.conv1.weight/exp_avg_sq"} <= single.keys()
    assert_close(single, tensors(runs[name] / "checkpoints" / LAST))


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_bf16_is_autocast_over_the_same_fp32_weights(folder, name):
    """bf16 rounds (2^-8), which is seen in the losses, and keeps fp32 weights: all strategies stay together."""
    for precision in ("fp32", "bf16"):
        arguments = (f"name={precision}-{name}", f"compute.precision={precision}", "steps=10")
        process = run(f"{name}_cpu", "train", str(folder / "config.yaml"), *arguments)
        assert process.returncode == 0, process.stdout
    exact, rounded = (losses(folder / "runs" / f"{p}-{name}", "loss/total") for p in ("fp32", "bf16"))
    assert exact != rounded
    assert max(abs(a - b) for a, b in zip(exact, rounded, strict=True)) < 2e-3


@pytest.mark.parametrize(("name", "channels_last"), layouts(["fsdp2", "zero3"], []))
def test_resuming_is_exact_to_the_bit(folder, trained, name, channels_last):
    run_dir = trained(name, channels_last)
    layout = f"compute.channels_last={str(channels_last).lower()}"
    arguments = ("train", str(folder / "config.yaml"), f"name=resumed-{run_dir.name}", layout)
    process = run(f"{name}_cpu", *arguments, "--resume", str(run_dir / "checkpoints" / MIDDLE))
    assert process.returncode == 0, process.stdout
    whole = tensors(run_dir / "checkpoints" / LAST)
    resumed = tensors(folder / "runs" / f"resumed-{run_dir.name}" / "checkpoints" / LAST)
    assert whole.keys() == resumed.keys()
    differing = [key for key, value in whole.items() if not torch.equal(value, resumed[key])]
    print(f"\n{name}: {len(differing)} of {len(whole)} tensors differ after a resume")
    assert not differing


@pytest.mark.parametrize(
    ("written_by", "read_by", "num_processes"),
    [
        ("zero3", "single", 1),
        pytest.param("single", "zero2", 2, marks=pytest.mark.slow),
        pytest.param("zero2", "fsdp2", 4, marks=pytest.mark.slow),
        pytest.param("fsdp2", "zero3", 2, marks=pytest.mark.slow),
        pytest.param("ddp", "fsdp2", 2, marks=pytest.mark.slow),
    ],
)
def test_any_strategy_goes_on_from_any_other(folder, trained, written_by, read_by, num_processes):
    """Weights, moments, EMA, negatives and data position pass from one strategy and process count to another."""
    middle = str(trained(written_by) / "checkpoints" / MIDDLE)
    name = f"{written_by}-to-{read_by}-{num_processes}"
    launch_file = read_by if read_by == "single" else f"{read_by}_cpu"
    arguments = ("train", str(folder / "config.yaml"), f"name={name}", "--resume", middle)
    process = run(launch_file, *arguments, num_processes=num_processes)
    assert process.returncode == 0, process.stdout
    got = tensors(folder / "runs" / name / "checkpoints" / LAST)
    assert_close(tensors(trained("single") / "checkpoints" / LAST), got)


@pytest.mark.parametrize("name", INSIDE)
def test_inside_the_processes(folder, name):
    """Shards are real, negatives equal on both ranks to the bit at every step; NaN on one rank skips the step
    on both."""
    output = folder / f"inspect-{name}"
    output.mkdir()
    values = [str(folder / "config.yaml"), str(output)]
    process = run(f"{name}_cpu", *values, script=str(ROOT / "tests" / "distributed" / "inspect_shards.py"))
    assert process.returncode == 0, process.stdout
    ranks = [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(2)]
    for record in ranks:
        assert record["strategy"] == name
        assert all(a == b for a, b in record["checksums"])
        assert len({a for a, _ in record["checksums"]}) > 3  # and they do change
        assert record["skipped"] == [0, 0, 1, 0, 0, 0]
        assert record["finite"]
        assert record["negative_dtypes"] == ["torch.float32"]
        assert not record["negative_gradients"]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    total = ranks[0]["global"]
    if name == "ddp":
        assert [record["local"] for record in ranks] == [total, total]
    else:
        assert all(record["local"] < 0.6 * total for record in ranks)
    if name == "fsdp2":
        assert [record["uneven"][0][0] for record in ranks] == [4, 3]  # 7 features over two ranks
    if name == "zero3":
        assert all(record["partitioned"] < 0.6 * total for record in ranks)


@pytest.mark.parametrize("name", INSIDE)
def test_tied_frozen_and_uneven_parameters_and_running_statistics(tmp_path, name):
    """Negatives follow the rule exactly where parameters are shared, frozen or odd and ranks' statistics differ."""
    script = str(ROOT / "tests" / "distributed" / "inspect_negatives.py")
    process = run(f"{name}_cpu", str(tmp_path), script=script)
    assert process.returncode == 0, process.stdout
    for rank in range(2):
        record = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert record["error"] < 1e-6
        assert {"frozen.weight", "middle.weight", "norm.running_mean"} <= set(record["keys"])
        assert record["checksums"][0] == record["checksums"][1]
        assert record["statistics"][0] == record["statistics"][1]
        assert record["own_statistics_differ"][0] != record["own_statistics_differ"][1]
        assert record["frozen"]
