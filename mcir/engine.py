"""The loop. One network, its negatives, one objective; every decision is a function of the step or agreed by all
ranks."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from mcir import runs
from mcir.archs.base import blocks_of, checkpoint_activations
from mcir.checkpoint import Checkpoint, Checkpointer, to_cpu
from mcir.config import RunConfig, dump
from mcir.data.loader import Batch, Loader
from mcir.ema import EMA
from mcir.errors import UserError
from mcir.evaluate import Picture, Scores, baseline, evaluate, try_first
from mcir.inference import infer
from mcir.losses.objective import Objective
from mcir.negatives import Negatives
from mcir.optim import set_lr
from mcir.parallel import autocast, build_accelerator, clip_and_guard, precision_of, strategy
from mcir.record import Record
from mcir.shards import full_moments, full_params, load_full_moments, load_full_params
from mcir.stop import StopRequest
from mcir.tracking import Meter, Tracker, comparison_png, memory_gib, results_table
from mcir.weights import load_into

log = logging.getLogger(__name__)


class Engine:
    """A run: what is trained, and how far it is. `step` is one optimizer step, `fit` the whole run."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, run_dir: Path, record: Record) -> None:
        self.config, self.accelerator, self.run_dir, self.record = config, accelerator, run_dir, record
        self.arch = config.arch
        set_seed(config.seed)  # the same on all ranks: FSDP2 shards each rank's own copy of the initial weights
        net = self.arch.build()
        if config.init_from:
            report = load_into(net, Path(config.init_from))
            if accelerator.is_main_process:
                print(report)
        channels_last = config.compute.channels_last
        if channels_last is None:
            channels_last = self.arch.descriptor.channels_last and accelerator.device.type == "cuda"
        if channels_last:
            net = net.to(memory_format=torch.channels_last)
        spn = config.objective.spn
        self.negatives = Negatives(net, spn.negatives if spn else (), init=self.arch.build)
        self.objective = Objective(config.objective).to(accelerator.device)
        if accelerator.is_main_process and spn and spn.features.weights == "random":
            log.warning("the features have random weights (seeded He initialisation): these are not VGG's numbers")
        self.replica = deepcopy(net).requires_grad_(False).eval()  # validation and export need the weights whole
        optimizer = config.optim.optimizer.build(net.parameters())
        if config.compute.checkpoint_activations:
            checkpoint_activations(net, self.arch.descriptor)
        if config.compute.compile:
            for module in [net, *self.negatives.nets]:
                for block in blocks_of(module, self.arch.descriptor):
                    block.compile()
        self.model, self.optimizer = accelerator.prepare(net, optimizer)
        self.model.train()
        self.negatives.sync(accelerator, self.model)
        self.ema = EMA(accelerator, self.model, self.optimizer, config.ema_decay) if config.ema_decay else None
        self.loader = Loader(
            config.data,
            scale=self.arch.descriptor.scale,
            batch_size=config.batch_size // config.accumulate,
            seed=config.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            device=accelerator.device,
        )
        self.checkpointer = Checkpointer(accelerator, run_dir / "checkpoints", config.checkpoint.keep_last)
        self.num_steps = 0
        self.measured: dict[str, float] = {}  # of the weights as they are now, for the files' metadata
        self.best: tuple[float, str] | None = None  # value of the deciding metric, checkpoint that reached it
        self.skipped_in_a_row = self.most_skipped = torch.zeros((), device=accelerator.device)

    def __str__(self) -> str:
        size = sum(p.numel() for p in self.replica.parameters())
        processes = f"{strategy(self.accelerator)} x {self.accelerator.num_processes}"
        return f"{self.arch.name}, {size:,} parameters, {len(self.negatives.nets)} negatives, {processes}"

    def step(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """One optimizer step on `accumulate` micro-batches, then EMA and negatives. Collective, without a host sync.

        Returns the mean losses of this rank, the gradient norm and whether the step was skipped, on the device.
        """
        self.num_steps += 1
        self.measured = {}
        optim = self.config.optim
        set_lr(self.optimizer, optim.lr(self.num_steps, self.config.steps))
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            # Dropout and drop path are functions of the step, so a resumed run draws what an uninterrupted one draws.
            place = (self.config.seed, self.num_steps, i, self.accelerator.process_index)
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
            with self.accelerator.accumulate(self.model):
                with autocast(self.accelerator):
                    restored = self.model(batch.degraded)  # (B, 3, s * H, s * W)
                    losses = self.objective(restored, batch.clean, self.negatives(batch.degraded))
                self.accelerator.backward(losses["total"])
                if self.accelerator.sync_gradients:
                    norm, skipped = clip_and_guard(self.accelerator, self.model, self.optimizer, optim.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(batches)
        self.skipped_in_a_row = (self.skipped_in_a_row + skipped) * skipped
        self.most_skipped = torch.maximum(self.most_skipped, self.skipped_in_a_row)
        if self.ema:
            self.ema.update()
        self.negatives.update(self.num_steps)
        return {**sums, "grad_norm": norm, "skipped": skipped}

    def fit(self) -> int:
        """Train from where the run is to its end or to a stop signal; the exit code. Collective."""
        config = self.config
        if self.num_steps >= config.steps:
            self.record.end(0, self.num_steps)
            return 0
        meter, batches = Meter(config.batch_size), iter(self.loader)
        tracker = Tracker(self.accelerator, self.run_dir, self.num_steps + 1, config.steps)
        with self.record, tracker, StopRequest(self.accelerator, config.compute.timeout_s) as stop:
            tracker.message(f"{self.run_dir}: {self}; curves: tensorboard --logdir {self.run_dir.parent}")
            if config.validation:
                try_first(config.validation.sets, self.arch.descriptor.scale)
            exit_code = 0
            while self.num_steps < config.steps and not exit_code:
                waited = time.perf_counter()
                micro_batches = [next(batches) for _ in range(config.accumulate)]
                waited = time.perf_counter() - waited
                meter.add(self.step(micro_batches), waited)
                tracker.advance()
                exit_code = stop.agreed()
                last = self.num_steps == config.steps
                if last or exit_code or self.num_steps % config.tracking.log_every == 0:
                    self._log(tracker, meter)
                if config.validation and (last or self.num_steps % config.validation.every == 0):
                    self._validate(tracker, last)
                    meter.reset()
                if last or exit_code or self.num_steps % config.checkpoint.every == 0:
                    path = self.save()
                    meter.reset()
                    if exit_code:
                        tracker.message(f"stopped at step {self.num_steps}, saved {path}; go on with --resume auto")
            self.record.end(exit_code, self.num_steps)
            self.accelerator.wait_for_everyone()  # a launcher may end all when the first process has ended
        return exit_code

    def _log(self, tracker: Tracker, meter: Meter) -> None:
        values, speed, wait = meter.read(self.accelerator)
        if self.most_skipped > self.config.optim.max_skipped:
            last = self.checkpointer.latest()
            raise UserError(
                f"the gradient was not finite in {int(self.most_skipped)} steps in a row, up to step {self.num_steps} "
                f"(more than optim.max_skipped); the last good checkpoint is {last.path if last else 'none'}. "
                "Lower the learning rate, set optim.max_grad_norm, or look at the data"
            )
        losses: dict[str, float] = {n: values.pop(n) for n in ("total", "reconstruction", "spn") if n in values}
        scalars = {f"loss/{name}": value for name, value in losses.items()}
        scalars |= {f"optim/{name}": value for name, value in values.items()}
        scalars |= {f"negatives/age_{k}": float(age) for k, age in enumerate(self.negatives.age(self.num_steps))}
        scalars |= {
            "optim/lr": self.config.optim.lr(self.num_steps, self.config.steps),
            "speed/images_per_s": speed,
            "speed/data_wait": wait,
            "speed/memory_gib": memory_gib(self.accelerator.device),
            "data/skipped": float(self._num_skipped()),
        }
        tracker.scalars(self.num_steps, scalars)
        tracker.status(self.num_steps, losses, speed, wait)
        self.record.update(step=self.num_steps, images_per_s=speed)

    def _num_skipped(self) -> int:
        """Rows left out by all ranks. Collective."""
        own = torch.tensor([self.loader.num_skipped], device=self.accelerator.device)
        return int(self.accelerator.gather(own).sum())

    def _validate(self, tracker: Tracker, last: bool) -> None:
        validation = self.config.validation
        assert validation is not None
        self._fill_replica()
        results: dict[str, tuple[Scores, list[Picture]]] = {}
        for name, data in validation.sets.items():
            scores, pictures = evaluate(
                self.restore, data, self.arch.descriptor.scale, self.accelerator, self.config.tracking.num_images
            )
            results[name] = scores, pictures
            means = scores.mean()
            kind = "ema" if self.ema and validation.weights != "target" else "target"
            self.measured |= {f"{name}/{metric} ({kind})": round(value, 4) for metric, value in means.items()}
            tracker.scalars(self.num_steps, {f"validation/{name}/{metric}": value for metric, value in means.items()})
            tracker.pictures(self.num_steps, name, pictures, self._negative_pictures(pictures))
            tracker.message(f"step {self.num_steps}: {name} PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.4f}")
        where, metric = (validation.best or f"{next(iter(validation.sets))}/psnr").rsplit("/", 1)
        value = results[where][0].mean()[metric]
        if math.isfinite(value) and (self.best is None or value > self.best[0]):
            self.best = value, f"step-{self.num_steps:08d}"
            best = {"metric": f"{where}/{metric}", "value": value, "checkpoint": self.best[1]}
            self.record.update(step=self.num_steps, best=best)
            if self.config.checkpoint.keep_best and not last:
                self.save()
        if last:
            self._report(tracker, results)

    def _report(self, tracker: Tracker, results: dict[str, tuple[Scores, list[Picture]]]) -> None:
        assert self.config.validation is not None
        scale, table = self.arch.descriptor.scale, {}
        for name, (scores, pictures) in results.items():
            data = self.config.validation.sets[name]
            reference, reference_pictures = evaluate(baseline(scale), data, scale, self.accelerator, len(pictures))
            table[name] = reference, scores
            if self.accelerator.is_main_process and pictures:
                path = self.run_dir / f"{name}.png"
                comparison_png(path, pictures, reference_pictures)
                tracker.message(f"{name}: degraded | {'bicubic | ' if scale > 1 else ''}restored | clean in {path}")
        if self.accelerator.is_main_process:
            tracker.console.print(results_table("bicubic" if scale > 1 else "degraded", table))

    def restore(self, degraded: Tensor) -> Tensor:
        """The validated weights on one batch; no collective."""
        validation = self.config.validation
        return infer(self.replica, self.arch.descriptor, degraded, tile=validation.tile if validation else None)

    def _negative_pictures(self, pictures: Sequence[Picture]) -> list[Tensor]:
        if not len(self.negatives.nets) or not self.accelerator.is_main_process:
            return []
        net, device = self.negatives.nets[0], self.accelerator.device
        shown = (infer(net, self.arch.descriptor, picture.degraded[None].to(device))[0] for picture in pictures)
        return [image.float().clamp(0, 1).cpu() for image in shown]

    def _fill_replica(self) -> None:
        """Give the replica the weights that are validated and exported: the EMA's where there is one. Collective."""
        validation = self.config.validation
        use_ema = self.ema is not None and not (validation and validation.weights == "target")
        source = self.ema.full() if self.ema and use_ema else full_params(self.accelerator, self.model)
        self.replica.to(self.accelerator.device)
        _fill(self.replica, source)

    def save(self) -> Path:
        """Write a checkpoint of this moment and prune older ones. Collective."""
        accelerator, files = self.accelerator, dict[str, dict[str, Tensor]]()
        checksums = accelerator.gather(self.negatives.checksum().to(accelerator.device).reshape(1))
        if len(checksums.unique()) > 1:
            raise RuntimeError(f"the negatives differ between ranks at step {self.num_steps}: {checksums.tolist()}")
        main = accelerator.is_main_process
        model = _collect(full_params(accelerator, self.model), main)
        ema = _collect(self.ema.full(), main) if self.ema else {}
        if main:
            files = {"model.safetensors": model} | ({"ema.safetensors": ema} if ema else {})
            if len(self.negatives.nets):
                files["negatives.safetensors"] = _collect(self.negatives.nets.state_dict().items(), main)
        rank, world_size = accelerator.process_index, accelerator.num_processes
        mine: dict[str, Tensor] = {}
        for i, (key, tensor) in enumerate(full_moments(accelerator, self.model, self.optimizer)):
            if i % world_size == rank:
                mine[key] = to_cpu(tensor)
        files[f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors"] = mine
        state = {
            "step": self.num_steps,
            "position": self.loader.position,
            "order": self.loader.order,
            "best": self.best,
            "num_skipped": self._num_skipped(),
            "strategy": strategy(accelerator),
            "world_size": world_size,
        }
        config = self.config.model_dump(mode="json")
        metadata = {"arch": json.dumps(config["arch"]), "config": json.dumps(config), "step": str(self.num_steps)}
        metadata |= {"metrics": json.dumps(self.measured)} if self.measured else {}
        texts = {"state.json": json.dumps(state), "config.yaml": dump(self.config)}
        path = self.checkpointer.save(self.num_steps, files, texts, metadata)
        best = self.checkpointer.folder / self.best[1] if self.best and self.config.checkpoint.keep_best else None
        self.checkpointer.prune(best)
        return path

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, whatever strategy and number of processes wrote it. Collective."""
        state: dict[str, Any] = checkpoint.state
        model, moments = checkpoint.reader("model.safetensors"), checkpoint.reader("optimizer-*.safetensors")
        for key, own in self.replica.state_dict().items():
            saved = _strict(model, checkpoint)(key)
            if saved.shape != own.shape:
                shapes = f"{list(saved.shape)}, than the network's {list(own.shape)}"
                raise UserError(f"{checkpoint.path}: {key} has another shape, {shapes}")
        load_full_params(self.accelerator, self.model, _strict(model, checkpoint))
        load_full_moments(self.accelerator, self.model, self.optimizer, moments)
        if self.ema:
            has_ema = (checkpoint.path / "ema.safetensors").exists()
            ema = checkpoint.reader("ema.safetensors") if has_ema else model
            self.ema.load(_strict(ema, checkpoint))
        if len(self.negatives.nets):
            negatives = _strict(checkpoint.reader("negatives.safetensors"), checkpoint)
            self.negatives.nets.load_state_dict({key: negatives(key) for key in self.negatives.nets.state_dict()})
        self.num_steps, self.loader.position, self.loader.order = state["step"], state["position"], state["order"]
        self.loader.num_skipped = state["num_skipped"] if self.accelerator.is_main_process else 0
        self.best = tuple(state["best"]) if state["best"] else None


def build_engine(config: RunConfig, resume: str = "never") -> Engine:
    """The run that a config describes, under the strategy of the launch file. Collective.

    `resume`: `never`, `auto`, or the path of a run or checkpoint (`runs.choose`).
    """
    accelerator = build_accelerator(
        precision=config.compute.precision,
        accumulate=config.accumulate,
        blocks=config.arch.descriptor.blocks,
        batch_size=config.batch_size // config.accumulate,
        max_grad_norm=config.optim.max_grad_norm,
        unused_parameters=config.arch.descriptor.unused_parameters,
        timeout_s=config.compute.timeout_s,
    )
    if precision_of(accelerator) == "bf16" and not config.arch.descriptor.bf16:
        raise UserError(
            f"{config.arch.name} does not train in bf16: set compute.precision to fp32 (and mixed_precision to no)"
        )
    run_dir, checkpoint = runs.choose(accelerator, config.runs_dir, config.name, resume)
    with runs.begin(config, accelerator, run_dir, checkpoint) as record:
        engine = Engine(config, accelerator, run_dir, record)
        if checkpoint:
            engine.load(checkpoint)
    return engine


def _collect(whole: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Copies on the CPU of all tensors, or, on ranks that only take part in gathering them, nothing."""
    collected = {}
    for key, tensor in whole:
        if keep:
            collected[key] = to_cpu(tensor)
    return collected


def _fill(net: nn.Module, source: Iterator[tuple[str, Tensor]]) -> None:
    own = dict(net.named_parameters()) | dict(net.named_buffers())
    with torch.no_grad():
        for name, tensor in source:
            own[name].copy_(tensor)


def _strict(read: Callable[[str], Tensor | None], checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    def get(key: str) -> Tensor:
        tensor = read(key)
        if tensor is None:
            raise UserError(
                f"{checkpoint.path} has no {key}: it was saved by a run with another network or other negatives"
            )
        return tensor

    return get
