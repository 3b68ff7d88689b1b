"""CUDA graphs: a GPU replays as one launch what the host would have to send it operator by operator."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mcir.errors import UserError
from mcir.objective.features import Features
from mcir.objective.negatives import Negatives
from mcir.objective.objective import Objective
from mcir.parallel.accelerator import strategy

MAX_RECORDINGS = 4
"""Of a module, until they are forgotten: batches that lack samples have sizes of their own, and keep as much memory."""
WARM_UPS = 3
"""Calls before the recording, in which libraries and compiled blocks choose their kernels."""
Images = Tensor | Sequence[Tensor]


class Recorded:
    """A module's forward pass, and its backward pass where gradients are asked for, recorded at the first call with an
    image of a shape and replayed from then on. What is neither differentiated nor in inference mode is computed as
    ever.

    Weights are read where they are, so an optimizer or an update of a negative that writes in place needs no new
    recording. Draws come from torch's generator of the device as it is at each replay; what the host draws or decides
    stays as it was recorded. What the module returns is overwritten by its next call of that kind, unless a backward
    pass is still to come: then that call is computed as ever. Hooks on the module stay outside.
    """

    replays = True

    def __init__(self, module: nn.Module) -> None:
        self.module, self.compute = module, module.forward
        self.recordings = dict[tuple[torch.Size, bool], _Recording]()
        module.forward = self

    def __call__(self, image: Tensor) -> Images:
        differentiated = torch.is_grad_enabled() and (self.module.training or image.requires_grad)
        if not self.replays or not (differentiated or torch.is_inference_mode_enabled()):
            return self.compute(image)
        kind = image.shape, differentiated
        if kind not in self.recordings and len(self.recordings) < MAX_RECORDINGS:
            with _left_as_it_was(self.module), _without_cache():
                self.recordings[kind] = self._record(image, differentiated)
        recording = self.recordings.get(kind)
        return self.compute(image) if recording is None or recording.awaits_backward else recording(image)

    def forget(self) -> None:
        """Give the memory of the recordings back."""
        self.recordings.clear()

    def _record(self, image: Tensor, differentiated: bool) -> "_Recording":
        given, stream = image.detach().clone().requires_grad_(image.requires_grad), torch.cuda.Stream()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _aliases(self.module) as aliases:
            asked = [tensor for tensor in (given, *aliases.values()) if tensor.requires_grad and differentiated]

            def backpropagate(*others: Tensor) -> tuple[Tensor | None, ...]:
                with torch.autocast("cuda", enabled=False):  # as the engine does
                    return torch.autograd.grad(outputs, [*asked, *others], incoming, allow_unused=True)

            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for i in range(WARM_UPS):
                    outputs = _listed(self.compute(given))
                    incoming = [torch.zeros_like(output) for output in outputs]
                    if asked:
                        originals = [p for p in aliases if p.requires_grad] if i == 0 else []
                        _require_none(backpropagate(*originals)[len(asked) :])
            torch.cuda.current_stream().wait_stream(stream)
            _require_none([p for p, alias in aliases.items() if p.data_ptr() != alias.data_ptr()])
            with torch.cuda.graph(forward, stream=stream, capture_error_mode="thread_local"):
                made = self.compute(given)
            outputs, found = _listed(made), tuple[Tensor | None, ...]()
            if asked:
                with torch.cuda.graph(backward, pool=forward.pool(), stream=stream, capture_error_mode="thread_local"):
                    found = backpropagate()
        got = {id(tensor): gradient for tensor, gradient in zip(asked, found, strict=True) if gradient is not None}
        return _Recording(
            given.detach(),
            [output.detach() for output in outputs],
            isinstance(made, Tensor),
            incoming,
            got.get(id(given)),
            {parameter: got[id(alias)] for parameter, alias in aliases.items() if id(alias) in got},
            forward,
            backward,
        )


@dataclass
class _Recording:
    """Two graphs and the memory that they read and write."""

    image: Tensor
    outputs: list[Tensor]
    single: bool
    incoming: list[Tensor]
    """Gradients of the outputs."""
    gradient: Tensor | None
    """Of the image."""
    gradients: dict[nn.Parameter, Tensor]
    """Of the parameters that get one: DDP looks for the others."""
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    awaits_backward: bool = False
    """Whether the memory holds what a backward pass will read."""

    def __call__(self, image: Tensor) -> Images:
        made = _Replay.apply(self, image, *self.gradients)
        return made[0] if self.single else list(made)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, image: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.recording = recording
        recording.image.copy_(image)
        recording.forward.replay()
        recording.awaits_backward = recording.gradient is not None or bool(recording.gradients)
        return tuple(output.detach() for output in recording.outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        recording: _Recording = ctx.recording
        torch._foreach_copy_(recording.incoming, gradients)
        recording.backward.replay()
        recording.awaits_backward = False
        # copies: autograd keeps what it is given as a parameter's gradient, and the next replay writes there
        image = None if recording.gradient is None else recording.gradient.clone()
        parameters = list(recording.gradients.values())
        return None, image, *(torch._foreach_mul(parameters, 1.0) if parameters else ())


@contextmanager
def operator_by_operator() -> Iterator[None]:
    """Nothing is replayed or compiled meanwhile: to count what is sent, and for images of a size that hardly comes
    again."""
    before, Recorded.replays = Recorded.replays, False
    compiled = "torch._dynamo" in sys.modules  # which takes a second to import, and without which nothing is
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        Recorded.replays = before


def record_graphs(
    accelerator: Accelerator, net: nn.Module, negatives: Negatives, objective: Objective
) -> list[Recorded]:
    """What is replayed from now on: target, negatives (side by side where they see the same), features."""
    require_graphs(accelerator)
    past: list[nn.Module] = [*negatives.nets]
    if past and negatives.see_the_same:
        negatives.nets.streams = [torch.cuda.Stream() for _ in past]
        past = [negatives.nets]
    seen = [module for module in objective.modules() if isinstance(module, Features)]
    return [Recorded(module) for module in (net, *past, *seen)]


def require_graphs(accelerator: Accelerator) -> None:
    """Refuse a device that has no graphs, and a strategy that gathers weights on the way: they would not stay where a
    graph reads them."""
    if accelerator.device.type != "cuda":
        raise UserError("compute.cuda_graphs: they are a GPU's, and this process computes on the CPU: set it to false")
    if (chosen := strategy(accelerator)) not in ("single", "ddp"):
        raise UserError(f"compute.cuda_graphs: under single and ddp alone, not under {chosen}")


def _require_none(apart: Sequence[Tensor | None]) -> None:
    if any(tensor is not None for tensor in apart):
        raise UserError(
            "compute.cuda_graphs: the network reads a parameter elsewhere than where its module holds it (a list of "
            "its own, the flat weights of an LSTM), which a recording would not follow: set it to false"
        )


def _listed(images: Images) -> list[Tensor]:
    return [images] if isinstance(images, Tensor) else list(images)


@contextmanager
def _aliases(module: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Has the module compute with other parameters in the same memory, in the order of `parameters()`: the old ones
    belong to autograd nodes (DDP keeps them) of the stream that a recording must not touch."""
    aliases = {p: nn.Parameter(p.detach(), p.requires_grad) for p in module.parameters()}
    owners = [owner for owner in module.modules() if owner._parameters]
    before = [dict(owner._parameters) for owner in owners]
    for owner in owners:
        owner._parameters.update({name: None if p is None else aliases[p] for name, p in owner._parameters.items()})
    try:
        yield aliases
    finally:
        for owner, own in zip(owners, before, strict=True):
            owner._parameters.update(own)


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Buffers, such as running statistics, and torch's generators."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.random.fork_rng([torch.cuda.current_device()]):
        yield
    for buffer, before in buffers:
        buffer.copy_(before)


@contextmanager
def _without_cache() -> Iterator[None]:
    """Autocast as it is, but each weight cast where it is used: a cast that is kept would not follow the weight."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
        yield
