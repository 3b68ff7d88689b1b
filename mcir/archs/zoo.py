"""Networks that are not ours: any of spandrel's, and any class the user names.

A network of spandrel is given by id and hyper-parameters, or by a weights file from which both are read. What can be
wrong in a description is found when it is validated, before anything starts: spandrel's networks are built once then,
which also gives their scale and size requirements.
"""

import difflib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, JsonValue, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from mcir.archs.base import Arch, Descriptor, choose_result
from mcir.archs.state_dict import read_state_dict
from mcir.errors import UserError
from mcir.section import expand

if TYPE_CHECKING:
    import spandrel


def first_output(net: Any, inputs: tuple[Any, ...], outputs: Any) -> Tensor:
    return outputs[0]


def to_unit_range(net: Any, inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output * 0.5 + 0.5


def copy_of_input(net: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Published networks begin with `x -= mean` (WDSR): what they are given is also shown, measured, restored again."""
    return inputs[0].clone(), *inputs[1:]


# What makes [0, 1] RGB of the output, where the network does not give it (spandrel does it outside the module).
OUTPUT_HOOKS = {
    **dict.fromkeys(("CodeFormer", "FBCNN", "GFPGAN", "MMRealSR"), first_output),
    "MixDehazeNet": to_unit_range,
}
RESULTS: dict[str, Literal["first", "last"]] = {"MPRNet": "first"}  # of several outputs, all supervised
NOT_IMAGE_TO_IMAGE = {
    "DRUNet": "takes a noise map beside the image",
    "IPT": "takes the index of a task beside the image",
    "RestoreFormer": "takes and gives images in [-1, 1]",
    "LaMa": "takes a mask beside the image",
    "MAT": "takes a mask beside the image",
    "DDColor": "takes grey images",
}
NOT_BF16 = {"KBNet"}  # its own backward pass mixes precisions
UNUSED_PARAMETERS = {"AdaCode", "FDAT", "FFTformer", "FeMaSR", "GFPGAN", "HVICIDNet", "SPAN", "SwiftSRGAN"}


def _suggest(wrong: str, known: Iterable[str]) -> str:
    names = sorted(known, key=str.lower)
    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(wrong.lower(), by_lower, n=1)
    return f"did you mean '{by_lower[close[0]]}'?" if close else f"known: {', '.join(names)}"


def _check_arguments(function: type[nn.Module], name: str, given: Mapping[str, Any]) -> None:
    """Raise ValueError unless the constructor takes exactly these keyword arguments."""
    parameters = list(inspect.signature(function).parameters.values())
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    for key in given:
        if key not in named and not takes_any:
            raise ValueError(f"{name} has no argument '{key}': {_suggest(key, named)}")
    if missing := [key for key, p in named.items() if p.default is p.empty and key not in given]:
        raise ValueError(f"{name} needs the arguments {', '.join(missing)}")


@lru_cache(maxsize=1)
def _classes() -> "Mapping[str, tuple[spandrel.Architecture, type[nn.Module]]]":
    """The networks of spandrel, and of spandrel_extra_arches when installed, by architecture id and by class name."""
    import spandrel  # imports torchvision, which takes as long as torch

    try:
        import spandrel_extra_arches
    except ImportError:
        pass
    else:
        spandrel_extra_arches.install(ignore_duplicates=True)
    found: dict[str, tuple[spandrel.Architecture, type[nn.Module]]] = {}
    for support in spandrel.MAIN_REGISTRY:
        architecture = support.architecture
        module = sys.modules[type(architecture).__module__]
        exported = [getattr(module, name) for name in module.__all__]
        networks = [c for c in exported if isinstance(c, type) and issubclass(c, nn.Module)]
        for network in networks:  # an id with several networks (PLKSR, KBNet) means the first
            found.setdefault(network.__name__, (architecture, network))
        if networks:
            found[architecture.id] = architecture, networks[0]
    return MappingProxyType(found)


def _detect(weights: Path) -> "spandrel.ModelDescriptor":
    """The network that a weights file is of, with those weights."""
    import spandrel

    _classes()
    try:
        return spandrel.ModelLoader().load_from_state_dict(read_state_dict(weights, prefer="ema"))
    except UserError as error:
        raise ValueError(str(error)) from error
    except spandrel.UnsupportedModelError as error:
        raise ValueError(
            f"{weights}: of no architecture that spandrel knows; name the network and use init_from"
        ) from error


def _defaults(network: type[nn.Module]) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(network).parameters.items()}


def repeated_blocks(net: nn.Module) -> tuple[str, ...]:
    """Class names of the innermost modules that stand in a row with their like and hold several layers."""

    def is_block(module: nn.Module) -> bool:
        layers = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
        return len(layers) > 1 and not type(module).__module__.startswith("torch.nn.")

    rows = [m for m in net.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    candidates: dict[type[nn.Module], None] = {}
    for row in rows:
        kinds = [type(child) for child in row if is_block(child)]
        candidates.update({kind: None for kind in kinds if kinds.count(kind) > 1})
    innermost = [
        kind
        for kind in candidates
        if not any(
            type(inner) in candidates and type(inner) is not kind
            for module in net.modules()
            if type(module) is kind
            for inner in module.modules()
        )
    ]
    return tuple(kind.__name__ for kind in innermost)


@lru_cache(maxsize=8)
def _describe(name: str, parameters: str) -> Descriptor:
    """Build spandrel's network once, without drawing from the global generator, and have spandrel look at it."""
    architecture, network = _classes()[name]
    with torch.random.fork_rng(devices=[]):
        try:
            net = network(**json.loads(parameters))
        except Exception as error:
            raise ValueError(f"spandrel's {name} refuses these parameters: {error}") from error
        try:
            seen = architecture.load(dict(net.state_dict()))
        except Exception as error:
            raise ValueError(f"spandrel cannot read back its {name} with these parameters: {error}") from error
    if (seen.input_channels, seen.output_channels) != (3, 3):
        raise ValueError(
            f"{name} with these parameters maps {seen.input_channels} channels to {seen.output_channels}; images have 3"
        )
    size = seen.size_requirements
    return Descriptor(
        scale=seen.scale,
        size_multiple=size.multiple_of,
        min_size=max(size.minimum, 1),
        square=size.square,
        blocks=repeated_blocks(net),
        bf16=seen.supports_bfloat16 and architecture.id not in NOT_BF16,
        unused_parameters=architecture.id in UNUSED_PARAMETERS,
        result=RESULTS.get(architecture.id),
    )


class Zoo(Arch):
    """A network of spandrel, by id and hyper-parameters or from a weights file."""

    name: Literal["zoo"] = "zoo"
    architecture: str = ""
    """Id or class name as spandrel has it (HAT, SCUNet, RealPLKSR …); read from `weights` when not given."""
    parameters: dict[str, JsonValue] = {}  # noqa: RUF012
    """Arguments of the class; what is not given is spandrel's default, or what `weights` has."""
    weights: Annotated[Path | None, BeforeValidator(lambda path: expand(path) if isinstance(path, str) else path)] = (
        None
    )
    """A file to start from, averaged weights preferred."""
    blocks: tuple[str, ...] | None = None
    """Class names of the repeated blocks, where the guess is not good."""

    @model_validator(mode="before")
    @classmethod
    def _read_weights(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not given.get("weights") or given.get("architecture"):
            return given
        found = _detect(Path(expand(str(given["weights"]))))
        network = type(found.model)
        defaults = _defaults(network)
        parameters = {
            k: v for k, v in found.model.hyperparameters.items() if v != defaults.get(k, inspect.Parameter.empty)
        }
        return {**given, "architecture": network.__name__, "parameters": parameters | given.get("parameters", {})}

    @model_validator(mode="after")
    def _exists_and_takes_these(self) -> Self:
        if not self.architecture:
            raise ValueError("give the architecture (an id of spandrel) or weights to read it from")
        if self.architecture not in _classes():
            raise ValueError(f"spandrel has no '{self.architecture}': {_suggest(self.architecture, _classes())}")
        architecture, network = _classes()[self.architecture]
        if reason := NOT_IMAGE_TO_IMAGE.get(architecture.id):
            raise ValueError(f"{self.architecture} {reason}, so it cannot be trained on pairs of images")
        _check_arguments(network, self.architecture, self.parameters)
        _describe(self.architecture, json.dumps(self.parameters))
        return self

    @property
    def descriptor(self) -> Descriptor:
        seen = _describe(self.architecture, json.dumps(self.parameters))
        return seen if self.blocks is None else replace(seen, blocks=self.blocks)

    def build(self) -> nn.Module:
        architecture, network = _classes()[self.architecture]
        net = network(**self.parameters)
        if self.weights:
            try:
                net.load_state_dict(_detect(self.weights).model.state_dict())
            except (RuntimeError, ValueError) as error:
                raise UserError(f"arch.weights does not fit arch.parameters: {error}") from error
        if hook := OUTPUT_HOOKS.get(architecture.id):
            net.register_forward_hook(hook)
        net.register_forward_pre_hook(copy_of_input)
        choose_result(net, self.descriptor)
        return net.train()


class _NotInstalled(ValueError):
    """There is no such module on this machine."""


class Imported(Arch):
    """The user's own network: a class that maps RGB in [0, 1] to RGB in [0, 1], and what is to be known of it."""

    name: Literal["import"] = "import"
    target: str
    """`package.module:Class`, importable from the working directory or installed."""
    repository: str | None = None
    """Where the class is to be had. With it the config is valid where the class is not, and building says what to
    get."""
    arguments: dict[str, JsonValue] = {}  # noqa: RUF012
    scale: PositiveInt = 1
    size_multiple: PositiveInt = 1
    min_size: PositiveInt = 1
    fixed_size: PositiveInt | None = None
    tile_overlap: NonNegativeInt = 0
    pad_mode: Literal["reflect", "flip"] = "reflect"
    blocks: tuple[str, ...] = ()
    channels_last: bool = False
    bf16: bool = True
    unused_parameters: bool = False
    """Whether some parameters never get a gradient."""
    result: Literal["first", "last"] | None = None
    """Which image is the result, of a network that returns a list. All are supervised, smaller ones by the clean image
    made as small."""

    @model_validator(mode="after")
    def _exists_and_takes_these(self) -> Self:
        try:
            network = self._class()
        except _NotInstalled:
            if self.repository is None:
                raise
        else:
            _check_arguments(network, self.target, self.arguments)
        return self

    def _class(self) -> type[nn.Module]:
        module_name, _, class_name = self.target.partition(":")
        if not class_name:
            raise ValueError(f"target '{self.target}' is not of the form package.module:Class")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
            kind = _NotInstalled if absent else ValueError
            raise kind(f"target '{self.target}': {module_name} cannot be imported: {error}") from error
        network = getattr(module, class_name, None)
        if not (isinstance(network, type) and issubclass(network, nn.Module)):
            modules = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, nn.Module)]
            raise ValueError(f"{module_name} has no network '{class_name}': {_suggest(class_name, modules)}")
        return network

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(**self.model_dump(exclude={"name", "target", "arguments", "repository"}))

    def build(self) -> nn.Module:
        try:
            net = self._class()(**self.arguments)
        except _NotInstalled as error:
            raise UserError(f"arch.{error}; get {self.repository} and put its folder on PYTHONPATH") from error
        for module in net.modules():  # what weight_norm computes before each forward would let no copy be made
            computed = {k: v for k, v in vars(module).items() if isinstance(v, Tensor) and v.grad_fn is not None}
            vars(module).update({name: tensor.detach() for name, tensor in computed.items()})
        net.register_forward_pre_hook(copy_of_input)
        choose_result(net, self.descriptor)
        return net
