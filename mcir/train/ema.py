"""An EMA of the target's weights for evaluation, sharded with the target: updating it takes no communication.

It follows this rank's own fp32 pieces (`shards.local_masters`). To be read or written whole it changes places with
them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mcir.parallel.shards import full_params, load_full_params, local_masters


class EMA:
    """ema = decay * ema + (1 - decay) * target, each step; it starts as the target."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, decay: float
    ) -> None:
        self.accelerator, self.model, self.decay = accelerator, model, decay
        self.masters = local_masters(accelerator, model, optimizer)
        self.shards = [master.clone() for master in self.masters]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.shards, self.masters, 1 - self.decay)

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
