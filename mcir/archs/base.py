"""What the engine must know of a network, and the base of every entry of the `arch` section."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mcir.section import Section


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
    """Class names of the repeated blocks: FSDP2 shards by them, `compile` compiles them one by one."""
    channels_last: bool = False
    """Whether the channels_last memory format pays on this network."""
    bf16: bool = True
    """Whether the network trains in bf16 autocast."""
    unused_parameters: bool = False
    """Whether some parameters never get a gradient, which DDP must be told to look for."""


class Arch(Section, ABC):
    """One network with its published hyper-parameters as defaults. Input and output are RGB in [0, 1], (B, 3, H, W)."""

    name: str

    @property
    @abstractmethod
    def descriptor(self) -> Descriptor: ...

    @abstractmethod
    def build(self) -> nn.Module:
        """A freshly initialised network (as its repository initialises it), drawn from torch's global generator."""


def blocks_of(net: nn.Module, descriptor: Descriptor) -> list[nn.Module]:
    """The repeated blocks of a network, in order."""
    return [module for module in net.modules() if type(module).__name__ in descriptor.blocks]


def checkpoint_activations(net: nn.Module, descriptor: Descriptor) -> None:
    """Have the repeated blocks computed again in the backward pass; names, weights and results stay the same."""
    for block in blocks_of(net, descriptor):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def convolve_in_channels_last(net: nn.Module) -> None:
    """Have every 2-D convolution computed in NHWC while its weights stay in the default layout, which FSDP2 and ZeRO
    need of what they shard: torch chooses the kernels by the input, and lays the small weights out at each use."""

    def lay_out(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:]

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_pre_hook(lay_out)


def under(name: str, module: nn.Module) -> nn.Module:
    """The module itself, its state_dict keys prefixed by `name` as in an official network."""
    return nn.Sequential(OrderedDict({name: module}))
