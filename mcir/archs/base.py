"""What the engine must know of a network, and the base of every entry of the `arch` section."""

import difflib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mcir.errors import UserError
from mcir.section import Section

MAX_GRAPHS = 64  # of one network, before torch gives compiling up


@dataclass(frozen=True)
class Descriptor:
    """The facts that padding, tiling, sharding and compilation need of a network, so that each is written once."""

    scale: int = 1
    """Output side / input side."""
    size_multiple: int = 1
    """The caller pads height and width up to a multiple of this before the network sees them (1: the network takes
    any size or pads inside, as its official code does)."""
    pad_mode: Literal["reflect", "flip"] = "reflect"
    """How the official test code pads. `flip`: always up to the next multiple, even when divisible, by mirroring
    including the border pixel (SwinIR)."""
    min_size: int = 1
    """Smallest side the network accepts."""
    fixed_size: int | None = None
    """The only side the network accepts (IDT: 128); larger images are tiled."""
    tile_overlap: int = 0
    """Overlap of neighbouring tiles, in input pixels, of the official tiled test."""
    square: bool = False
    """Whether the caller also pads the shorter side up to the longer (Uformer)."""
    blocks: tuple[str, ...] = ()
    """Class names of the repeated blocks, and of what enlarges after them: FSDP2 shards by them, `compile` compiles
    them one by one."""
    channels_last: bool = False
    """Whether the channels_last memory format pays on this network."""
    bf16: bool = True
    """Whether the network trains in bf16 autocast."""
    unused_parameters: bool = False
    """Whether some parameters never get a gradient, which DDP must be told to look for."""
    result: Literal["first", "last"] | None = None
    """Of a network that returns a list of images, stages or scales: which one is the restored image. The others are
    supervised too, in training, and seen nowhere else."""


class Arch(Section, ABC):
    """One network with its published hyper-parameters as defaults. Input and output are RGB in [0, 1], (B, 3, H, W)."""

    name: str

    @property
    @abstractmethod
    def descriptor(self) -> Descriptor: ...

    @abstractmethod
    def build(self) -> nn.Module:
        """A freshly initialised network (as its repository initialises it), drawn from torch's global generator."""


def choose_result(net: nn.Module, descriptor: Descriptor) -> None:
    """Have a network of several outputs return them with the result first in training, and the result alone in eval."""
    if descriptor.result:
        net.register_forward_hook(partial(_result_first, -1 if descriptor.result == "last" else 0))


def _result_first(place: int, net: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Tensor | list[Tensor]:
    if isinstance(outputs, Tensor):  # some return the result alone in eval
        return outputs
    images = list(outputs)
    result = images.pop(place)
    return [result, *images] if net.training else result


def images_of(output: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """What a network in training restored, in fp32: the result, (B, 3, s * H, s * W), then what else is supervised."""
    return [image.float() for image in ([output] if isinstance(output, Tensor) else output)]


def blocks_of(net: nn.Module, descriptor: Descriptor) -> list[nn.Module]:
    """The repeated blocks of a network, in order. UserError for a class that the network has none of."""
    names = {type(module).__name__: None for module in net.modules()}
    for block in descriptor.blocks:
        if block not in names:
            close = difflib.get_close_matches(block, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(names)}"
            raise UserError(f"arch.blocks: the network has no module of a class {block}: {hint}")
    return [module for module in net.modules() if type(module).__name__ in descriptor.blocks]


def checkpoint_activations(net: nn.Module, descriptor: Descriptor) -> None:
    """Have the repeated blocks computed again in the backward pass; names, weights and results stay the same."""
    if not (blocks := blocks_of(net, descriptor)):
        raise UserError(
            "compute.checkpoint_activations: the network has no repeated blocks; name their classes (arch.blocks)"
        )
    for block in blocks:
        block.forward = MethodType(_recomputed, block)


def _recomputed(block: nn.Module, *inputs: Any, **options: Any) -> Any:
    return checkpoint(type(block).forward, block, *inputs, use_reentrant=False, **options)


def compile_blocks(net: nn.Module, descriptor: Descriptor, backend: str | Callable[..., Any] = "inductor") -> None:
    """Have the repeated blocks compiled, each as one graph for its class, sizes and mode, shared by all its like.

    A block that is no single graph is a UserError at its first call: half compiled, it would only be slower.
    """
    from torch import _dynamo
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if not (blocks := blocks_of(net, descriptor)):
        raise UserError(
            "compute.compile: the network has no repeated blocks to compile; name their classes (arch.blocks)"
        )
    if backend == "inductor" and next(net.parameters()).device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError(
                "compute.compile: it needs a C++ compiler, g++ or what CXX names, and there is none: install one, or "
                "set it to false"
            ) from None
    # A U-shaped network needs a graph for each of its widths, and for training and inference.
    _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, MAX_GRAPHS)
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)


def convolve_in_channels_last(net: nn.Module) -> None:
    """Have every 2-D convolution computed in NHWC while its weights stay in the default layout, which FSDP2 and ZeRO
    need of what they shard: torch chooses the kernels by the input, and lays the small weights out at each use."""

    def lay_out(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:]

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_pre_hook(lay_out)


class PixelShuffle(nn.PixelShuffle):
    """(B, C * r^2, H, W) -> (B, C, r * H, r * W), in the layout of the input: where the features of a pixel are side by
    side, one copy, of which torch's takes three on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.stride(1) != 1:
            return super().forward(x)
        x = x.permute(0, 2, 3, 1).unflatten(-1, (-1, self.upscale_factor, self.upscale_factor))
        return x.permute(0, 1, 4, 2, 5, 3).flatten(1, 2).flatten(2, 3).permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Stochastic depth: a branch left out, sample by sample, at `rate` in training. (B, ...) -> same.

    The rate is a tensor, which a compiled block takes as an input: a number would be a graph of its own for each block.
    """

    keep: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("keep", torch.tensor(1 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        drawn = torch.rand((len(x), *[1] * (x.ndim - 1)), device=x.device)
        return x * ((drawn < self.keep) / self.keep).to(x.dtype)


def under(name: str, module: nn.Module) -> nn.Module:
    """The module itself, its state_dict keys prefixed by `name` as in an official network."""
    return nn.Sequential(OrderedDict({name: module}))
