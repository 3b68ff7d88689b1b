"""The strategy seam: one Accelerator from what the launch file says, checked; nothing here is guessed.

`accelerate launch --config_file launch/accelerate/NAME.yaml -m mcir train …` chooses ddp, fsdp2, hsdp, zero2 or zero3,
and the number of processes. The `*_cpu.yaml` files rehearse the same strategies with gloo processes; they hide the GPUs
(CUDA_VISIBLE_DEVICES=-1,…), and without that sign a launch that finds no GPU is refused."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from mcir.errors import UserError
from mcir.parallel.config import Precision
from mcir.parallel.scaling import LossScale
from mcir.parallel.shards import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_accelerator(
    *,
    precision: Precision | None = None,
    blocks: Sequence[str] = (),
    batch_size: int = 1,
    max_grad_norm: float | None = None,
    unused_parameters: bool = False,
    timeout_s: float = 1800,
) -> Accelerator:
    """The Accelerator for this process. Collective.

    Args:
        precision: None takes the launch file's `mixed_precision`, where `no` is fp32. A contradiction is an error.
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
    _check_launcher(world_size)
    rehearsal = _check_devices(world_size)
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if zero:
        _require_deepspeed()
    chosen = _precision(precision)
    _require_precision(chosen)
    timeout = timedelta(seconds=timeout_s)
    process_group = InitProcessGroupKwargs(backend="gloo" if rehearsal and zero else None, timeout=timeout)
    # The groups of hsdp's mesh and DeepSpeed's copy of the world are made with torch's defaults, ten minutes of NCCL's.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    if torch.cuda.is_available():
        # torch's own default is TF32 in cuDNN's convolutions and not in matrix products: here the name decides.
        torch.set_float32_matmul_precision("high" if chosen == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = chosen == "tf32"
    fsdp_plugin = FullyShardedDataParallelPlugin() if fsdp else None
    parallelism = _parallelism(world_size)
    accelerator = Accelerator(
        device_placement=False,  # before it moves a network it imports DTensor, to see whether it is one: with sympy
        cpu=rehearsal and not zero,
        parallelism_config=None if rehearsal else parallelism,
        mixed_precision="no",  # autocast over fp32 weights is ours under every strategy (`autocast`)
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
            _promote_to_fsdp(accelerator, fsdp_plugin, parallelism)
        fsdp_plugin.transformer_cls_names_to_wrap = list(blocks)
        fsdp_plugin.mixed_precision_policy = None  # it would cast whole blocks
    if zero:
        deepspeed_config = accelerator.state.deepspeed_plugin.deepspeed_config
        deepspeed_config["gradient_clipping"] = max_grad_norm or 0.0
        # Its default buckets of 5e8 elements would be larger than the networks trained here.
        deepspeed_config["zero_optimization"] |= {"reduce_bucket_size": 2**24, "allgather_bucket_size": 2**24}
        if chosen in AUTOCAST:  # DeepSpeed turns an autocast off that it was not told of
            dtype = str(AUTOCAST[chosen]).removeprefix("torch.")
            # By default it would also send weights and gradients of convolutions and Linear rounded to it.
            by_itself = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
            deepspeed_config["torch_autocast"] = by_itself
    accelerator.mcir_precision = chosen
    set_micro_batches(accelerator, batch_size, 1)
    return accelerator


def set_micro_batches(accelerator: Accelerator, batch_size: int, accumulate: int) -> None:
    """Take `accumulate` micro-batches of `batch_size` samples of all processes a step; before `prepare`."""
    accelerator.gradient_accumulation_steps = accumulate
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        deepspeed_config = accelerator.state.deepspeed_plugin.deepspeed_config
        deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size // accelerator.num_processes
        deepspeed_config["gradient_accumulation_steps"] = accumulate


def precision_of(accelerator: Accelerator) -> str:
    """What target, negatives and features compute in: a `Precision`, or what an Accelerator of the user's own says."""
    own = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return getattr(accelerator, "mcir_precision", own)


def autocast(accelerator: Accelerator) -> torch.autocast:
    """The precision of the target's forward pass, also for what runs beside it."""
    dtype = AUTOCAST.get(precision_of(accelerator))
    return torch.autocast(accelerator.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def strategy(accelerator: Accelerator) -> str:
    """`single`, `ddp`, `fsdp2`, `hsdp`, `zero1`, `zero2` or `zero3`."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "hsdp" if accelerator.parallelism_config else "fsdp2"
    return "single" if accelerator.distributed_type == DistributedType.NO else "ddp"


def _check_launcher(world_size: int) -> None:
    """Refuses what Accelerate would turn into another strategy, or into one process, without a word."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "the launch file asks for FSDP1; set fsdp_config.fsdp_version to 2 (launch/accelerate/fsdp2.yaml)"
        )
    for variable, neutral, option, field in (
        ("ACCELERATE_DYNAMO_BACKEND", ("no",), "dynamo_backend", "compute.compile"),
        (
            "FSDP_ACTIVATION_CHECKPOINTING",
            ("false",),
            "fsdp_activation_checkpointing",
            "compute.checkpoint_activations",
        ),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1", "auto"), "gradient_accumulation_steps", "accumulate"),
        ("ACCELERATE_GRADIENT_CLIPPING", ("none", "auto"), "gradient_clipping", "optim.max_grad_norm"),
    ):
        if os.environ.get(variable, neutral[0]).lower() not in neutral:
            raise UserError(f"the launch asks for {option}, which is the run's to say: set {field}")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    mpi = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    if world_size == 1 and launched and not any(name in os.environ for name in ("WORLD_SIZE", *mpi)):
        raise UserError(
            "the launch file asks for several processes, but with its distributed_type (MULTI_CPU or NO) Accelerate "
            "starts one: use a file of launch/accelerate/ (*_cpu.yaml on a CPU), or unset a MASTER_ADDR of your own"
        )


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


def _precision(precision: Precision | None) -> Precision:
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", *AUTOCAST):
        raise UserError(f"the launch file's mixed_precision is {launched}; mcir trains in bf16, fp16 or fp32 (`no`)")
    if launched == "no":
        return precision or "fp32"
    if precision not in (None, launched):
        raise UserError(
            f"compute.precision is {precision} and the launch file's mixed_precision is {launched}: make them agree"
        )
    return cast(Precision, launched)


def _require_precision(precision: Precision) -> None:
    """Refuse what this process's device would silently compute otherwise, or very slowly."""
    if not torch.cuda.is_available():
        if precision == "tf32":
            raise UserError("compute.precision: tf32 is a GPU's, and this process computes on the CPU: set fp32")
        return
    capability, name = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    if precision in ("tf32", "bf16") and torch.version.hip is None and capability < (8, 0):
        instead = "fp32" if precision == "tf32" else "fp16 (or fp32)"
        raise UserError(
            f"{name} has no {precision} arithmetic: set compute.precision (or mixed_precision) to {instead}"
        )


def _require_deepspeed() -> None:
    try:
        import deepspeed  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"ZeRO needs {error.name}: install mcir[deepspeed]") from error


def _parallelism(world_size: int) -> ParallelismConfig | None:
    """HSDP's two sizes, where the launch file has them: sharded inside a group, replicated between the groups. Of
    a range of nodes there are as many replicas as there are processes for now.

    Accelerate's constructor would read them itself, and refuse CPU processes before they are promoted."""
    if os.environ.pop("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return None
    parallelism = ParallelismConfig()
    replicate, shard = parallelism.dp_replicate_size, parallelism.dp_shard_size
    if parallelism.total_size != replicate * shard or shard == 1:
        raise UserError("parallelism_config: there is dp_shard_size (at least 2) and dp_replicate_size, nothing else")
    if ":" in os.environ.get("PET_NNODES", "") and world_size % shard == 0:
        replicate = world_size // shard
        parallelism = ParallelismConfig(dp_replicate_size=replicate, dp_shard_size=shard)
    if replicate * shard != world_size:
        raise UserError(
            f"parallelism_config: {replicate} replicas of {shard} shards are {replicate * shard} processes, and "
            f"{world_size} were started: give accelerate launch --parallelism_config_dp_replicate_size and "
            "--parallelism_config_dp_shard_size (launch/README.md)"
        )
    return parallelism if replicate > 1 else None


def _promote_to_fsdp(
    accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin, parallelism: ParallelismConfig | None
) -> None:
    """Accelerate turns FSDP on for GPUs only; this does the same to connected CPU processes (accelerate 1.15,
    state.py)."""
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state._shared_state["fsdp_plugin"] = plugin
    if parallelism is not None:
        accelerator.state.parallelism_config = parallelism
        accelerator.state.device_mesh = parallelism.get_device_mesh("cpu")


def _agreed(norm: "DTensor") -> "DTensor":
    """The norm of sharded gradients, whole everywhere. hsdp's replicas each add up their shards' in a group of their
    own, where another order may round otherwise: rank 0's is all ranks'."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, whole = norm.device_mesh, norm.full_tensor()
    if mesh.ndim > 1:
        distributed_c10d.broadcast(whole, src=0)
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)


def clip_and_guard(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_norm: float | None,
    loss_scale: LossScale | None = None,
) -> tuple[Tensor, Tensor]:
    """Unscale and clip the synchronised gradients and have `optimizer.step()` do nothing where their norm is not
    finite; then move the loss scale. Collective.

    Returns the total norm before clipping and whether the step is skipped (1.0 or 0.0): device scalars, equal on all
    ranks, because gradients are synchronised before the norm is taken. Nothing waits for the device, except that
    DeepSpeed, which unscales, clips, checks and steps inside `backward`, has already waited.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        norm = torch.tensor(
            float(accelerator.clip_grad_norm_(model.parameters(), max_norm or 0.0) or 0.0), device=accelerator.device
        )
        overflow = bool(optimizer.step_was_skipped)  # type: ignore[attr-defined]
        skipped = torch.tensor(float(overflow), device=accelerator.device)
    else:
        parameters = [p for p in model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if loss_scale is not None:
            loss_scale.unscale([g.to_local() if is_sharded(g) else g for g in gradients])
        norm = nn.utils.get_total_norm(gradients)
        shared = _agreed(norm) if is_sharded(norm) else norm
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, shared)
        norm = shared.to_local() if is_sharded(shared) else shared
        skipped = (~norm.isfinite()).float()
        inner = getattr(optimizer, "optimizer", optimizer)
        # The fused optimizers leave weights, moments and step as they are where this is 1.
        inner.found_inf = skipped  # type: ignore[union-attr]
    if loss_scale is not None:
        loss_scale.update(skipped)
    return norm, skipped
