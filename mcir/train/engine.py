"""The loop. One network, its negatives, one objective; every decision is a function of the step or agreed by all
ranks."""

import logging
import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn

from mcir.archs.base import checkpoint_activations, compile_blocks, convolve_in_channels_last, images_of
from mcir.config import RunConfig, require_shared
from mcir.data.loader import Batch, Loader
from mcir.data.stages import phase_of
from mcir.errors import UserError
from mcir.evaluation.evaluate import try_first
from mcir.objective.negatives import Negatives, restoration_error
from mcir.objective.objective import Objective
from mcir.parallel.accelerator import (
    AUTOCAST,
    autocast,
    build_accelerator,
    clip_and_guard,
    precision_of,
    set_micro_batches,
    strategy,
)
from mcir.parallel.scaling import LossScale
from mcir.parallel.shards import align_replicas, broadcast_from_first, cuts_weights, unwrapped
from mcir.train import offsite, runs
from mcir.train.checkpoint import Checkpoint, Checkpointer
from mcir.train.ema import EMA
from mcir.train.graphs import operator_by_operator, record_graphs
from mcir.train.log import log_save, log_step
from mcir.train.memory import micro_batches
from mcir.train.optim import set_lr
from mcir.train.record import Record
from mcir.train.state import State
from mcir.train.steady import Pace, SteadyCollector
from mcir.train.stop import FAILED, StopRequest
from mcir.train.trackers import require_installed
from mcir.train.tracking import Meter, Tracker
from mcir.train.trial import require_still_shared, try_network
from mcir.train.validation import Validation
from mcir.train.watch import Watch
from mcir.weights.files import load_into
from mcir.weights.remote import fetch_all

log = logging.getLogger(__name__)


class Engine:
    """A run: what is trained, and how far it is. `step` is one optimizer step, `fit` the whole run."""

    run_dir: Path
    record: Record
    checkpointer: Checkpointer
    init_from: str | None
    """Where the weights came from that the run begins with, if any."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, resumes: bool = False) -> None:
        self.config, self.accelerator = config, accelerator
        self.arch = config.arch
        if config.compute.cudnn_benchmark and accelerator.device.type != "cuda":
            raise UserError("compute.cudnn_benchmark: a CPU has no cuDNN: set it to false")
        torch.backends.cudnn.benchmark = config.compute.cudnn_benchmark
        set_seed(config.seed)  # the same on all ranks: FSDP2 shards each rank's own copy of the initial weights
        net = self._build_net(resumes)
        moving = [try_network(net, config, accelerator)]
        broadcast_object_list(moving)
        self.moving = moving[0]
        contrast = config.objective.contrast
        per_image = getattr(contrast, "negatives_per_image", "all")
        self.negatives = Negatives(net, contrast.negatives if contrast else (), self.arch.build, per_image)
        self.validation = Validation(net)
        self.objective = Objective(config.objective, len(config.data.train)).to(accelerator.device)
        if accelerator.is_main_process and contrast and contrast.features.weights == "random":
            log.warning(
                "the features have random weights (seeded He initialisation): these are not the network's numbers"
            )
        self._lay_out(net)
        optimizer = config.optim.optimizer.build(net.parameters())
        self._compile(net)
        self.recorded = (
            record_graphs(accelerator, net, self.negatives, self.objective) if config.compute.cuda_graphs else []
        )
        names = [name for name, _ in net.named_parameters()]
        self.model, self.optimizer = accelerator.prepare(net, optimizer)
        require_still_shared(names, unwrapped(accelerator, self.model))
        align_replicas(self.model)
        self.model.train()
        decay, warmup = config.ema_decay, config.ema_warmup
        self.ema = EMA(accelerator, self.model, self.optimizer, decay, warmup) if decay else None
        self.negatives.sync(accelerator, self.model, self.ema.full if self.ema else None)
        # features and an embedding with random weights: other CPUs may draw other last digits
        broadcast_from_first(accelerator, [*self.objective.parameters(), *self.objective.buffers()])
        self.loader = Loader(
            config.data,
            scale=self.arch.descriptor.scale,
            batch_size=config.batch_size,
            accumulate=config.num_micro_batches,
            stages=config.stages,
            seed=config.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            columns=config.objective.columns,
            device=accelerator.device,
        )
        if config.validation:
            try_first(config.validation, self.arch.descriptor.scale, self.accelerator.device)
        self.state = State(
            accelerator, config, self.model, self.optimizer, self.negatives, self.objective, self.ema, self.loader
        )
        self.state.loss_scale = LossScale(accelerator, self.optimizer) if precision_of(accelerator) == "fp16" else None
        self.state.watch = Watch(config.watch, accelerator.device) if config.watch else None
        self.state.skipped_in_a_row = torch.zeros((), device=accelerator.device)
        self.most_skipped = torch.zeros((), device=accelerator.device)
        self.pace = Pace(accelerator.device)

    def _build_net(self, resumes: bool) -> nn.Module:
        """The network with the weights that the run begins from, on the CPU."""
        net, self.init_from = self.arch.build(), None
        if self.config.init_from and not resumes:  # a checkpoint replaces them, and they may be gone
            (fetched,) = fetch_all([self.config.init_from], accelerator=self.accelerator)
            report, self.init_from = load_into(net, fetched.path, min_share=self.config.init_share), fetched.origin
            if self.accelerator.is_main_process:
                print(report)
        return net

    def _lay_out(self, net: nn.Module) -> None:
        """Give target, negatives and replica the memory format to compute in, and the target its device where no
        strategy cuts its weights and sees to both."""
        channels_last = self.config.compute.channels_last
        if channels_last is None:
            channels_last = self.arch.descriptor.channels_last and self.accelerator.device.type == "cuda"
        whole, cut = [self.negatives.nets, self.validation.replica], cuts_weights(self.accelerator)
        if not cut:
            whole.append(net.to(self.accelerator.device))
        elif channels_last:
            convolve_in_channels_last(net)
        for module in whole if channels_last else ():
            module.to(memory_format=torch.channels_last)

    def _compile(self, net: nn.Module) -> None:
        """Have what the config says computed again or compiled; before anything wraps the network."""
        compute = self.config.compute
        if compute.checkpoint_activations:
            checkpoint_activations(net, self.arch.descriptor)
        if not compute.compile:
            return
        if strategy(self.accelerator) == "zero3":
            raise UserError(
                "compute.compile: not under zero3, whose hooks gather each layer's weights and are no part of a "
                "graph: launch with fsdp2 or zero2, or set it to false"
            )
        for module in [net, *self.negatives.nets]:
            compile_blocks(module, self.arch.descriptor)
        if self.accelerator.device.type == "cuda":  # on a CPU that does not pay
            self.objective.compile_passes()

    def __str__(self) -> str:
        size = sum(p.numel() for p in self.validation.replica.parameters())
        processes = f"{strategy(self.accelerator)} x {self.accelerator.num_processes}"
        precision = precision_of(self.accelerator)
        return f"{self.arch.name}, {size:,} parameters, {len(self.negatives.nets)} negatives, {precision}, {processes}"

    def step(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """One optimizer step on `accumulate` micro-batches, then EMA and negatives. Collective, without a host sync.

        Returns the mean losses of this rank, the gradient norm and whether the step was skipped, on the device.
        """
        self.state.step += 1
        self.state.measured = {}
        optim, scale = self.config.optim, self.state.loss_scale
        set_lr(self.optimizer, optim.lr(self.state.step, self.config.steps))
        found: list[Tensor] = []
        for i, batch in enumerate(batches):
            # Dropout and drop path are functions of the step, so a resumed run draws what an uninterrupted one draws.
            place = (self.config.seed, self.state.step, i, self.accelerator.process_index)
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
            with self.accelerator.accumulate(self.model):
                losses = self._losses(batch, place[:-1])
                total = losses["total"] * self.state.watch.gate if self.state.watch else losses["total"]
                self.accelerator.backward(scale(total) if scale else total)
                if self.accelerator.sync_gradients:
                    norm, skipped = clip_and_guard(
                        self.accelerator, self.model, self.optimizer, optim.max_grad_norm, scale
                    )
                self.optimizer.step()
                self.optimizer.zero_grad()
            found.append(torch.stack([value.detach() for value in losses.values()]))
        if self.moving and self.accelerator.num_processes > 1:
            buffers = dict(unwrapped(self.accelerator, self.model).named_buffers())
            broadcast_from_first(self.accelerator, [buffers[name] for name in self.moving])
        self.state.skipped_in_a_row = (self.state.skipped_in_a_row + skipped) * skipped
        self.most_skipped = torch.maximum(self.most_skipped, self.state.skipped_in_a_row)
        if self.ema:
            self.ema.update(self.state.step)
        means = torch.stack(found).mean(0)
        # Gathered and not reduced: all ranks add the same numbers in the same order, and decide the same by them.
        gathered = self.accelerator.gather(means[None]).mean(0)
        agreed = dict(zip(losses, gathered.unbind(), strict=True))
        self.negatives.update(self.state.step, agreed.get("error"))
        self.objective.follow(agreed)
        if self.state.watch:
            self.state.watch.see(self.state.step, agreed["reconstruction"], agreed.get("contrast"), norm)
        return {**dict(zip(losses, means.unbind(), strict=True)), "grad_norm": norm, "skipped": skipped}

    def _losses(self, batch: Batch, place: tuple[int, int, int]) -> dict[str, Tensor]:
        """Of one micro-batch on this rank, with gradients; `place` (seed, step, micro-batch) seeds what the negatives
        draw."""
        if lacks_samples := batch.weight != 1:  # and so has a size of its own, beside which recordings may not fit
            self.forget_recordings()
        with autocast(self.accelerator), self.pace, operator_by_operator() if lacks_samples else nullcontext():
            restored, *others = images_of(self.model(batch.degraded))  # (B, 3, s * H, s * W)
            past = [*self.negatives(batch.degraded, place), *batch.extra]
            losses = self.objective(restored, batch.clean, batch.degraded, past, batch.source, others)
            if self.negatives.has_triggers:
                losses["error"] = restoration_error(restored, batch.clean)
            return {name: value * batch.weight for name, value in losses.items()} if lacks_samples else losses

    def forget_recordings(self) -> None:
        """Give the memory of CUDA graphs back; the next step records them again."""
        for recorded in self.recorded:
            recorded.forget()
        if self.recorded:
            torch.cuda.empty_cache()

    def fit(self) -> int:
        """Train from where the run is to its end or to a stop signal; the exit code. Collective."""
        config = self.config
        if self.state.step >= config.steps:
            with self.record:
                self.record.end(0, self.state.step)
            if self.accelerator.is_main_process:
                print(f"{self.run_dir}: nothing is left to do, {self.state.step} of {config.steps} steps are made")
            return 0
        meter, batches = Meter(), iter(self.loader)
        tracker = Tracker(self.accelerator, config, self.run_dir, self.record, self.state.step + 1)
        stopping = StopRequest(self.accelerator, config.compute.timeout_s)
        with self.record, tracker, SteadyCollector() as collector, stopping as stop, self.checkpointer:
            tracker.message(f"{self.run_dir}: {self}; {tracker.curves}")
            exit_code = 0
            if self.state.owes_validation and config.validation:
                with meter.pause():
                    self.validation.run(config.validation, self.state, tracker, self.record, last=False)
            while self.state.step < config.steps and not exit_code:
                phase = phase_of(config.phases, self.state.step + 1)
                if 0 < phase.step == self.state.step:
                    self.checkpointer.join()  # the phase's loader processes, forked now, would hold on to its memory
                    if config.compute.compile:
                        torch.compiler.reset()  # graphs of this size instead of slower ones for any size
                    self.forget_recordings()
                waited = time.perf_counter()
                micro_batches = [next(batches) for _ in range(config.num_micro_batches)]
                waited = time.perf_counter() - waited
                meter.add(self.step(micro_batches), phase.batch_size, waited)
                tracker.advance()
                collector.collect(self.state.step)
                self.record.keep_fresh(self.state.step)
                exit_code = stop.agreed(self.checkpointer.failed)
                if exit_code == FAILED:
                    self.checkpointer.join()  # raises what went wrong
                last = self.state.step == config.steps
                save = last or exit_code or self.state.step % config.checkpoint.every == 0
                if last or exit_code or self.state.step % config.tracking.log_every == 0:
                    log_step(self, tracker, meter)
                due = config.validation is not None and self.state.step % config.validation.every == 0
                self.state.owes_validation = bool(due and exit_code and not last)  # there is time to save, no more
                if config.validation and (last or due) and not self.state.owes_validation:
                    with meter.pause():
                        best = self.validation.run(config.validation, self.state, tracker, self.record, last)
                    save = save or (best and config.checkpoint.keep_best)
                if save:
                    with meter.pause():
                        path = self.state.save(self.checkpointer)
            self.checkpointer.join()
            log_save(self, tracker)
            if exit_code:
                tracker.message(f"stopped at step {self.state.step}, saved {path}; go on with --resume auto")
            self.record.end(exit_code, self.state.step)
            self.accelerator.wait_for_everyone()  # a launcher may end all when the first process has ended
        return exit_code

    def begin(self, start: runs.Start) -> None:
        """Open the run directory: from now on a run is there. Collective."""
        self.record = runs.begin(self.config, self.accelerator, start, self.init_from)
        self.run_dir = start.run_dir
        if self.state.best is None:
            self.record.update(best=None)
        folder, keep_last = self.run_dir / "checkpoints", self.config.checkpoint.keep_last
        owned, timeout_s = self.record.require_owned, self.config.compute.timeout_s
        copy = offsite.copier(self.config.checkpoint, self.run_dir)
        self.checkpointer = Checkpointer(self.accelerator, folder, keep_last, owned, timeout_s, copy)

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint. Collective."""
        replica = self.validation.replica
        once = dict(replica.named_parameters()) | dict(replica.named_buffers())  # saved under one name if shared
        self.state.load(checkpoint, {name: t.shape for name, t in replica.state_dict().items() if name in once})


def build_engine(config: RunConfig, resume: str = "never") -> Engine:
    """The run that a config describes, under the strategy of the launch file. Collective.

    `resume`: `never`, `auto`, or the path of a run or checkpoint (`runs.choose`).
    """
    require_shared(config, [int(os.environ.get("WORLD_SIZE", "1"))])
    batch_size = math.gcd(*(phase.batch_size for phase in config.phases))
    accelerator = build_accelerator(
        precision=config.compute.precision,
        blocks=config.arch.descriptor.blocks,
        batch_size=batch_size // config.num_micro_batches,
        max_grad_norm=config.optim.max_grad_norm,
        unused_parameters=config.arch.descriptor.unused_parameters,
        timeout_s=config.compute.timeout_s,
    )
    if (precision := precision_of(accelerator)) in AUTOCAST and not config.arch.descriptor.bf16:
        raise UserError(
            f"{config.arch.name} does not train in {precision}: set compute.precision to fp32 (and mixed_precision to "
            "no)"
        )
    if accelerator.is_main_process:
        require_installed(config.tracking.to)
    decay = getattr(config.optim.optimizer, "weight_decay", 0.0)
    if config.arch.descriptor.unused_parameters and decay and strategy(accelerator).startswith("zero"):
        raise UserError(
            "optim.optimizer.weight_decay: under ZeRO it would shrink the parameters that never get a gradient "
            "(arch.unused_parameters), as no other strategy does: set it to 0, or launch with ddp or fsdp2"
        )
    accumulate = micro_batches(config, accelerator)
    set_micro_batches(accelerator, batch_size // accumulate, accumulate)
    config = config.model_copy(update={"accumulate": accumulate})
    with runs.choose(accelerator, config.runs_dir, config.name, resume, config.checkpoint.to) as start:
        engine = Engine(config, accelerator, resumes=start.checkpoint is not None)
        if start.checkpoint:
            engine.load(start.checkpoint)
            if start.is_new:  # the best so far is another run's
                engine.state.best = None
        engine.loader.open()  # what cannot be read, or not from there on, is known before anything is written
        engine.begin(start)
    return engine
