import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from mcir.archs import parse
from mcir.archs.base import compile_blocks
from mcir.config import validate
from mcir.data.loader import Batch
from mcir.errors import UserError
from mcir.evaluation.evaluate import Picture
from mcir.parallel.shards import full_params
from mcir.train.engine import build_engine
from tests.golden import find, trajectory
from tests.runs import tiny_config


def relative(a, b):
    return float((a.cpu() - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("images", ["photographs", "drawn"])
def test_reproduces_the_published_multi_negative_trajectory(images, request, tmp_path):
    """Losses and final weights over 12 steps with two negatives and an EMA: golden/spn_trajectory, by the official
    code; and on drawn images those of the formulas in plain torch, which reproduce the golden ones too."""
    arch = parse({"name": "edsr", "scale": 2, "num_features": 16, "num_blocks": 2})
    if images == "photographs":
        weights = request.getfixturevalue("shared_data") / "vgg16_hed_features.safetensors"
        with safe_open(find("spn_trajectory.safetensors"), "pt") as f:
            case, tensors = json.loads(f.metadata()["case"]), {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
        layers = trajectory.vgg()
        stored = load_file(weights)
        layers.load_state_dict({key: stored[f"features.{key}"] for key in layers.state_dict()})
    else:
        case, layers, weights = trajectory.CASE, trajectory.vgg(), tmp_path / "vgg.safetensors"
        save_file({f"features.{key}": value for key, value in layers.state_dict().items()}, weights)
        torch.manual_seed(3)
        tensors = trajectory.drawn(arch.build())
    by_formulas = trajectory.plain(case, tensors, arch.build(), layers)
    for name, value in by_formulas.items():
        assert relative(value, tensors.setdefault(name, value)) < 1e-5, name

    def state(prefix):
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    save_file(state("initial."), tmp_path / "initial.safetensors")
    config = validate(
        tiny_config(
            tmp_path,
            batch_size=2,
            steps=case["steps"],
            init_from=str(tmp_path / "initial.safetensors"),
            arch=arch.model_dump(),
            objective={
                "contrast": {
                    "name": "spn",
                    "weight": 0.01,
                    "features": {"weights": str(weights)},
                    "negatives": case["spn"]["negatives"],
                }
            },
            optim={"optimizer": {"name": "adam", "lr": 2e-4, "betas": [0.9, 0.99]}},
            ema_decay=case["ema_decay"],
            ema_warmup=False,
            compute={"precision": "fp32"},  # on a GPU too
        ),
        "golden case",
    )
    engine = build_engine(config)
    for k, net in enumerate(engine.negatives.nets):
        net.load_state_dict(state(f"initial_negative{k}."))
    losses, device = [], engine.accelerator.device
    tolerance = 1e-5 if device.type == "cpu" else 1e-4  # a GPU adds up in another order
    for step in range(1, case["steps"] + 1):
        batch = Batch(tensors[f"degraded.{step}"].to(device), tensors[f"clean.{step}"].to(device), [])
        parts = engine.step([batch])
        losses.append(torch.stack([parts["reconstruction"], -parts["contrast"]]))
        assert torch.equal(parts["total"], parts["reconstruction"] + parts["contrast"])
    apart = {"losses": float(((torch.stack(losses).cpu() - tensors["losses"]) / tensors["losses"]).abs().max())}
    final = dict(full_params(engine.accelerator, engine.model))
    for name, expected in state("final.").items():
        apart[f"target {name}"] = relative(final[name], expected)
    for k, net in enumerate(engine.negatives.nets):
        for name, expected in state(f"final_negative{k}.").items():
            apart[f"negative {k} {name}"] = relative(net.state_dict()[name], expected)
    assert engine.ema is not None
    averaged = {name: tensor.clone() for name, tensor in engine.ema.full()}
    for name, expected in state("final_ema.").items():
        apart[f"EMA {name}"] = relative(averaged[name], expected)
    worst = max(apart, key=lambda name: apart[name])
    print(f"\n{len(apart)} quantities of {case['steps']} steps: at most {apart[worst]:.1e} apart, relative ({worst})")
    assert all(value < tolerance for value in apart.values()), apart


def checkpoint_tensors(run_dir, step):
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    return {f"{f.name}:{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


STAGES = [{"after": 2, "crop_size": 24, "batch_size": 8}, {"after": 4, "crop_size": 32, "batch_size": 4}]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("stages", [[], STAGES], ids=["constant", "stages"])
def test_six_steps_equal_three_and_three_more(tmp_path, stages):
    values = tiny_config(tmp_path, steps=6, stages=stages)
    if stages:
        values["data"]["mixup"] = {"after": 1, "probability": 1.0}
    whole = build_engine(validate(values, "whole"))
    assert whole.fit() == 0
    half = build_engine(validate(values | {"name": "half", "steps": 3, "stages": stages[:1]}, "half"))
    assert half.fit() == 0
    resumed = build_engine(validate(values | {"name": "half"}, "resumed"), resume="auto")
    assert (resumed.state.step, resumed.loader.position) == (3, 16 if stages else 12)
    assert resumed.fit() == 0
    expected, got = checkpoint_tensors(whole.run_dir, 6), checkpoint_tensors(resumed.run_dir, 6)
    assert expected.keys() == got.keys()
    assert any(key.startswith("negatives") for key in expected)
    assert any(key.startswith("ema") for key in expected)
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key


HISTORY: dict = {
    "contrast": {
        "name": "ratio",
        "weight": {"target_ratio": 0.1},
        "features": {"layers": {"relu1_1": 1.0}, "weights": "random"},
        "degraded": True,
        "negatives": [
            {"trigger": 0.05, "decay": 0.001, "start": 0.1},
            {"trigger": 0.05, "decay": 0.001, "start": 0.1},
            {"update_every": [{"until": 2, "every": 1}, {"every": 2}], "source": "ema", "views": 3, "start": 0.1},
            {"update_every": 1, "decay": 0.9, "role": "anchor", "start": 0.1},
        ],
    },
}
"""Every kind of history at once, and a weight that follows."""


def with_history(folder, **overrides):
    return tiny_config(folder, objective={"contrast": HISTORY["contrast"]}, **overrides)


@pytest.mark.usefixtures("deterministic")
def test_every_kind_of_history_resumes_to_the_bit(tmp_path):
    values = with_history(tmp_path, steps=6, tracking={"log_every": 1})
    whole = build_engine(validate(values, "whole"))
    assert whole.fit() == 0
    half = build_engine(validate(values | {"name": "half", "steps": 3}, "half"))
    assert half.fit() == 0
    resumed = build_engine(validate(values | {"name": "half"}, "resumed"), resume="auto")
    assert resumed.fit() == 0
    expected, got = checkpoint_tensors(whole.run_dir, 6), checkpoint_tensors(resumed.run_dir, 6)
    assert expected.keys() == got.keys()
    assert {"followed.safetensors:weight.value", "followed.safetensors:negatives.turn"} <= expected.keys()
    assert expected["followed.safetensors:negatives.turn"] > 3  # the tiny network's error is high
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key


@pytest.mark.usefixtures("deterministic")
def test_no_negatives_trains_plainly(tmp_path):
    """With K = 0 the trained weights are those of the reconstruction loss alone."""
    plain = build_engine(validate(tiny_config(tmp_path, objective={"contrast": None}, steps=2), "plain"))
    plain.fit()
    values = tiny_config(tmp_path, steps=2)
    values["objective"]["contrast"]["negatives"] = []
    empty = build_engine(validate(values, "empty"))
    empty.fit()
    for (name, a), (_, b) in zip(plain.model.named_parameters(), empty.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    whole = build_engine(validate(tiny_config(tmp_path, steps=3, ema_decay=None), "whole"))
    whole.fit()
    split = build_engine(validate(tiny_config(tmp_path, steps=3, ema_decay=None, accumulate=2), "split"))
    split.fit()
    for (name, a), (_, b) in zip(whole.model.named_parameters(), split.model.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name


def test_a_step_without_finite_gradient_changes_nothing(tmp_path):
    engine = build_engine(validate(tiny_config(tmp_path), "nan"))
    good = next(iter(engine.loader))
    engine.step([good])
    before = [p.clone() for p in engine.model.parameters()]
    moments = [v.clone() for state in engine.optimizer.state.values() for v in state.values()]
    parts = engine.step([Batch(good.degraded, good.clean * float("nan"), good.key)])
    assert float(parts["skipped"]) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(moments, (v for s in engine.optimizer.state.values() for v in s.values()), strict=True)
    )
    assert float(engine.step([good])["skipped"]) == 0
    assert not all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["cosine", "multistep"])
def test_the_rate_is_that_of_torch(name):
    """Against torch's own schedulers; cosine with a period shorter than the run rises again, as the released yml
    does."""
    from mcir.train.optim import Cosine, MultiStep, OptimConfig

    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=2e-4)
    if name == "cosine":
        schedule = Cosine(min_lr=1e-8, period=10)
        reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=1e-8)
    else:
        schedule = MultiStep(milestones=(5, 12), gamma=0.5)
        reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 12], gamma=0.5)
    config = OptimConfig(optimizer={"name": "adam", "lr": 2e-4}, schedule=schedule)
    for step in range(1, 31):
        assert config.lr(step, 30) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12)
        optimizer.step()
        reference.step()


def test_a_run_that_cannot_recover_stops_with_the_step_and_the_last_good_checkpoint(tmp_path):
    """A learning rate that destroys the weights: every later gradient is not finite. Good is what was saved before."""
    optim = {"optimizer": {"name": "adam", "lr": 1e30}, "max_skipped": 2}
    values = tiny_config(tmp_path, steps=50, optim=optim, tracking={"log_every": 1}, checkpoint={"every": 1})
    engine = build_engine(validate(values, "nan"))
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row, up to step 4 .*step-00000001"):
        engine.fit()


def test_each_run_of_a_process_computes_in_its_own_precision(tmp_path):
    """What a convolution of the target gives, and the line that says so."""
    for precision, dtype in (("bf16", torch.bfloat16), (None, torch.float32), ("fp16", torch.float16)):
        engine = build_engine(validate(tiny_config(tmp_path, compute={"precision": precision}), "test"))
        seen = []
        layer = next(m for m in engine.model.modules() if isinstance(m, torch.nn.Conv2d))
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))  # noqa: B023
        batch = next(iter(engine.loader))
        assert float(engine.step([batch])["skipped"]) == 0
        assert seen == [dtype]
        assert f", {precision or 'fp32'}, single x 1" in str(engine)
        start = json.loads((engine.run_dir / "run.json").read_text())["starts"][-1]
        assert start["environment"]["precision"] == precision or precision is None


@pytest.mark.usefixtures("deterministic")
def test_fp16_scales_its_loss_halves_the_scale_where_it_overflows_and_goes_on_exactly(tmp_path):
    """A scale of 2^40 overflows fp16 (65504) until it has been halved often enough; weights stay as they are
    meanwhile. A run that is resumed in the middle of that has the same weights at the end."""
    compute, optim = {"precision": "fp16"}, {"optimizer": {"name": "adam", "lr": 1e-3}, "max_grad_norm": 0.1}
    values = tiny_config(tmp_path, steps=40, compute=compute, optim=optim)
    whole = build_engine(validate(values | {"name": "whole"}, "whole"))
    assert whole.state.loss_scale is not None
    whole.state.loss_scale.load([2.0**40, 1997])
    before = [p.clone() for p in whole.model.parameters()]
    batches, skipped = iter(whole.loader), []
    for _ in range(40):
        skipped.append(float(whole.step([next(batches)])["skipped"]))
        if whole.state.step == 5:
            assert all(torch.equal(a, b) for a, b in zip(before, whole.model.parameters(), strict=True))
            path = whole.state.save(whole.checkpointer)
            whole.checkpointer.join()
    overflows = int(sum(skipped))
    last = max(i for i, was_skipped in enumerate(skipped) if was_skipped)
    assert skipped[:8] == [1.0] * 8
    assert 8 < overflows < 35
    assert whole.state.loss_scale.state() == [2.0 ** (40 - overflows), 39 - last]
    resumed = build_engine(validate(values | {"name": "resumed"}, "resumed"), resume=str(path))
    assert resumed.state.loss_scale is not None
    assert resumed.state.loss_scale.state() == [2.0**35, 0]
    batches = iter(resumed.loader)
    for _ in range(35):
        resumed.step([next(batches)])
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    assert whole.state.loss_scale.state() == resumed.state.loss_scale.state()


@pytest.mark.slow
@pytest.mark.parametrize("stages", [[], STAGES], ids=["constant", "stages"])
def test_compiled_blocks_train_the_same(tmp_path, stages):
    """The weights move the same way, also where crops and batches change on the way. No negative starts as the target:
    SPN's gradient would be the signs of differences that are 0 or, where compiled code rounds otherwise without
    gradients, noise. Nor are Adam's steps, with a large eps, the signs of gradients that are noise."""
    values = tiny_config(tmp_path, optim={"optimizer": {"name": "adam", "lr": 1e-3, "eps": 1e-3}}, stages=stages)
    values["objective"]["contrast"]["negatives"] = [
        {"update_every": 2, "decay": 0.5, "start": 0.1},
        {"update_every": 3, "start": 0.5},
    ]
    plain = build_engine(validate(values, "plain"))
    start = [parameter.detach().clone() for parameter in plain.model.parameters()]
    plain.fit()
    compute = {"compile": True, "channels_last": True}
    compiled = build_engine(validate(values | {"name": "compiled", "compute": compute}, "compiled"))
    compiled.fit()
    for (name, a), b, origin in zip(plain.model.named_parameters(), compiled.model.parameters(), start, strict=True):
        assert (a - b).norm() < 1e-3 * (a - origin).norm(), name


@pytest.mark.slow
def test_one_compiled_graph_serves_all_negatives_before_and_after_their_updates(tmp_path):
    """Two graphs a block class: the target's, with gradients, and that of every negative."""
    for k in (1, 3):
        torch._dynamo.reset()
        counters.clear()
        values = tiny_config(tmp_path, compute={"compile": True})
        values["objective"]["contrast"]["negatives"] = [{"update_every": 2}] * k
        engine = build_engine(validate(values, "compiled"))
        batches = iter(engine.loader)
        for _ in range(5):
            engine.step([next(batches)])
        assert counters["stats"]["unique_graphs"] == 2 * len(engine.arch.descriptor.blocks)


def test_images_of_a_size_that_hardly_comes_again_are_not_compiled(tmp_path, monkeypatch):
    """Batches that lack samples, and pictures of what a negative restores; traced, not turned into machine code."""
    monkeypatch.setattr("mcir.train.engine.compile_blocks", partial(compile_blocks, backend="eager"))
    plain, compiled = (
        build_engine(validate(tiny_config(tmp_path, name=str(on), compute={"compile": on}), "run"))
        for on in (False, True)
    )
    torch._dynamo.reset()
    counters.clear()
    whole = next(iter(compiled.loader))
    for num in (4, 3, 2, 1):
        there = {"degraded": whole.degraded[:num], "clean": whole.clean[:num], "key": whole.key[:num]}
        batch = replace(whole, **there, weight=num / 4)
        expected, found = plain.step([batch]), compiled.step([batch])
        assert relative(found["total"], expected["total"].cpu()) < 1e-5
        picture = Picture("a", torch.rand(3, 8 * num, 12), *torch.rand(2, 3, 16 * num, 24))
        shown = [engine.validation._negative_pictures([picture], engine.state) for engine in (plain, compiled)]
        assert torch.allclose(shown[0][0], shown[1][0], atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 2 * len(compiled.arch.descriptor.blocks)


@pytest.mark.usefixtures("deterministic")
def test_checkpointed_activations_change_nothing_and_are_not_kept(tmp_path):
    def trained(name, on):
        values = tiny_config(tmp_path, name=name, steps=2, compute={"checkpoint_activations": on})
        engine = build_engine(validate(values, name))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            engine.model(torch.rand(1, 3, 32, 32, device=engine.accelerator.device))
        engine.fit()
        return [p.detach() for p in engine.model.parameters()], sum(kept)

    (plain, all_kept), (checkpointed, kept) = trained("plain", False), trained("checkpointed", True)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert kept < 0.8 * all_kept


class HostReads(TorchDispatchMode):
    """Counts the operations by which Python looks into a tensor, or whose result has a size that depends on values:
    each waits for the device, where there is one."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in self.WAITING:
            self.counted.append(name)
        return function(*args, **(kwargs or {}))


def busy_engine(folder, history=False):
    """Everything a step can do: two micro-batches, clipping, EMA, negatives that are due every step."""
    values = with_history(folder, accumulate=2) if history else tiny_config(folder, accumulate=2)
    values["optim"]["max_grad_norm"] = 1.0
    for schedule in [] if history else values["objective"]["contrast"]["negatives"]:
        schedule["update_every"] = 1
    engine = build_engine(validate(values, "test"))
    batches = iter(engine.loader)
    return engine, [[next(batches), next(batches)] for _ in range(4)]


@pytest.mark.parametrize("history", [False, True])
def test_no_step_reads_a_value_on_the_host(tmp_path, history):
    engine, batches = busy_engine(tmp_path, history)
    with HostReads() as reads:
        float(torch.ones(()))  # the instrument counts
    assert reads.counted == ["_local_scalar_dense"]
    with HostReads() as reads:
        for micro_batches in batches:
            engine.step(micro_batches)
    assert reads.counted == []


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu(tmp_path):
    engine, batches = busy_engine(tmp_path)
    engine.step(batches[0])  # the first fills the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for micro_batches in batches[1:]:
            engine.step(micro_batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
