"""Batches with an exact position: what the n-th sample is depends on the seed alone (stream.py), so resuming is
counting.

The ranks share each batch by runs of places; a rank's workers share its row groups, so that none is read twice, and the
main process takes their samples in order. The position is the number of samples that all ranks together have taken: all
a checkpoint needs to know.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from mcir.data.decode import to_float
from mcir.data.mixup import Mixer
from mcir.data.order import share
from mcir.data.resize import shrink
from mcir.data.stages import Phase, Stage, phases, position_after
from mcir.data.stream import DataConfig, Failure, Label, Sample, SampleStream
from mcir.data.transforms import Pixels
from mcir.data.workers import decoded, workers_of_a_rank
from mcir.errors import UserError

log = logging.getLogger(__name__)

_MOST_UNUSABLE = 1000
"""So many rows on end that cannot be used stop a run that skips such rows."""
_MOST_EXCESS = 1.5
"""Times its own share of the bytes that a rank reads without a warning."""


@dataclass(frozen=True)
class Batch:
    """`degraded` (B, 3, H, W) and `clean` (B, 3, s * H, s * W) in [0, 1], fp32, on the device; `key` names the B
    samples.

    `weight` is the share of this rank's places in the batch that hold a usable sample, by which its loss counts; the
    sum over ranks then is the same for any number of them. Where that is 0 there is no key, and the images are one of
    noise, for the sake of the steps that all ranks take together. `source` (B,) are the samples' places in
    `data.train`, where it has several; `extra` the images of further columns, each shaped as clean.
    """

    degraded: Tensor
    clean: Tensor
    key: list[str]
    weight: float = 1.0
    source: Tensor | None = None
    extra: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class _Taken:
    """The samples of a batch that are there: their labels, their places in it, their images (degraded, clean,
    those of further columns), and what the other places have."""

    labels: list[Label]
    places: list[int]
    images: list[Tensor]
    failures: list[Failure]


class Loader:
    """This rank's batches. `position` may be set before iterating starts, to the beginning of a step's batch, and rises
    with each batch."""

    def __init__(
        self,
        data: DataConfig,
        *,
        scale: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        stages: Sequence[Stage] = (),
        columns: Sequence[str] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        """`batch_size` is that of a step, of all ranks together, until the first of `stages` changes it: each rank
        takes an equal share of it, in `accumulate` equal parts. `columns` are further images of the rows."""
        self.phases = phases(batch_size, data.crop_size, stages)
        assert all(phase.batch_size % (world_size * accumulate) == 0 for phase in self.phases)
        assert all(phase.crop_size % scale == 0 for phase in self.phases)
        self.data, self.scale, self.seed = data, scale, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.columns = tuple(columns)
        self.device = torch.device(device)
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._stream: SampleStream | None = None
        self.position = 0
        self.num_skipped = self._unusable = 0
        self.order: str | None = None
        """`SampleStream.order` that `position` counts in; known when iterating starts, where it is compared."""

    def position_after(self, step: int) -> int:
        """Samples that all ranks together have taken in so many steps."""
        return position_after(self.phases, step)

    def __iter__(self) -> Iterator[Batch]:
        stream, self._stream = self._stream or self._opened(), None
        for phase in self.phases:
            if phase.end is None or self.position < phase.end:
                yield from self._batches(stream, phase)

    def open(self) -> None:
        """Look at the datasets, before iterating does. UserError: one cannot be read, or their order is another than
        that of the checkpoint."""
        self._stream = self._opened()

    def _opened(self) -> SampleStream:
        num_lanes = math.gcd(*(phase.batch_size for phase in self.phases))
        stream = SampleStream(self.data, self.scale, self.seed, num_lanes, self.columns)
        if self.order not in (None, stream.order):
            raise UserError(
                "the order of the samples is not that of the checkpoint, so some would be lost and others come again: "
                "change back what was changed of seed, batch_size, data.shuffle_buffer, the weights and the datasets' "
                "rows (or the version of mcir), or start another run from the checkpoint's weights (init_from)"
            )
        self.order = stream.order
        if self.rank == 0:
            self._warn_of_excess(stream)
        return stream

    def _batches(self, stream: SampleStream, phase: Phase) -> Iterator[Batch]:
        """Those of a phase from `position` on."""
        start, size = self.position, phase.batch_size // self.world_size // self.accumulate
        assert (start - phase.position) % phase.batch_size == 0
        mixer = None
        if self.data.mixup:
            mixer = Mixer(self.data.mixup, self.seed, self.position_after(self.data.mixup.after), self._send)
            start = max(phase.position, start - phase.batch_size)  # what the first is mixed with
        num_workers = workers_of_a_rank(self.data.num_workers)
        samples = decoded(stream, start, phase.crop_size, size, self.rank, self.world_size, num_workers)
        with closing(samples):  # an error keeps this frame, and must not keep the workers
            while phase.end is None or start < phase.end:
                groups = range(start, start + phase.batch_size, stream.num_lanes)
                positions = [p for g in groups for p in share(g, self.rank, self.world_size, stream.num_lanes)]
                for part in range(self.accumulate):
                    taken = self._take(islice(samples, size), stream.sides(phase.crop_size), size)
                    images = self._to_device(taken.images)
                    if mixer:
                        own = [positions[part * size + place] for place in taken.places]
                        images = mixer(part, start, own, taken.places, images)
                    position = start + (part + 1) * phase.batch_size // self.accumulate
                    if position > self.position:
                        self._count(taken)
                        self.position = position
                        keys, weight = [key for key, _ in taken.labels], len(taken.labels) / size
                        degraded, clean, *extra = images
                        yield Batch(degraded, clean, keys, weight, self._sources(taken.labels), tuple(extra))
                start += phase.batch_size

    def _take(self, samples: Iterator[Sample | Failure], sides: Sequence[int], size: int) -> "_Taken":
        labels, places, failures = list[Label](), list[int](), list[Failure]()
        batches = [self._empty(size, side) for side in sides]
        for place, sample in enumerate(samples):
            if isinstance(sample, Failure):
                if self.data.on_error == "fail":
                    raise UserError(sample.message)
                failures.append(sample)
                continue
            label, *images = sample
            batches = [_put(batch, len(labels), image) for batch, image in zip(batches, images, strict=True)]
            labels.append(label)
            places.append(place)
        filled = [batch[: len(labels)] if labels else _noise(batch[:1]) for batch in batches]
        return _Taken(labels, places, filled, failures)

    def _sources(self, labels: list[Label]) -> Tensor | None:
        if len(self.data.train) == 1:
            return None
        return self._send(torch.tensor([source for _, source in labels] or [0]))

    def _send(self, tensor: Tensor) -> Tensor:
        """To the device, without waiting for what it is busy with."""
        return tensor if self._copies is None else tensor.pin_memory().to(self.device, non_blocking=True)

    def _count(self, taken: "_Taken") -> None:
        for failure in taken.failures:
            log.warning("skipped: %s", failure.message)
        self.num_skipped += len(taken.failures)
        self._unusable = len(taken.failures) + (0 if taken.labels else self._unusable)
        if self._unusable >= _MOST_UNUSABLE and not taken.labels:
            raise UserError(f"no usable row among {self._unusable}, the last: {taken.failures[-1].message}")

    def _warn_of_excess(self, stream: SampleStream) -> None:
        for i, (excess, units) in enumerate(zip(stream.excess(self.world_size), stream.units, strict=True)):
            if excess > _MOST_EXCESS:
                log.warning(
                    "data.train.%d: each of the %d processes reads %.1f times its share of the bytes, since there are "
                    "only %d row groups, which are read whole: pack the dataset again into %d or more (smaller ones), "
                    "or train with fewer processes",
                    i, self.world_size, excess, len(units.lengths), 4 * self.world_size,
                )  # fmt: skip

    def _empty(self, size: int, side: int) -> Tensor:
        if self._copies is None:
            return torch.empty(size, 3, side, side, dtype=torch.uint8 if self.data.degrade_on_device else torch.float32)
        return torch.empty(size, 3, side, side, dtype=torch.uint8, pin_memory=True)

    def _to_device(self, images: Sequence[Tensor]) -> Sequence[Tensor]:
        """Degraded, clean and further ones, fp32 in [0, 1]."""
        if self._copies is None:
            return self._degraded(images)
        with torch.cuda.stream(self._copies):  # beside the step that the device is still busy with
            there = self._degraded([image.to(self.device, non_blocking=True) for image in images])
        step = torch.cuda.current_stream(self.device)
        step.wait_stream(self._copies)
        for image in there:
            image.record_stream(step)
        return there

    def _degraded(self, images: Sequence[Tensor]) -> list[Tensor]:
        if self.data.degrade_on_device:
            (around, transposed, *further), margin = images, 2 * self.scale
            pair = shrink(around, self.scale), around[..., margin:-margin, margin:-margin]
            images = [*(torch.where(transposed[:, :1] > 0, image.mT, image) for image in pair), *further]
        return [to_float(image) for image in images]


def _put(batch: Tensor, place: int, image: Pixels) -> Tensor:
    """The batch with the image in it: of bytes until one comes that is none."""
    if batch.dtype == torch.uint8 and image.dtype != np.uint8:
        pinned, batch = batch.is_pinned(), to_float(batch)
        batch = batch.pin_memory() if pinned else batch
    batch[place].numpy()[...] = image  # one by one they stay in the cache
    if batch.dtype != torch.uint8 and image.dtype == np.uint8:
        batch[place].div_(255)
    return batch


def _noise(images: Tensor) -> Tensor:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, tuple(images.shape), np.uint8))
    return pixels if images.dtype == torch.uint8 else to_float(pixels)
