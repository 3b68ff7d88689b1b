"""What a run holds on each process, by strategy, before anything is launched.

Weights are counted (fp32: P parameters are 4 P bytes, gradients 4 P, Adam's moments 8 P) and activations are measured
on the meta device: the tensors that autograd would keep for one micro-batch, through the network and the features.
Left out: the caching allocator's slack, kernels' workspaces, communication buffers and, in the host's memory, the copy
that a save is written from (`State.save`).
"""

import math
import os
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table
from torch import Tensor, nn

from mcir.archs.base import checkpoint_activations, images_of
from mcir.config import RunConfig
from mcir.errors import UserError
from mcir.objective.objective import Objective
from mcir.parallel.accelerator import strategy
from mcir.restoration.memory import limits

USABLE = 0.8
"""Share of a device's memory that `accumulate: auto` plans with; the rest is for what the plan leaves out."""
STRATEGIES = ("single", "ddp", "fsdp2", "hsdp", "zero2", "zero3")
NODE = 8
"""Processes that hsdp shards over; the nodes replicate."""


def plan(config: RunConfig, strategy: str, world_size: int) -> dict[str, int]:
    """Bytes on one process by part. `single` ignores `world_size`."""
    net = without_values(config)
    trained = 4 * sum(p.numel() for p in net.parameters() if p.requires_grad)
    whole = 4 * sum(t.numel() for t in [*net.parameters(), *net.buffers()])
    shards = 1 if strategy in ("single", "ddp") else min(NODE, world_size) if strategy == "hsdp" else world_size
    zero = strategy.startswith("zero")
    return {
        # ZeRO keeps an fp32 master beside the weights of the forward pass; ZeRO-2 keeps the latter whole
        "target": (whole if strategy != "zero3" else whole // shards) + trained // shards if zero else whole // shards,
        "gradients": trained // shards,
        "optimizer": 2 * trained // shards,
        "evaluation EMA": trained // shards if config.ema_decay else 0,
        "negatives": config.objective.num_negatives * whole,
        "validation and export copy": whole,
        "features": _bytes(Objective(_weightless(config)).parameters()),
        "activations": _activations(config, net, world_size if strategy != "single" else 1),
    }


def table(config: RunConfig, world_size: int) -> Table:
    """`plan` for every strategy, side by side."""
    plans = {strategy: plan(config, strategy, world_size) for strategy in STRATEGIES}
    columns = [s if s == "single" else f"{s} x {world_size}" for s in STRATEGIES]
    shown = Table("MiB on each process", *columns, title=f"{config.name}: {_parameters(config):,} parameters")
    for part in plans["single"]:
        shown.add_row(part, *(_mib(plans[strategy][part]) for strategy in STRATEGIES))
    shown.add_section()
    shown.add_row("in all", *(_mib(sum(plans[strategy].values())) for strategy in STRATEGIES))
    return shown


def micro_batches(config: RunConfig, accelerator: Accelerator, num_bytes: int | None = None) -> int:
    """`accumulate`, or where it is `auto` the fewest micro-batches of which each fits into every process's memory
    (`num_bytes`; by default the device's). A function of the hardware, not of what is free just now. Collective.

    Activations are planned in fp32, so autocast has room to spare. UserError: not even one sample fits.
    """
    if config.accumulate != "auto":
        return config.accumulate
    own = torch.tensor([device_bytes(accelerator) if num_bytes is None else num_bytes], device=accelerator.device)
    least, kind, world_size = int(accelerator.gather(own).min()), strategy(accelerator), accelerator.num_processes
    samples = math.gcd(*(phase.batch_size for phase in config.phases)) // world_size
    one = plan(config.model_copy(update={"accumulate": samples}), kind, world_size)
    rest = sum(one.values()) - one["activations"]
    for accumulate in (n for n in range(1, samples + 1) if samples % n == 0):
        if rest + samples // accumulate * one["activations"] <= USABLE * least:
            return accumulate
    raise UserError(
        f"accumulate: auto finds no micro-batch that fits: one sample and the weights need "
        f"{sum(one.values()) / 2**30:.3g} GiB under {kind}, of {least / 2**30:.3g} GiB a process; set "
        "compute.checkpoint_activations, a smaller data.crop_size, or launch with fsdp2 or zero3"
    )


def device_bytes(accelerator: Accelerator) -> int:
    """Memory of this process's device; on the CPU its share of the machine's or container's."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_properties(accelerator.device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *limits()]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _activations(config: RunConfig, net: nn.Module, world_size: int) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of one micro-batch."""
    kept: dict[int, Tensor] = {}
    own = {id(p) for p in net.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept[id(tensor)] = tensor
        return tensor

    if config.compute.checkpoint_activations:
        checkpoint_activations(net, config.arch.descriptor)
    largest = max(config.phases, key=lambda phase: phase.batch_size * phase.crop_size**2)
    side = largest.crop_size // config.arch.descriptor.scale
    batch = max(1, largest.batch_size // config.num_micro_batches // world_size)
    contrast = config.objective.contrast
    num_images = len(contrast.roles) + len(config.objective.columns) if contrast else 0
    with torch.device("meta"):
        degraded = torch.empty(batch, 3, side, side)
        clean = torch.empty(batch, 3, largest.crop_size, largest.crop_size)
        objective = Objective(_weightless(config)).to("meta").eval()
        own |= {id(t) for t in [*objective.parameters(), *objective.buffers()]}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            try:
                restored, *others = images_of(net.train()(degraded))
            except RuntimeError as error:
                problem = str(error).partition("\n")[0]
                raise UserError(
                    f"the memory of this network cannot be planned, since it looks at values ({problem}): set "
                    "accumulate to a number and train without --dry-run"
                ) from error
            objective(restored, clean, degraded, [clean] * num_images, others=others)
    return _bytes(kept.values())


def _weightless(config: RunConfig) -> Any:
    """The objective with features that need no file and no network."""
    objective = config.objective
    if objective.contrast is None:
        return objective
    features = objective.contrast.features.model_copy(update={"weights": "random"})
    return objective.model_copy(update={"contrast": objective.contrast.model_copy(update={"features": features})})


def without_values(config: RunConfig) -> nn.Module:
    """The network on the meta device. It is built on the CPU first: some read values while they are built."""
    return config.arch.build().to("meta")


def _parameters(config: RunConfig) -> int:
    return sum(p.numel() for p in config.arch.build().parameters())


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"
