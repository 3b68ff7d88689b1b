"""What a training step costs on this machine: the logic of `mcir bench`.

The real engine trains with the real loader, and each step is split where its parts begin. Beside it, in the same run
and in turns, go the same step without negatives and a straightforward one (`Reference`), so that the ratios hold on a
busy machine too. Nothing stays on the disk.
"""

import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import islice
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from mcir.archs.base import images_of
from mcir.bench.counts import count_flops, count_operators
from mcir.bench.peaks import utilisation
from mcir.config import RunConfig
from mcir.data.loader import Batch
from mcir.objective.objective import reduced
from mcir.objective.reconstruction import Reconstruction
from mcir.objective.spn import SPNConfig
from mcir.parallel.accelerator import precision_of, strategy
from mcir.restoration.inference import is_out_of_memory
from mcir.train.engine import Engine, build_engine
from mcir.train.tracking import memory_gib

PARTS = {
    "data": "waiting for data",
    "target": "target, forward and backward",
    "negatives": "negatives, forward",
    "features": "features and losses, forward and backward",
    "optimizer": "optimizer",
    "update": "update of the negatives that are due",
    "other": "EMA and the rest",
}


class Stopwatch:
    """Time by part: what `begin` names lasts until the next name. On a GPU the device's own time; reading waits for
    it, marking does not."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = []

    def begin(self, part: str) -> None:
        if self.device.type != "cuda":
            self._marks.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((part, event))

    def read(self) -> list[dict[str, float]]:
        """Seconds by part of each step: a step begins with `data`. The last one must have been ended by `data` too."""
        _wait(self.device)
        steps: list[dict[str, float]] = []
        for (part, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if part == "data":
                steps.append(defaultdict(float))
            steps[-1][part] += start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
        self._marks.clear()
        return steps


@contextmanager
def watched(engine: Engine, watch: Stopwatch) -> Iterator[None]:
    """Has `watch` told where the parts of the engine's steps begin."""
    update, inner = engine.negatives.update, engine.optimizer
    while not isinstance(inner, torch.optim.Optimizer) or hasattr(inner, "optimizer"):
        inner = inner.optimizer

    def timed_update(step: int, error: Tensor | None = None) -> None:
        watch.begin("update")
        update(step, error)
        watch.begin("other")

    def backward_reaches_target(module: nn.Module, given: Any, restored: Tensor) -> None:
        images_of(restored)[0].register_hook(lambda gradient: watch.begin("target"))

    engine.negatives.update = timed_update  # type: ignore[method-assign]
    handles = [
        engine.model.register_forward_pre_hook(lambda *_: watch.begin("target")),
        engine.model.register_forward_hook(backward_reaches_target),
        engine.negatives.register_forward_pre_hook(lambda *_: watch.begin("negatives")),
        engine.objective.register_forward_pre_hook(lambda *_: watch.begin("features")),
        inner.register_step_pre_hook(lambda *_: watch.begin("optimizer")),
        inner.register_step_post_hook(lambda *_: watch.begin("other")),
    ]
    yield
    engine.negatives.update = update  # type: ignore[method-assign]
    for handle in handles:
        handle.remove()


class Reference:
    """A straightforward contrastive step, as the published pseudo-code reads: the restored image's features are
    computed again for each negative, in fp32 and the default layout, with torch's default optimizer and the network as
    its authors published it."""

    def __init__(self, engine: Engine) -> None:
        config, device = engine.config, engine.accelerator.device
        contrast = config.objective.contrast
        assert isinstance(contrast, SPNConfig)
        assert engine.objective.weight is not None
        self.weight = engine.objective.weight
        self.reconstruction = Reconstruction(config.objective.reconstruction).to(device)
        self.net = as_published(config.arch.build()).to(device).train()
        self.negatives = [deepcopy(self.net).requires_grad_(False).eval() for _ in contrast.negatives]
        self.features = contrast.features.build().to(device)
        self.features.layers.to(memory_format=torch.contiguous_format)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optim.optimizer.name]
        self.optimizer = kind(self.net.parameters(), lr=1e-6)

    def step(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        precision = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")  # torch's defaults
        torch.backends.cudnn.allow_tf32 = True
        try:
            return self._step(batches)
        finally:  # it may not fit, and what is timed next is ours
            torch.set_float32_matmul_precision(precision[0])
            torch.backends.cudnn.allow_tf32 = precision[1]

    def _step(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        mean = torch.zeros((), device=batches[0].clean.device)
        for batch in batches:
            restored, *others = images_of(self.net(batch.degraded))
            total = torch.zeros((), device=batch.clean.device)
            for image in (restored, *others):
                total = total + sum(self.reconstruction(image, reduced(batch.clean, image)).values()).mean()
            for negative in self.negatives:
                with torch.no_grad():
                    past = self._observe(negative(batch.degraded))
                for weight, a, p in zip(self.features.tap_weights, self._observe(restored), past, strict=True):
                    total = total - self.weight.value / len(self.negatives) * weight * F.l1_loss(a, p)
            (total / len(batches)).backward()
            mean += total.detach() / len(batches)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"total": mean}

    def _observe(self, image: Tensor) -> list[Tensor]:
        x, taps = (image - self.features.mean) / self.features.std, []
        for i, layer in enumerate(self.features.layers):
            x = layer(x)
            if i in self.features.taps:
                taps.append(x)
        return taps


def bench(config: RunConfig, steps: int = 20, rounds: int = 5, compare: bool = True) -> dict[str, Any]:
    """Times `steps` steps with the loader, then `rounds` rounds of steps of mcir, plain and reference in turns (without
    `compare` of mcir alone). Collective.

    Several processes leave the reference out: it knows no other process. Times are in milliseconds, of rank 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(config, folder)
        config = engine.config
        device = engine.accelerator.device
        batches = iter(engine.loader)
        start = time.perf_counter()
        for _ in range(3):  # compiled, cached, tuned, workers started
            engine.step(_take(batches, config.num_micro_batches))
        _wait(device)
        warmup = time.perf_counter() - start
        whole, watch = time.perf_counter(), Stopwatch(device)
        with watched(engine, watch):
            for _ in range(steps):
                watch.begin("data")
                micro_batches = _take(batches, config.num_micro_batches)
                watch.begin("other")
                engine.step(micro_batches)
            watch.begin("data")
            timed = watch.read()
        whole = time.perf_counter() - whole
        memory = memory_gib(device)
        all_due = partial(engine.negatives.update, 0, torch.zeros((), device=device))
        update = _milliseconds(all_due, device, 3) if len(engine.negatives.nets) else None
        fixed = _take(batches, config.num_micro_batches)
        del batches, micro_batches  # ends the workers

        variants: dict[str, Callable[[Sequence[Batch]], Any]] = {"mcir": engine.step}
        if compare and len(engine.negatives.nets):
            variants["plain"] = open_engine(_plain(config), folder).step
            if engine.accelerator.num_processes == 1 and isinstance(config.objective.contrast, SPNConfig):
                variants["reference"] = Reference(engine).step
        engine.forget_recordings()  # operator by operator a step needs its memory beside theirs
        flops, operators, wanted = dict[str, int](), dict[str, int](), set(variants)
        for name in list(variants):
            try:
                flops[name] = count_flops(variants[name], fixed)
                operators[name] = count_operators(variants[name], fixed)
            except (RuntimeError, MemoryError) as error:
                if name == "mcir" or not is_out_of_memory(error):
                    raise
                del variants[name]
        rates: dict[str, list[float]] = {name: [] for name in variants}
        for i in range(rounds + 1):
            for name, step in variants.items():
                took = _milliseconds(lambda: step(fixed), device, 1 if i == 0 else 3)  # noqa: B023
                rates[name] += [took] if i else []  # the first round warms up
    step_ms = [1e3 * sum(step.values()) for step in timed]
    parts_ms = {p: 1e3 * statistics.fmean(step.get(p, 0.0) for step in timed) for p in PARTS}
    ms = {name: statistics.median(taken) for name, taken in rates.items()}
    return {
        "name": config.name,
        "network": config.arch.name,
        "parameters": sum(p.numel() for p in engine.validation.replica.parameters()),
        "negatives": len(engine.negatives.nets),
        "batch_size": config.batch_size,
        "crop_size": config.data.crop_size,
        "precision": precision_of(engine.accelerator),
        "compile": config.compute.compile,
        "strategy": strategy(engine.accelerator),
        "num_processes": engine.accelerator.num_processes,
        "device": device_name(device),
        "torch": torch.__version__,
        "warmup_s": warmup,
        "images_per_s": steps * config.batch_size / whole,
        "step_ms": statistics.median(step_ms),
        "step_ms_quartiles": statistics.quantiles(step_ms, n=4)[::2] if len(step_ms) > 1 else step_ms * 2,
        "data_wait": parts_ms["data"] / sum(parts_ms.values()),
        "parts_ms": parts_ms,
        "update_ms": update,
        "memory_gib": memory,
        "flops": flops,
        "operators": operators,
        "mfu": utilisation(flops["mcir"], ms["mcir"], device_name(device), precision_of(engine.accelerator)),
        "out_of_memory": sorted(wanted - set(ms)),
        "compared_ms": ms,
        "compared_ms_range": {name: [min(taken), max(taken)] for name, taken in rates.items()},
    }


def as_published(net: nn.Module) -> nn.Module:
    """The module that ours computes faster than, with the same weights, where spandrel has it (SwinIR, NAFNet)."""
    import spandrel

    try:
        found = spandrel.ModelLoader("cpu").load_from_state_dict(net.state_dict()).model
    except spandrel.UnsupportedModelError:
        return net
    return found.requires_grad_() if isinstance(net, type(found)) else net


def open_engine(config: RunConfig, folder: str) -> Engine:
    """The engine of a fresh run without validation, in a folder that will be gone."""
    return build_engine(config.model_copy(update={"runs_dir": folder, "validation": None, "init_from": None}))


def report(result: dict[str, Any]) -> Iterator[str | Table]:
    """What to print: the parts of a step, then the step beside plain and reference."""
    r = result
    yield (
        f"{r['name']}: {r['network']}, {r['parameters']:,} parameters, {r['negatives']} negatives, batch "
        f"{r['batch_size']}, crop {r['crop_size']}, {r['precision']}, {r['strategy']} x {r['num_processes']} on "
        f"{r['device']}"
    )
    parts = Table("part", "ms/step", "share")
    for part, meaning in PARTS.items():
        took = r["parts_ms"][part]
        parts.add_row(meaning, f"{took:.2f}", f"{took / sum(r['parts_ms'].values()):.1%}")
    parts.add_section()
    low, high = r["step_ms_quartiles"]
    parts.add_row("step, median (half of them)", f"{r['step_ms']:.2f}", f"{low:.4g} to {high:.4g}")
    yield parts
    utilisation = "" if r["mfu"] is None else f" ({r['mfu']:.0%} of the device's peak)"
    yield (
        f"{r['images_per_s']:.4g} images/s, waiting for data {r['data_wait']:.1%}, peak memory {r['memory_gib']:.3g} "
        f"GiB, {r['flops']['mcir'] / 1e9:.4g} GFLOP and "
        f"{r['operators']['mcir']:,} operators a step{utilisation}; the first three steps {r['warmup_s']:.2g} s"
    )
    if r["update_ms"] is not None:
        share = r["update_ms"] / 100 / r["step_ms"]
        yield f"update of all negatives at once {r['update_ms']:.3g} ms: {share:.2%} of the time at update_every 100"
    for name in r["out_of_memory"]:
        yield f"the {name} step does not fit into memory"
    ms, flops = r["compared_ms"], r["flops"]
    if "plain" not in ms:
        return
    compared = Table("", "ms (range)", "GFLOP", "time", "GFLOP", "time")
    for column, base in zip(compared.columns[3:], ("plain", "plain", "reference"), strict=True):
        column.header = f"{column.header}\n/ {base}"
    for name, took in ms.items():
        least, most = r["compared_ms_range"][name]
        compared.add_row(
            name,
            f"{took:.1f} ({least:.1f}-{most:.1f})",
            f"{flops[name] / 1e9:.4g}",
            f"{took / ms['plain']:.2f}",
            f"{flops[name] / flops['plain']:.2f}",
            f"{took / ms['reference']:.2f}" if "reference" in ms else "",
        )
    yield compared


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _plain(config: RunConfig) -> RunConfig:
    objective = config.objective.model_copy(update={"contrast": None})
    return config.model_copy(update={"objective": objective, "name": f"{config.name}_plain"})


def _take(batches: Iterator[Batch], num: int) -> list[Batch]:
    return list(islice(batches, num))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _milliseconds(work: Callable[[], Any], device: torch.device, times: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    _wait(device)
    return 1e3 * (time.perf_counter() - start) / times
