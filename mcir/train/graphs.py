"""CUDA graphs: a GPU replays as one launch what the host would have to send it operator by operator."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from mcir.archs.base import MAX_GRAPHS
from mcir.errors import UserError
from mcir.parallel.accelerator import strategy


def record_graphs(modules: Iterable[nn.Module], compiled: bool = False, backend: str = "cudagraphs") -> None:
    """Have each module's forward pass, and the backward pass of what needs one, recorded at its first call with inputs
    of a shape, and replayed from then on; `compiled`: after torch.compile has fused it.

    Weights are read where they are, so an optimizer or an update of a negative that writes in place needs no new
    recording. Draws come from torch's generator as it is at each replay. What a module returns is overwritten in the
    step after: `begin_step` says where that begins. On a CPU the same graphs are traced, and torch says that it
    records none. A module that is no single graph is torch's error at its first call
    (`try_network` tries those that are not ours).
    """
    from torch import _dynamo

    _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, MAX_GRAPHS)
    how: dict[str, Any] = {"mode": "reduce-overhead"} if compiled else {"backend": backend}
    for module in modules:
        module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False, **how)  # hooks stay outside


def begin_step() -> None:
    """What the graphs returned so far is no longer needed: call it before the first micro-batch of a step."""
    torch.compiler.cudagraph_mark_step_begin()


def require_unsharded(accelerator: Accelerator) -> None:
    """Refuse a strategy that gathers weights on the way: they would not stay where a graph reads them."""
    if (chosen := strategy(accelerator)) not in ("single", "ddp"):
        raise UserError(f"compute.cuda_graphs: under single and ddp alone, not under {chosen}")
