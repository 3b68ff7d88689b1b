"""Whole tensors out of sharded networks and back: the only file that knows how each strategy lays tensors out.

A tensor is whole in a plain or DDP network, a DTensor under FSDP2, and spread over flat fp32 partitions under ZeRO. The
functions below give and take it whole, fp32, a bucket at a time (gather.py), the same on every rank, so that negatives,
checkpoints and exports are written once for every strategy and any number of processes. All of them are collective.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import TypeIs

from mcir.parallel.gather import Fragment, Piece, Slot, gathered

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam and AdamW remember of each parameter, beside the number of its steps."""


def is_sharded(tensor: Tensor) -> "TypeIs[DTensor]":
    """Whether FSDP2 holds this tensor; asked without importing DTensor, which brings sympy: half as long as torch."""
    return hasattr(tensor, "full_tensor")


def unwrapped(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The network inside DDP's or DeepSpeed's wrapper. `Accelerator.unwrap_model` imports DeepSpeed wherever it is
    installed."""
    wrapped = is_zero(accelerator) or isinstance(model, DistributedDataParallel)  # one GPU alone is not wrapped in DDP
    return model.module if wrapped else model  # type: ignore[return-value]


def is_zero(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def cuts_weights(accelerator: Accelerator) -> bool:
    """Whether the strategy keeps weights in pieces, for which they must be contiguous."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def broadcast_from_first(accelerator: Accelerator, tensors: Iterable[Tensor]) -> None:
    """Overwrite `tensors` with rank 0's, in place."""
    if accelerator.num_processes > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor.data, src=0)


def align_replicas(model: nn.Module) -> None:
    """Have hsdp's replicas start from the first one's weights, which DDP sees to itself: another CPU may have drawn
    other last digits."""
    for parameter in model.parameters():
        if is_sharded(parameter) and parameter.device_mesh.ndim > 1:
            replicas = parameter.device_mesh.get_group(0)
            torch.distributed.broadcast(parameter.to_local().data, group=replicas, group_src=0)


@torch.no_grad()
def full_params(accelerator: Accelerator, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter (name as in the unwrapped network), then every persistent buffer as rank 0 has it.

    Parameters come in fp32: the master weights under ZeRO. Do not keep the tensors: they may be views of the network's.
    """
    net = unwrapped(accelerator, model)
    yield from gathered((name, _piece(accelerator, parameter)) for name, parameter in net.named_parameters())
    persistent = _persistent_buffers(net)
    if is_zero(accelerator) or accelerator.num_processes > 1:
        persistent = {name: buffer.clone() for name, buffer in persistent.items()}
        broadcast_from_first(accelerator, persistent.values())
    yield from persistent.items()


@torch.no_grad()
def load_full_params(accelerator: Accelerator, model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Overwrite parameters and persistent buffers with `read(name)`, a whole tensor, equal on every rank."""
    net = unwrapped(accelerator, model)
    for name, parameter in net.named_parameters():
        value = read(name).to(accelerator.device)
        if is_zero(accelerator):
            _zero_set(parameter, value.float().contiguous())
        else:
            _assign(parameter, value)
    for name, buffer in _persistent_buffers(net).items():
        buffer.copy_(read(name))


def local_masters(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """This rank's own fp32 piece of every trained parameter: what an EMA can follow without any communication."""
    if is_zero(accelerator):
        zero = _zero_optimizer(optimizer)
        stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
        return list(zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups)
    parameters = unwrapped(accelerator, model).parameters()
    return [p.to_local() if is_sharded(p) else p.data for p in parameters]


@torch.no_grad()
def full_moments(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """(`name/exp_avg`, whole fp32 tensor) and (`name/step`, fp32 scalar) for each parameter that has been trained."""
    yield from gathered(_moments(accelerator, model, optimizer))


@torch.no_grad()
def load_full_moments(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    read: Callable[[str], Tensor | None],
) -> None:
    """Give the optimizer the moments that `read(key)` returns (None: that parameter was never trained)."""
    if is_zero(accelerator):
        _zero_load_moments(accelerator, model, optimizer, read)
        return
    for name, parameter in unwrapped(accelerator, model).named_parameters():
        step = read(f"{name}/step")
        if step is None:
            continue
        state = optimizer.state[parameter]
        fused = any(group.get("fused") for group in optimizer.param_groups)
        state["step"] = step.to(parameter.device if fused else "cpu", torch.float32)
        for key in MOMENTS:
            value = read(f"{name}/{key}")
            assert value is not None
            state[key] = torch.zeros_like(parameter)
            _assign(state[key], value.to(accelerator.device))


def _persistent_buffers(net: nn.Module) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    for prefix, module in net.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                kept[f"{prefix}.{name}" if prefix else name] = buffer
    return kept


def _moments(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Piece]]:
    inner = _zero_optimizer(optimizer).optimizer if is_zero(accelerator) else optimizer
    for name, parameter in unwrapped(accelerator, model).named_parameters():
        if is_zero(accelerator):
            if not parameter.requires_grad or not inner.state:
                continue
            for key in MOMENTS:
                yield f"{name}/{key}", _zero_piece(parameter, key)
            state = next(iter(inner.state.values()))
        else:
            state = inner.state.get(parameter, {})
            for key in MOMENTS:
                if key in state:
                    yield f"{name}/{key}", _piece(accelerator, state[key])
        if "step" in state:
            step = torch.as_tensor(state["step"])
            yield f"{name}/step", (step.full_tensor() if is_sharded(step) else step).float().reshape(())


def _piece(accelerator: Accelerator, tensor: Tensor) -> Piece:
    """What this rank holds of a parameter, or of a moment that is not ZeRO's."""
    if is_zero(accelerator):
        return _zero_piece(tensor) if tensor.requires_grad else _zero_frozen(tensor)
    if not is_sharded(tensor):
        return tensor.detach()
    shards = [dim for dim, placement in enumerate(tensor.placements) if placement.is_shard(0)]
    if len(shards) != 1 or not all(p.is_replicate() for i, p in enumerate(tensor.placements) if i not in shards):
        return tensor.full_tensor()
    group = tensor.device_mesh.get_group(shards[0])
    rows = -(-tensor.shape[0] // group.size())  # as torch.chunk: the last rank that holds any may hold fewer
    return Slot(tensor.to_local().detach().flatten(), rows * tensor.shape[1:].numel(), tensor.shape, group)


def _zero_piece(parameter: Tensor, moment: str | None = None) -> Piece:
    """This rank's piece of a trained parameter's fp32 master, or of a moment."""
    if hasattr(parameter, "ds_id"):
        from deepspeed import utils as pieces

        local = (
            pieces.safe_get_local_fp32_param(parameter)
            if moment is None
            else pieces.safe_get_local_optimizer_state(parameter, moment)
        )
        return Slot(local.detach().flatten(), parameter.ds_tensor.numel(), parameter.ds_shape)  # type: ignore[attr-defined]
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:  # all of it is on other ranks
        return Fragment(parameter.new_zeros(0, dtype=torch.float32), 0, parameter.shape)
    return Fragment(mapping.get_hp_fragment(moment).detach(), mapping.lp_fragment_address.start, parameter.shape)


def _assign(destination: Tensor, value: Tensor) -> None:
    if is_sharded(destination):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(destination.dtype), destination.device_mesh, destination.placements)
    destination.copy_(value)


def _zero_optimizer(optimizer: torch.optim.Optimizer):
    return getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's wrapper


def _zero_frozen(parameter: Tensor) -> Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameter):
        return parameter.detach().clone()


def _zero_set(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the fp32 master and the weights that the forward pass uses."""
    if parameter.requires_grad:
        _zero_set_master(parameter, value)
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            parameter.data.copy_(value)
    else:
        parameter.data.copy_(value)


def _zero_set_master(parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
    """Set this rank's piece of the fp32 master, or of a moment."""
    from deepspeed import utils as pieces

    if not hasattr(parameter, "ds_id"):  # stages 1 and 2
        if moment is None:
            pieces.safe_set_full_fp32_param(parameter, value)
        else:
            pieces.safe_set_full_optimizer_state(parameter, value, moment)
        return
    # Stage 3 pads the last rank's piece, which DeepSpeed's own safe_set_full_* overruns.
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()  # type: ignore[attr-defined]
    padded = value.new_zeros(size * torch.distributed.get_world_size())
    padded[: value.numel()] = value.flatten()
    piece = padded[size * rank : size * (rank + 1)]
    if moment is None:
        pieces.safe_set_local_fp32_param(parameter, piece)
    else:
        pieces.safe_set_local_optimizer_state(parameter, piece, moment)


def _zero_load_moments(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    read: Callable[[str], Tensor | None],
) -> None:
    zero = _zero_optimizer(optimizer)
    trained = [(n, p) for n, p in unwrapped(accelerator, model).named_parameters() if p.requires_grad]
    step = next((s for name, _ in trained if (s := read(f"{name}/step")) is not None), None)
    if step is None:
        return
    fused = any(group.get("fused") for group in zero.optimizer.param_groups)
    for partition in local_masters(accelerator, model, optimizer):
        state = zero.optimizer.state[partition]
        state["step"] = step.to(partition.device if fused else "cpu", torch.float32, copy=True)
        state.update({key: torch.zeros_like(partition) for key in MOMENTS})
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()  # stages 1 and 2: where each parameter's moments lie
    for name, parameter in trained:
        for key in MOMENTS:
            if (value := read(f"{name}/{key}")) is not None:  # one that never gets a gradient has none elsewhere
                _zero_set_master(parameter, value.to(accelerator.device), key)
