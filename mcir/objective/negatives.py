"""The negatives: frozen, full, fp32 copies of the target's past, the same on every rank by construction.

They are made before `accelerator.prepare`, are never prepared themselves and hold no gradients. Whatever shards the
target, they change in two ways only, both collective and both driven by rank-agreed values: `sync` (once, after
`prepare`) and `update(step)`, a function of the step.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Literal

import torch
from accelerate import Accelerator
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from mcir.errors import UserError
from mcir.parallel.accelerator import autocast
from mcir.parallel.shards import broadcast_from_first, full_params
from mcir.section import Section

BUCKET_BYTES = 64 * 2**20
"""Gathered tensors are blended in buckets of about this size: the peak extra memory of an update."""


class Schedule(Section):
    """When and how far one negative follows the target: negative = decay * negative + (1 - decay) * target."""

    update_every: PositiveInt = 100
    """Optimizer steps between two updates; steps count from 1 and the update follows `optimizer.step`."""
    decay: float = Field(0.1, ge=0, lt=1)
    """Share of the negative's own past that an update keeps."""
    start: float = Field(0.0, ge=0, le=1)
    """Share of a random initialisation of its own that the negative starts with; the rest is the target (0.1 as
    published)."""
    role: Literal["negative", "anchor"] = "negative"
    """`negative` repels; `anchor` attracts, beside the clean image where the contrast has one: for a slow history
    (SSC-SR, PNE), such as update_every 1 and decay 0.999."""
    views: PositiveInt = 1
    """Images that it restores: the degraded one and `views` - 1 noisy copies of it, each an image of the past, at the
    memory of one network (DCKD: 5)."""
    view_sigma: tuple[NonNegativeFloat, NonNegativeFloat] = (1.0, 30.0)
    """Range, of 255, of the copies' white Gaussian noise, drawn for each image; clipped to [0, 1]."""
    view_gray: float = Field(0.5, ge=0, le=1)
    """Share of the copies whose noise is the same in all channels."""


class Negatives(nn.Module):
    """K frozen copies of `target` that follow it on `schedules`.

    Args:
        target: the network, before `accelerator.prepare`.
        schedules: one for each negative; none is allowed (plain training).
        init: builds a freshly initialised network, needed where a schedule's `start` is above 0.
    """

    def __init__(
        self, target: nn.Module, schedules: Sequence[Schedule], init: Callable[[], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.schedules = tuple(schedules)
        if init is None and any(schedule.start > 0 for schedule in schedules):
            raise UserError("a negative with start > 0 needs `init`, a function that builds a fresh network")
        self.nets = nn.ModuleList(deepcopy(target) if s.start == 0 or init is None else init() for s in schedules)
        self.nets.requires_grad_(False).eval()
        self._target: tuple[Accelerator, nn.Module] | None = None  # in a tuple: the target is no submodule

    def sync(self, accelerator: Accelerator, target: nn.Module) -> None:
        """Start every negative from weights that all ranks agree on. Collective; call it once, after `prepare`.

        negative = start * own random initialisation (that of rank 0) + (1 - start) * target.
        """
        self._target = (accelerator, target)
        self.nets.to(accelerator.device)
        broadcast_from_first(accelerator, [*self.nets.parameters(), *self.nets.buffers()])
        self._blend({k: schedule.start for k, schedule in enumerate(self.schedules)})

    def forward(self, degraded: Tensor) -> list[Tensor]:
        """What each negative restores from `degraded` (B, 3, H, W): K tensors (B, 3, s * H, s * W), fp32, without
        gradients; of a negative with several views one after the other. Noise comes from torch's generator."""
        accelerator, _ = self._attached()
        past: list[Tensor] = []
        with torch.inference_mode(), autocast(accelerator):
            for net, schedule in zip(self.nets, self.schedules, strict=True):
                past += net(_views(degraded, schedule)).chunk(schedule.views)
        return [p.to(torch.float32, copy=True) for p in past]  # tensors of inference mode would fit into no loss

    def update(self, step: int) -> None:
        """Move the negatives that are due at this step. Collective where any is due: call it on all ranks."""
        due = {k: s.decay for k, s in enumerate(self.schedules) if step % s.update_every == 0}
        if due:
            self._blend(due)

    def age(self, step: int) -> list[int]:
        """Steps since each negative's last update."""
        return [step % schedule.update_every for schedule in self.schedules]

    @torch.no_grad()
    def checksum(self) -> Tensor:
        """Sum of all weights' bit patterns, an int64 scalar on the device: equal on all ranks, or there is a bug."""
        bits = [p.view(torch.int32).sum(dtype=torch.int64) for p in self.nets.parameters()]
        return torch.stack(bits).sum() if bits else torch.zeros((), dtype=torch.int64)

    def _attached(self) -> tuple[Accelerator, nn.Module]:
        if self._target is None:
            raise RuntimeError("call negatives.sync(accelerator, model) once, after accelerator.prepare")
        return self._target

    @torch.no_grad()
    def _blend(self, decays: Mapping[int, float]) -> None:
        """negative_k = decay_k * negative_k + (1 - decay_k) * target; one gather serves all, buffers are copied."""
        if not decays:
            return
        members = {k: dict(self.nets[k].named_parameters()) for k in decays}
        buffers = {k: dict(self.nets[k].named_buffers()) for k in decays}
        names: list[str] = []
        tensors: list[Tensor] = []

        def flush() -> None:
            for k, decay in decays.items():
                own: list[Tensor] = [members[k][name] for name in names]
                torch._foreach_mul_(own, decay)
                torch._foreach_add_(own, tensors, alpha=1 - decay)
            names.clear()
            tensors.clear()

        num_bytes = 0
        for name, tensor in full_params(*self._attached()):
            if name in members[next(iter(decays))]:
                names.append(name)
                tensors.append(tensor)
                num_bytes += tensor.nbytes
            elif name in buffers[next(iter(decays))]:
                for k in decays:
                    buffers[k][name].copy_(tensor)
            else:
                raise UserError(f"FSDP2 split {name} from the parameter it is shared with: train this network with ddp")
            if num_bytes >= BUCKET_BYTES:
                flush()
                num_bytes = 0
        if names:
            flush()


def _views(degraded: Tensor, schedule: Schedule) -> Tensor:
    """(views * B, 3, H, W): the images, then noisy copies of all of them, and so on."""
    if schedule.views == 1:
        return degraded
    copies = degraded.repeat(schedule.views - 1, 1, 1, 1)
    low, high = schedule.view_sigma
    sigma = low + (high - low) * torch.rand(len(copies), 1, 1, 1, device=copies.device)
    noise = torch.randn_like(copies)
    gray = torch.rand(len(copies), 1, 1, 1, device=copies.device) < schedule.view_gray
    noise = torch.where(gray, noise[:, :1], noise)
    return torch.cat([degraded, (copies + sigma / 255 * noise).clamp(0, 1)])
