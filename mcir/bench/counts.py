"""Numbers of a step that do not depend on the machine: floating point operations, and operators sent to the device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from mcir.data.loader import Batch
from mcir.train.graphs import operator_by_operator


def _convolution_backward(gradient: Any, x: Any, weight: Any, *arguments: Any, **shapes: Any) -> int:
    """As many as forward for each gradient that is wanted: torch's own count knows no groups."""
    transposed, _, _, wanted = arguments[-4:]
    return conv_flop_count(x, weight, gradient, transposed) * sum(wanted[:2])


def count_flops(step: Callable[[Sequence[Batch]], Any], batches: Sequence[Batch]) -> int:
    """Floating point operations of a step on this process: products and sums of convolutions, matrix products and
    attention, by torch's counter (but for the gradients of grouped convolutions)."""
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward}
    )
    with counter, operator_by_operator():
        step(batches)
    return counter.get_total_flops()


class _Operators(TorchDispatchMode):
    """Counts what is dispatched to the device: each operator but those that only look at memory another way."""

    num = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += not function.is_view
        return function(*args, **(kwargs or {}))


def count_operators(step: Callable[[Sequence[Batch]], Any], batches: Sequence[Batch]) -> int:
    """Operators of a step without compiled graphs: on a GPU each is a launch at least, which small networks wait
    for."""
    with _Operators() as counter, operator_by_operator():
        step(batches)
    return counter.num
