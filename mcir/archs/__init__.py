"""The networks. The discriminated union below is the registry: `arch.name` selects, every other key is checked."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from torch import nn

from mcir.archs.base import Arch, Descriptor
from mcir.archs.dehazeformer import Dehazeformer
from mcir.archs.edsr import Edsr
from mcir.archs.ffanet import Ffanet
from mcir.archs.idt import Idt
from mcir.archs.nafnet import Nafnet
from mcir.archs.swinir import Swinir
from mcir.archs.zoo import Imported, Zoo

AnyArch = Annotated[Dehazeformer | Edsr | Ffanet | Idt | Imported | Nafnet | Swinir | Zoo, Field(discriminator="name")]

__all__ = ["AnyArch", "Arch", "Descriptor", "build", "parse"]


def parse(arch: Arch | Mapping[str, Any]) -> Arch:
    """The description of a network from a mapping; pydantic's ValidationError if it does not fit."""
    return arch if isinstance(arch, Arch) else TypeAdapter[Arch](AnyArch).validate_python(arch)


def build(arch: Arch | Mapping[str, Any]) -> nn.Module:
    """A freshly initialised network, RGB [0, 1] in and out: `build({"name": "edsr", "scale": 4})`."""
    return parse(arch).build()
