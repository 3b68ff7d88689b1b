"""The negatives: frozen, full, fp32 copies of the target's past, the same on every rank by construction.

They are made before `accelerator.prepare`, are never prepared themselves and hold no gradients. Whatever shards the
target, they change in two ways only, both collective and both driven by rank-agreed values: `sync` (once, after
`prepare`) and `update`, a function of the step and, for triggered ones, of a number that all ranks agree on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mcir.errors import UserError
from mcir.objective.schedule import Schedule
from mcir.parallel.accelerator import autocast
from mcir.parallel.gather import BUCKET_BYTES
from mcir.parallel.shards import broadcast_from_first, full_params

Weights = Callable[[], Iterator[tuple[str, Tensor]]]
"""Gives whole parameters and buffers, as `full_params`; collective."""


class History(nn.ModuleList):
    """Networks that look at the same images. (B, 3, H, W) -> of each (B, 3, s * H, s * W)."""

    streams: Sequence[torch.cuda.Stream] = ()
    """Of a GPU, one a network: in a recording they compute beside each other, since each alone leaves the device half
    empty, and their features are in memory together. None: one after the other."""

    def forward(self, images: Tensor) -> list[Tensor]:
        if not self.streams:
            return [net(images) for net in self]
        here, restored = torch.cuda.current_stream(), list[Tensor]()
        recording, last = torch.cuda.is_current_stream_capturing(), here
        for net, stream in zip(self, self.streams, strict=True):
            stream.wait_stream(here if recording else last)  # the first may compute what the others find there
            last = stream
            with torch.cuda.stream(stream):
                restored.append(net(images))
        for stream in self.streams:
            here.wait_stream(stream)
        return restored


class Negatives(nn.Module):
    """K frozen copies of `target` that follow it on `schedules`.

    Args:
        target: the network, before `accelerator.prepare`.
        schedules: one for each negative; none is allowed (plain training).
        init: builds a freshly initialised network, needed where a schedule's `start` is above 0.
        per_image: `all` of them restore each image, or `one`, which is dealt.
    """

    turn: Tensor
    updated: Tensor

    def __init__(
        self,
        target: nn.Module,
        schedules: Sequence[Schedule],
        init: Callable[[], nn.Module] | None = None,
        per_image: str = "all",
    ) -> None:
        super().__init__()
        self.schedules = tuple(schedules)
        self.per_image = per_image
        if init is None and any(schedule.start > 0 for schedule in schedules):
            raise UserError("a negative with start > 0 needs `init`, a function that builds a fresh network")
        self.nets = History(deepcopy(target) if s.start == 0 or init is None else init() for s in schedules)
        self.nets.requires_grad_(False).eval()
        self._accelerator: Accelerator | None = None
        self._weights: dict[str, Weights] = {}
        # Of triggered ones: the number of updates of all of them, and the step of each one's last.
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64))
        self.register_buffer("updated", torch.zeros(len(self.schedules), dtype=torch.int64))

    def sync(self, accelerator: Accelerator, target: nn.Module, ema: Weights | None = None) -> None:
        """Start every negative from weights that all ranks agree on. Collective; call it once, after `prepare`.

        negative = start * own random initialisation (that of rank 0) + (1 - start) * target. `ema` gives the averaged
        weights whole, where a schedule's source is the EMA.
        """
        self._accelerator = accelerator
        self._weights = {"target": lambda: full_params(accelerator, target)} | ({"ema": ema} if ema else {})
        if missing := {schedule.source for schedule in self.schedules} - set(self._weights):
            raise UserError(f"a negative's source is {missing.pop()}, of which there is none: set ema_decay")
        self.to(accelerator.device)
        broadcast_from_first(accelerator, [*self.nets.parameters(), *self.nets.buffers()])
        self._blend({k: schedule.start for k, schedule in enumerate(self.schedules)}, "target")

    def forward(self, degraded: Tensor, draw: Sequence[int] | None = None) -> list[Tensor]:
        """What each negative restores from `degraded` (B, 3, H, W): K tensors (B, 3, s * H, s * W), fp32, without
        gradients; of a negative with several views one after the other. Noise comes from torch's generator.

        Where one is dealt to each image: one tensor in place of all negatives', then the anchors'. The deal is drawn
        from `draw`, such as (seed, step), equal on all ranks.
        """
        with torch.inference_mode(), autocast(self._attached()):
            past = self.nets(degraded) if self.see_the_same else self._each(degraded, draw)
        return [p.to(torch.float32, copy=True) for p in past]  # tensors of inference mode would fit into no loss

    @property
    def see_the_same(self) -> bool:
        """Whether all negatives restore the very images of a batch."""
        return self.per_image == "all" and all(schedule.views == 1 for schedule in self.schedules)

    def _each(self, degraded: Tensor, draw: Sequence[int] | None) -> list[Tensor]:
        """The same, of negatives that see images of their own."""
        nets, past = list(zip(self.nets, self.schedules, strict=True)), list[Tensor]()
        if self.per_image == "one":
            past.append(self._dealt([net for net, s in nets if s.role == "negative"], degraded, draw))
            nets = [(net, schedule) for net, schedule in nets if schedule.role == "anchor"]
        for net, schedule in nets:
            past += net(_views(degraded, schedule)).chunk(schedule.views)
        return past

    def _dealt(self, nets: Sequence[nn.Module], degraded: Tensor, draw: Sequence[int] | None) -> Tensor:
        if draw is None:
            raise UserError("one negative an image is dealt from a seed: negatives(degraded, draw=(seed, step))")
        rank, num_ranks = self._attached().process_index, self._attached().num_processes
        mine = deal(len(degraded) * num_ranks, len(nets), np.random.default_rng(draw))[rank * len(degraded) :][
            : len(degraded)
        ]
        places = [torch.from_numpy(np.flatnonzero(mine == k)) for k in range(len(nets))]
        order = torch.cat(places).argsort().to(degraded.device, non_blocking=True)  # back from the negatives' order
        chosen = [
            (net, p.to(degraded.device, non_blocking=True)) for net, p in zip(nets, places, strict=True) if len(p)
        ]
        return torch.cat([net(degraded[p]) for net, p in chosen])[order]

    def update(self, step: int, error: Tensor | None = None) -> None:
        """Move the negatives that are due at this step. Collective where any is due: call it on all ranks.

        `error`: what triggers look at, mean_b std(2 (restored - clean)), equal on all ranks.
        """
        decays: dict[int, float | Tensor] = {
            k: s.decay for k, s in enumerate(self.schedules) if s.trigger is None and s.last_update(step) == step
        }
        if self.has_triggers:
            decays |= self._triggered(step, error)
        for source in self._weights:
            self._blend({k: d for k, d in decays.items() if self.schedules[k].source == source}, source)

    @property
    def has_triggers(self) -> bool:
        return any(schedule.trigger is not None for schedule in self.schedules)

    def age(self, step: int) -> list[int]:
        """Steps since each negative's last update. Waits for the device where one is triggered."""
        updated = self.updated.tolist() if self.has_triggers else [0] * len(self.schedules)
        ages = zip(self.schedules, updated, strict=True)
        return [
            step - (last if schedule.trigger is not None else schedule.last_update(step)) for schedule, last in ages
        ]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the networks; to be overwritten in place by `load`."""
        return {"negatives.turn": self.turn, "negatives.updated": self.updated} if self.has_triggers else {}

    def checksum(self) -> Tensor:
        """(T,) int64 on the device: `checksums` in the order of the nets' state_dict. Equal on all ranks, or there is a
        bug."""
        return checksums(self.nets.state_dict().values())

    def _attached(self) -> Accelerator:
        if self._accelerator is None:
            raise RuntimeError("call negatives.sync(accelerator, model) once, after accelerator.prepare")
        return self._accelerator

    @torch.no_grad()
    def _triggered(self, step: int, error: Tensor | None) -> dict[int, Tensor]:
        """The triggered negatives' decays of this step: 1 for all but the one whose turn it is, and for that one too
        where the error is low. They stay on the device, so the host need not know which is updated."""
        if error is None:
            raise UserError("a triggered negative needs `error`: negatives.update(step, error)")
        ring = [(k, s.trigger, s.decay) for k, s in enumerate(self.schedules) if s.trigger is not None]
        decays, turn = {}, self.turn % len(ring)
        fired = torch.zeros_like(self.turn)
        for place, (k, threshold, decay) in enumerate(ring):
            due = (turn == place) & (error > threshold)
            decays[k] = torch.where(due, decay, 1.0)
            self.updated[k] = torch.where(due, step, self.updated[k])
            fired += due
        self.turn += fired
        return decays

    @torch.no_grad()
    def _blend(self, decays: Mapping[int, float | Tensor], source: str) -> None:
        """negative_k = decay_k * negative_k + (1 - decay_k) * weights; one gather serves all, buffers are copied."""
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
                if isinstance(decay, float):
                    torch._foreach_add_(own, tensors, alpha=1 - decay)
                else:
                    torch._foreach_add_(own, torch._foreach_mul(tensors, 1 - decay))
            names.clear()
            tensors.clear()

        num_bytes = 0
        for name, tensor in self._weights[source]():
            if name in members[next(iter(decays))]:
                names.append(name)
                tensors.append(tensor if source == "target" else tensor.clone())  # the average gives its place back
                num_bytes += tensor.nbytes
            elif name in buffers[next(iter(decays))]:
                for k, decay in decays.items():
                    own_buffer = buffers[k][name]
                    own_buffer.copy_(tensor if isinstance(decay, float) else torch.where(decay < 1, tensor, own_buffer))
            else:
                raise UserError(f"FSDP2 split {name} from the parameter it is shared with: train this network with ddp")
            if num_bytes >= BUCKET_BYTES:
                flush()
                num_bytes = 0
        if names:
            flush()


@torch.no_grad()
def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """(T,) int64: the sum of each tensor's bytes."""
    sums = [
        t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).sum(dtype=torch.int64)
        for t in tensors
    ]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


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


def deal(num_images: int, num_negatives: int, rng: np.random.Generator) -> np.ndarray:
    """Which negative each of the images of all ranks has, those of a rank one after the other. Any negative is as
    likely as another for any image, no two counts differ by more than one, and each rank has them equally often where
    K divides its number of images.
    """
    rounds, left = divmod(num_images, num_negatives)
    each = rng.permuted(np.tile(np.arange(num_negatives), (rounds, 1)), axis=1)  # (rounds, K)
    return np.concatenate([each.reshape(-1), rng.permutation(num_negatives)[:left]])


def restoration_error(restored: Tensor, clean: Tensor) -> Tensor:
    """mean_b std(2 (restored - clean)): what triggers look at."""
    return (2 * (restored.detach().float() - clean)).flatten(1).std(dim=1).mean()
