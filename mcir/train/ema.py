"""An EMA of the target's weights for evaluation, sharded with the target: updating it takes no communication.

It follows this rank's own fp32 pieces (`shards.local_masters`). To be read or written whole it changes places with
them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mcir.parallel.shards import full_params, load_full_params, local_masters

MATURE = 5.0
"""Lifetimes, of 1 / (1 - decay) steps each, after which an average has forgotten its beginning: e^-5 is 0.7 %."""


class EMA:
    """ema = decay * ema + (1 - decay) * target, each step; it starts as the target.

    With `warmup` the decay of step n is min(decay, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage
    (`num_updates`): the average spans the last tenth of the steps so far until that is its whole lifetime, and the
    initial weights are gone after twenty. Without, n steps leave decay^n of them.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        decay: float,
        warmup: bool = True,
    ) -> None:
        self.accelerator, self.model, self.decay, self.warmup = accelerator, model, decay, warmup
        self.masters = local_masters(accelerator, model, optimizer)
        self.shards = [master.clone() for master in self.masters]

    def decay_at(self, step: int) -> float:
        """The decay of the update that follows optimizer step `step`, counted from 1."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        torch._foreach_lerp_(self.shards, self.masters, 1 - self.decay_at(step))

    def youth(self, step: int) -> str | None:
        """A sentence on an average that is too young to be judged after `step` steps; None for one that is not."""
        lifetime = 1 / (1 - self.decay)
        if step >= MATURE * lifetime:
            return None
        age = (
            f"the average of the weights is {step} steps old, {step / lifetime:.2g} lifetimes of ema_decay {self.decay}"
        )
        if self.warmup:
            spans = min(lifetime, 1 / (1 - self.decay_at(step)))
            return f"{age}: it spans about {spans:.0f} steps so far, of {lifetime:.0f}"
        return f"{age}: {self.decay**step:.1%} of it are the initial weights (ema_warmup: true forgets them)"

    def full(self) -> Iterator[tuple[str, Tensor]]:
        """As `full_params`, with the averaged weights. Collective; exhaust it."""
        with self._in_place_of_target():
            yield from full_params(self.accelerator, self.model)

    def load(self, read: Callable[[str], Tensor]) -> None:
        """Take whole averaged weights from `read(name)`. Collective."""
        current = {name: tensor.clone().cpu() for name, tensor in full_params(self.accelerator, self.model)}
        load_full_params(self.accelerator, self.model, read)
        for shard, master in zip(self.shards, self.masters, strict=True):
            shard.copy_(master)
        load_full_params(self.accelerator, self.model, current.__getitem__)

    @contextmanager
    def _in_place_of_target(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for shard, master in zip(self.shards, self.masters, strict=True):
            current = master.clone()
            master.copy_(shard)
            shard.copy_(current)
