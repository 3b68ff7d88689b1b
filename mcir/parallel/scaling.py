"""The loss scale of fp16: gradients below its smallest number, 6e-8, would be lost without one.

Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2; growth and backoff as torch.amp.GradScaler's.
It is a power of two, so that scaling rounds nothing, and moves on the device without the host's knowing: all ranks see
the same skipped steps, and so the same scale.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor

START, GROWTH_EVERY = 2.0**16, 2000


class LossScale:
    """Halved at a step that overflows, doubled after 2000 steps in a row that do not. It belongs into checkpoints.

    Args:
        accelerator: under ZeRO, DeepSpeed scales the loss and unscales gradients itself, by this scale.
        optimizer: as `accelerator.prepare` returns it.
    """

    def __init__(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
        self._scale = torch.full((), START, device=accelerator.device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=accelerator.device)
        zero = accelerator.distributed_type == DistributedType.DEEPSPEED
        self._zero: Any = getattr(optimizer, "optimizer", optimizer) if zero else None
        if self._zero is not None:
            self._zero.torch_autocast_gradscaler = None  # its own, which no checkpoint of ours holds
            self._tell_deepspeed()

    def __call__(self, loss: Tensor) -> Tensor:
        """What to call backward on."""
        return loss if self._zero is not None else loss * self._scale

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        torch._foreach_mul_(list(gradients), self._scale.reciprocal())

    def update(self, skipped: Tensor) -> None:
        """Move after a step; `skipped` is 1.0 where it overflowed."""
        torch._amp_update_scale_(self._scale, self._good_steps, skipped, 2.0, 0.5, GROWTH_EVERY)
        self._tell_deepspeed()

    def state(self) -> list[float]:
        """For a checkpoint; waits for the device."""
        return [float(self._scale), int(self._good_steps)]

    def load(self, state: Sequence[float]) -> None:
        self._scale.fill_(state[0])
        self._good_steps.fill_(int(state[1]))
        self._tell_deepspeed()

    def _tell_deepspeed(self) -> None:
        if self._zero is not None:
            self._zero.custom_loss_scaler, self._zero.external_loss_scale = True, float(self._scale)
