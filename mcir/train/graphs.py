"""CUDA graphs: a GPU replays as one launch what the host would have to send it operator by operator."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mcir.errors import UserError
from mcir.parallel.accelerator import strategy

MAX_RECORDINGS = 4
"""Of a module, for one crop size: a batch that lacks samples is not worth its own."""
WARM_UPS = 3
"""Calls before the recording, in which libraries and compiled blocks choose their kernels."""
Images = Tensor | Sequence[Tensor]


class Recorded:
    """A module's forward pass, and its backward pass where gradients are asked for, recorded at the first call with an
    image of a shape and replayed from then on. What is neither differentiated nor in inference mode is computed as
    ever.

    Weights are read where they are, so an optimizer or an update of a negative that writes in place needs no new
    recording. Draws come from torch's generator as it is at each replay. What the module returns is overwritten by its
    next call of that kind. Hooks on the module stay outside.
    """

    replays = True

    def __init__(self, module: nn.Module) -> None:
        self.module, self.compute = module, module.forward
        self.recordings = dict[Any, Callable[[Tensor], Images]]()
        module.forward = self

    def __call__(self, image: Tensor) -> Images:
        differentiated = torch.is_grad_enabled() and (self.module.training or image.requires_grad)
        if not self.replays or not (differentiated or torch.is_inference_mode_enabled()):
            return self.compute(image)
        kind = image.shape, differentiated
        if kind not in self.recordings and len(self.recordings) < MAX_RECORDINGS:
            with _left_as_it_was(self.module), _without_cache():
                self.recordings[kind] = self._record(image, differentiated)
        return self.recordings.get(kind, self.compute)(image)

    def forget(self) -> None:
        """Give the memory of the recordings back."""
        self.recordings.clear()

    def _record(self, image: Tensor, differentiated: bool) -> Callable[[Tensor], Images]:
        given, stream = image.detach().clone().requires_grad_(image.requires_grad), torch.cuda.Stream()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _aliases(self.module) as aliases:
            inputs = [given, *aliases.values()]  # the image, then the parameters
            asked = [tensor for tensor in inputs if tensor.requires_grad and differentiated]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    outputs = _listed(self.compute(given))
                    incoming = [torch.zeros_like(output) for output in outputs]
                    if asked:
                        torch.autograd.grad(outputs, asked, incoming, allow_unused=True)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(forward, stream=stream, capture_error_mode="thread_local"):
                made = self.compute(given)
            outputs, found = _listed(made), tuple[Tensor | None, ...]()
            if asked:
                with torch.cuda.graph(backward, pool=forward.pool(), stream=stream, capture_error_mode="thread_local"):
                    found = torch.autograd.grad(outputs, asked, incoming, allow_unused=True)
        of = dict(zip(map(id, asked), found, strict=True))
        outgoing = [of.get(id(tensor)) for tensor in inputs]
        outputs, single = [output.detach() for output in outputs], isinstance(made, Tensor)
        del made, aliases, inputs, asked

        class Replayed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, image: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
                given.detach().copy_(image)
                forward.replay()
                return tuple(output.detach() for output in outputs)

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
                torch._foreach_copy_(incoming, gradients)
                backward.replay()
                # copies: autograd keeps what it is given as a parameter's gradient, and the next replay writes there
                found = iter(torch._foreach_mul([gradient for gradient in outgoing if gradient is not None], 1.0))
                return tuple(None if gradient is None else next(found) for gradient in outgoing)

        def replay(image: Tensor) -> Images:
            made = Replayed.apply(image, *self.module.parameters())
            return made[0] if single else list(made)

        return replay


@contextmanager
def operator_by_operator() -> Iterator[None]:
    """Nothing is replayed meanwhile: what is to be counted is sent anew."""
    Recorded.replays = False
    try:
        yield
    finally:
        Recorded.replays = True


def require_graphs(accelerator: Accelerator) -> None:
    """Refuse a device that has no graphs, and a strategy that gathers weights on the way: they would not stay where a
    graph reads them."""
    if accelerator.device.type != "cuda":
        raise UserError("compute.cuda_graphs: they are a GPU's, and this process computes on the CPU: set it to false")
    if (chosen := strategy(accelerator)) not in ("single", "ddp"):
        raise UserError(f"compute.cuda_graphs: under single and ddp alone, not under {chosen}")


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
    with torch.random.fork_rng():
        yield
    for buffer, before in buffers:
        buffer.copy_(before)


@contextmanager
def _without_cache() -> Iterator[None]:
    """Autocast as it is, but each weight cast where it is used: a cast that is kept would not follow the weight."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
        yield
