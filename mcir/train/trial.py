"""Whether a network can be trained at all, found out before the first step and before processes depend on each other:
what is wrong with a network of the user's own is one sentence, the same on all ranks."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mcir.archs import Arch
from mcir.archs.base import blocks_of, compile_blocks, images_of
from mcir.archs.zoo import Imported, Zoo
from mcir.config import RunConfig
from mcir.errors import UserError
from mcir.parallel.accelerator import autocast, strategy
from mcir.restoration.inference import forward
from mcir.train.graphs import Recorded, require_graphs


def try_network(net: nn.Module, config: RunConfig, accelerator: Accelerator) -> list[str]:
    """UserError unless the network holds what can be saved and shared, has the blocks that are named, and maps crops to
    restored crops, forward and backward. It is left as it is: a copy is tried, and no random number is drawn.

    Returns the names of the buffers that training moves and may read, which ranks must be told of each other's: not
    those of normalisation, which reads its own in evaluation alone. Not collective. The networks of this package are
    known to work and are not run.
    """
    blocks_of(net, config.arch.descriptor)
    if not isinstance(config.arch, Imported | Zoo):
        return []
    _check_contents(net, strategy(accelerator))
    scale, crop = config.arch.descriptor.scale, min(phase.crop_size for phase in config.phases)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices), autocast(accelerator):
        tried = deepcopy(net).to(accelerator.device)
        asked = [f"compute.{name}" for name in ("compile", "cuda_graphs") if getattr(config.compute, name)]
        if config.compute.compile:  # traced, not turned into machine code
            compile_blocks(tried, config.arch.descriptor, backend="eager")
        if config.compute.cuda_graphs:
            require_graphs(accelerator)
            Recorded(tried)
        # two samples: statistics over a batch of one, where the features are a pixel, are none
        image = torch.rand(2, 3, crop // scale, crop // scale, device=accelerator.device)
        before = {name: buffer.clone() for name, buffer in tried.named_buffers()}
        try:
            _try(tried, config.arch, image)
        except UserError:
            raise
        except Exception as error:
            failed = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            if asked:
                raise UserError(
                    f"the network cannot be trained with {' and '.join(asked)}, where a block is one graph: {failed}"
                ) from error
            raise UserError(
                f"the network cannot be trained: with data.crop_size {crop} {tuple(image.shape)} ends in {failed}"
            ) from error

    norms = [name for name, module in tried.named_modules() if isinstance(module, _NormBase)]
    after = dict(tried.named_buffers())
    moved = [name for name, buffer in before.items() if name in after and not buffer.equal(after[name])]
    return [name for name in moved if name.rpartition(".")[0] not in norms]


def _check_contents(net: nn.Module, strategy: str) -> None:
    for name, parameter in net.named_parameters():
        if parameter.ndim == 0 and strategy in ("fsdp2", "hsdp"):
            raise UserError(
                f"the network's {name} is a single number, of which FSDP2 makes no shards: give it the shape (1,), or "
                "launch with ddp or zero2"
            )
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UserError(f"the network's {name} gets its shape from the first image: give its layer the sizes")
        if parameter.is_complex():
            raise UserError(
                f"the network's {name} is complex, and optimizers, negatives and checkpoints hold real numbers: keep "
                "its real and imaginary part (torch.view_as_real) and join them in forward (torch.view_as_complex)"
            )
    for name, module in net.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise UserError(
                f"the network's {name or type(module).__name__} has an extra state (get_extra_state), and checkpoints "
                "hold tensors: keep it in a buffer"
            )


def _try(net: nn.Module, arch: Arch, image: Tensor) -> None:
    output = net.train()(image)
    if arch.descriptor.result is None and not isinstance(output, Tensor):
        raise UserError(
            f"the network returns {type(output).__name__} of {len(output)} in training instead of an image: say which "
            "of a list of images is the result (arch.result: first or last; all are then supervised)"
        )
    restored, *others = images_of(output)
    expected = (*image.shape[:2], *(arch.descriptor.scale * side for side in image.shape[2:]))
    if restored.shape != expected:
        raise UserError(
            f"the network makes {tuple(restored.shape)} of {tuple(image.shape)}, where with arch.scale "
            f"{arch.descriptor.scale} {expected} is expected"
        )
    torch.stack([image.mean() for image in (restored, *others)]).sum().backward()
    with torch.no_grad():
        forward(net.eval(), arch.descriptor, image)


def require_still_shared(names: Sequence[str], net: nn.Module) -> None:
    """UserError where a parameter that modules share has become several: FSDP2 gives each block its own."""
    if split := [name for name, _ in net.named_parameters() if name not in names]:
        raise UserError(f"FSDP2 split {split[0]} from the parameter it is shared with: train this network with ddp")
