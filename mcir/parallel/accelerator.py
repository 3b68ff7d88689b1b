"""The strategy seam: one Accelerator from what the launch file says, checked; nothing here is guessed.

`accelerate launch --config_file launch/accelerate/NAME.yaml -m mcir train …` chooses ddp, fsdp2, zero2 or zero3 and
the number of processes. The `*_cpu.yaml` files rehearse the same strategies with gloo processes; they hide the GPUs
(CUDA_VISIBLE_DEVICES=-1,…), and without that sign a launch that finds no GPU is refused."""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch import Tensor, nn

from mcir.errors import UserError
from mcir.parallel.shards import is_sharded


def build_accelerator(
    *,
    precision: str | None = None,
    accumulate: int = 1,
    blocks: Sequence[str] = (),
    batch_size: int = 1,
    max_grad_norm: float | None = None,
    unused_parameters: bool = False,
    timeout_s: float = 1800,
) -> Accelerator:
    """The Accelerator for this process. Collective.

    Args:
        precision: `fp32` or `bf16`; None takes the launch file's `mixed_precision`. A contradiction is an error.
        accumulate: micro-batches in an optimizer step.
        blocks: class names of the network's repeated blocks, the units that FSDP2 shards.
        batch_size: samples in a micro-batch of all processes; they must be able to share it equally.
        max_grad_norm: what DeepSpeed must be told beforehand.
        unused_parameters: whether some parameters never get a gradient.
        timeout_s: after so many seconds a collective that a peer never reached ends the process.

    Raises:
        UserError: the launch leaves processes unsynchronised, or asks for what this machine does not have.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size % world_size:
        raise UserError(
            f"a micro-batch of {batch_size} cannot be shared equally by {world_size} processes: change batch_size"
        )
    rehearsal = _check_devices(world_size)
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if zero:
        _require_deepspeed()
    wanted = _precision(precision)
    _check_first_precision("no" if zero else wanted)
    process_group = InitProcessGroupKwargs(
        backend="gloo" if rehearsal and zero else None, timeout=timedelta(seconds=timeout_s)
    )
    if torch.cuda.is_available():
        # TF32, as cuDNN has by default: 10 bits of products' factors, fp32 sums. `infer` measures in full fp32.
        torch.set_float32_matmul_precision("high")
    fsdp_plugin = FullyShardedDataParallelPlugin() if fsdp else None
    if fsdp_plugin is not None and fsdp_plugin.fsdp_version != 2:
        raise UserError(
            "the launch file asks for FSDP1; set fsdp_config.fsdp_version to 2 (launch/accelerate/fsdp2.yaml)"
        )
    accelerator = Accelerator(
        cpu=rehearsal and not zero,
        # ZeRO gets autocast from DeepSpeed's torch_autocast, with fp32 weights like every other strategy: see below.
        mixed_precision="no" if zero else wanted,
        gradient_accumulation_steps=accumulate,
        fsdp_plugin=fsdp_plugin,
        project_config=ProjectConfiguration(automatic_checkpoint_naming=False),
        kwargs_handlers=[
            process_group,
            # Normalisation buffers are rank 0's wherever they leave the run (`full_params`), so no step broadcasts
            # them.
            DistributedDataParallelKwargs(
                broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=unused_parameters
            ),
        ],
    )
    if accelerator.num_processes != world_size:
        raise UserError(
            f"the launcher started {world_size} processes but they are not connected: each would train a copy "
            "of its own. Use a file of launch/accelerate/ (the *_cpu.yaml files on a machine without GPUs)"
        )
    if fsdp_plugin is not None:
        if rehearsal:
            _promote_to_fsdp(accelerator, fsdp_plugin)
        fsdp_plugin.transformer_cls_names_to_wrap = list(blocks)
        # bf16 is autocast, over fp32 weights, as under every other strategy; FSDP would cast whole blocks.
        fsdp_plugin.mixed_precision_policy = None
    if zero:
        deepspeed_config = accelerator.state.deepspeed_plugin.deepspeed_config
        deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size // world_size
        deepspeed_config["gradient_accumulation_steps"] = accumulate
        deepspeed_config["gradient_clipping"] = max_grad_norm or 0.0
        # Its default buckets of 5e8 elements would be larger than the networks trained here.
        deepspeed_config["zero_optimization"] |= {"reduce_bucket_size": 2**24, "allgather_bucket_size": 2**24}
        deepspeed_config["torch_autocast"] = {"enabled": wanted == "bf16", "dtype": "bfloat16"}
    return accelerator


def precision_of(accelerator: Accelerator) -> str:
    """`bf16` or `no`: what target, negatives and features compute in. Weights are fp32 either way."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        enabled = accelerator.state.deepspeed_plugin.deepspeed_config.get("torch_autocast", {}).get("enabled", False)
        return "bf16" if enabled else "no"
    return accelerator.mixed_precision


def autocast(accelerator: Accelerator) -> torch.autocast:
    """The precision of the target's forward pass, for what runs beside it."""
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=precision_of(accelerator) == "bf16")


def strategy(accelerator: Accelerator) -> str:
    """`single`, `ddp`, `fsdp2`, `zero1`, `zero2` or `zero3`."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    return "single" if accelerator.distributed_type == DistributedType.NO else "ddp"


def _check_devices(world_size: int) -> bool:
    """Whether this process rehearses on the CPU; refuses a GPU launch without GPUs."""
    if torch.cuda.is_available():
        return False
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # DeepSpeed, which Accelerate imports where it is installed, warns otherwise
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and not any(part.strip().isdigit() for part in visible.split(","))
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    if world_size > 1 and not (hidden or asked):
        raise UserError(
            f"{world_size} processes were launched for GPUs and no GPU is visible. To rehearse on the CPU use the "
            "*_cpu.yaml file of the same strategy in launch/accelerate/"
        )
    return True


def _precision(precision: str | None) -> str:
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision is None:
        if launched not in ("no", "bf16"):
            raise UserError(f"the launch file's mixed_precision is {launched}; mcir trains in bf16 or in fp32 (`no`)")
        return launched
    wanted = {"fp32": "no", "bf16": "bf16"}[precision]
    if launched == "bf16" and wanted == "no":
        raise UserError("compute.precision is fp32 and the launch file's mixed_precision is bf16: make them agree")
    return wanted


def _check_first_precision(wanted: str) -> None:
    """Accelerate keeps one precision a process, that of its first run, and would give it to this one."""
    if is_initialized() and (kept := AcceleratorState().mixed_precision) != wanted:
        now, before = ({"no": "fp32"}.get(name, name) for name in (wanted, kept))
        raise UserError(
            f"this run computes in {now} and an earlier one of this process in {before}, which Accelerate keeps: "
            "train each precision in a process of its own"
        )


def _require_deepspeed() -> None:
    try:
        import deepspeed  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"ZeRO needs {error.name}: install mcir[deepspeed]") from error


def _promote_to_fsdp(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Accelerate turns FSDP on for GPUs only; this does the same to connected CPU processes (accelerate 1.15,
    state.py)."""
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state._shared_state["fsdp_plugin"] = plugin


def clip_and_guard(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None
) -> tuple[Tensor, Tensor]:
    """Clip the synchronised gradients and have `optimizer.step()` do nothing where their norm is not finite.
    Collective.

    Returns the total norm before clipping and whether the step is skipped (1.0 or 0.0): device scalars, equal on all
    ranks, because gradients are synchronised before the norm is taken. Nothing waits for the device, except that
    DeepSpeed, which clips, checks and steps inside `backward`, has already waited.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        norm = accelerator.clip_grad_norm_(model.parameters(), max_norm or 0.0)
        overflow = bool(optimizer.step_was_skipped)  # type: ignore[attr-defined]
        return (
            torch.tensor(float(norm or 0.0), device=accelerator.device),
            torch.tensor(float(overflow), device=accelerator.device),
        )
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    if is_sharded(norm):
        norm = norm.full_tensor()
    skipped = (~norm.isfinite()).float()
    inner = getattr(optimizer, "optimizer", optimizer)
    # The fused optimizers leave weights, moments and step as they are where this is 1.
    inner.found_inf = skipped  # type: ignore[union-attr]
    return norm, skipped
