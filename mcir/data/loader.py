"""Batches with an exact position: what the n-th sample is depends on the seed alone (stream.py), so resuming is
counting.

The ranks share each batch by runs of places; a rank's workers share its row groups, so that none is read twice, and the
main process takes their samples in order. The position is the number of samples that all ranks together have taken: all
a checkpoint needs to know.
"""

import atexit
import ctypes
import logging
import math
import multiprocessing
import signal
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from mcir.data.stream import DataConfig, Failure, Label, Reader, Sample, SampleStream
from mcir.data.transforms import Pixels
from mcir.errors import UserError

log = logging.getLogger(__name__)

_MOST_UNUSABLE = 1000
"""So many rows on end that cannot be used stop a run that skips such rows."""
_MOST_EXCESS = 1.5
"""Times its own share of the bytes that a rank reads without a warning."""
_ROWS_AHEAD = 16
"""Of one row group at least that a worker decodes ahead where a rank has fewer places in a batch than workers, which
then have their row groups one after the other."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


@dataclass(frozen=True)
class Batch:
    """`degraded` (B, 3, H, W) and `clean` (B, 3, s * H, s * W) in [0, 1], fp32, on the device; `key` names the B
    samples.

    `weight` is the share of this rank's places in the batch that hold a usable sample, by which its loss counts; the
    sum over ranks then is the same for any number of them. Where that is 0 there is no key, and the images are one of
    noise, for the sake of the steps that all ranks take together. `source` (B,) are the samples' places in
    `data.train`, where it has several.
    """

    degraded: Tensor
    clean: Tensor
    key: list[str]
    weight: float = 1.0
    source: Tensor | None = None


@dataclass(frozen=True)
class _Chunk:
    """Some samples of one worker, in order: a key or a failure each. Images of 8 bits lie in `slot` of its memory, by
    the sample's place among these; others come along."""

    labels: list[Label | Failure]
    slot: int
    others: dict[int, tuple[Pixels, Pixels]]


class _Memory:
    """What the workers hand images over in, shared: `clean[worker, slot, place]` and `degraded` alike. It stays for as
    long as they do; memory sent with each batch would be mapped, zeroed and unmapped each time."""

    def __init__(self, num_workers: int, num_slots: int, chunk: int, crop_size: int, scale: int) -> None:
        self.num_slots = num_slots
        sides = crop_size // scale, crop_size
        shapes = [(num_workers, num_slots, chunk, 3, side, side) for side in sides]
        try:
            self.degraded, self.clean = (torch.empty(shape, dtype=torch.uint8).share_memory_() for shape in shapes)
        except RuntimeError as error:
            size = -(-sum(math.prod(shape) for shape in shapes) // 2**20)
            raise UserError(
                f"data.num_workers: the {num_workers} workers of a rank need {size} MiB of /dev/shm, which has less; "
                "enlarge it (docker run --shm-size) or take fewer workers"
            ) from error

    def store(self, worker: int, slot: int, samples: Iterable[Sample | Failure]) -> _Chunk:
        chunk = _Chunk([], slot, {})
        places = zip(self.degraded[worker, slot].numpy(), self.clean[worker, slot].numpy(), strict=True)
        for i, (sample, place) in enumerate(zip(samples, places, strict=True)):
            if isinstance(sample, Failure):
                chunk.labels.append(sample)
                continue
            label, *images = sample
            chunk.labels.append(label)
            if all(image.dtype == np.uint8 for image in images):
                for memory, image in zip(place, images, strict=True):
                    memory[...] = image
            else:
                chunk.others[i] = images[0], images[1]
        return chunk

    def samples(self, worker: int, chunks: DataLoader) -> Iterator[Sample | Failure]:
        """The images are views, and the worker writes there again when it comes back to their slot."""
        it = iter(chunks)  # starts the worker
        return (sample for chunk in it for sample in self._load(worker, chunk))

    def _load(self, worker: int, chunk: _Chunk) -> Iterator[Sample | Failure]:
        places = zip(self.degraded[worker, chunk.slot].numpy(), self.clean[worker, chunk.slot].numpy(), strict=True)
        for i, (label, place) in enumerate(zip(chunk.labels, places, strict=True)):
            yield label if isinstance(label, Failure) else (label, *chunk.others.get(i, place))


class _Worker(IterableDataset):
    """What one process of W yields: its own of this rank's samples from `position` on, `chunk` at a time."""

    def __init__(self, stream: SampleStream, memory: _Memory, position: int, reader: Reader, chunk: int) -> None:
        self.stream, self.memory = stream, memory
        self.position, self.reader, self.chunk = position, reader, chunk

    def __iter__(self) -> Iterator[_Chunk]:
        assert self.reader.worker is not None
        samples = self.stream.samples(self.position, self.reader)
        for slot in cycle(range(self.memory.num_slots)):
            yield self.memory.store(self.reader.worker, slot, islice(samples, self.chunk))


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
        device: torch.device | str = "cpu",
    ) -> None:
        """`batch_size` is that of a step, of all ranks together: each rank takes an equal share of it, in `accumulate`
        equal parts."""
        assert batch_size % (world_size * accumulate) == 0
        assert data.crop_size % scale == 0
        self.data, self.scale, self.seed = data, scale, seed
        self.batch_size, self.rank, self.world_size, self.accumulate = batch_size, rank, world_size, accumulate
        self.device = torch.device(device)
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.position = 0
        self.num_skipped = 0
        self.order: str | None = None
        """`SampleStream.order` that `position` counts in; known when iterating starts, where it is compared."""

    def __iter__(self) -> Iterator[Batch]:
        size, unusable = self.batch_size // self.world_size // self.accumulate, 0
        with closing(self._samples(size)) as samples:  # an error keeps this frame, and must not keep the workers
            while True:
                labels: list[Label] = []
                degraded, clean = (
                    self._empty(size, side) for side in (self.data.crop_size // self.scale, self.data.crop_size)
                )
                for sample in islice(samples, size):
                    if isinstance(sample, Failure):
                        unusable += 1
                        self._skip(sample, unusable)
                        continue
                    unusable = 0
                    label, *images = sample
                    degraded, clean = (
                        _put(batch, len(labels), image) for batch, image in zip((degraded, clean), images, strict=True)
                    )
                    labels.append(label)
                self.position += self.batch_size // self.accumulate
                yield self._batch(degraded, clean, labels, len(labels) / size)

    def _skip(self, failure: Failure, unusable: int) -> None:
        if self.data.on_error == "fail":
            raise UserError(failure.message)
        self.num_skipped += 1
        log.warning("skipped: %s", failure.message)
        if unusable == _MOST_UNUSABLE:
            raise UserError(f"no usable row among {unusable}, the last: {failure.message}")

    def _samples(self, size: int) -> Generator[Sample | Failure]:
        """This rank's samples in order, `size` of them in a batch. Those of a worker are views, for as long as no other
        one of its samples is asked for."""
        _keep_freed_memory()
        stream = SampleStream(self.data, self.scale, self.seed, self.batch_size)
        if self.order not in (None, stream.order):
            raise UserError(
                "the order of the samples is not that of the checkpoint, so some would be lost and others come again: "
                "change back what was changed of seed, batch_size, data.shuffle_buffer, the weights and the datasets' "
                "rows (or the version of mcir), or start another run from the checkpoint's weights (init_from)"
            )
        self.order = stream.order
        assert self.position % self.batch_size == 0
        if self.rank == 0:
            self._warn_of_excess(stream)
        num_workers = self.data.num_workers
        reader = Reader(self.rank, self.world_size, num_workers=max(1, num_workers))
        if not num_workers:
            yield from stream.samples(self.position, reader)
        chunk = max(1, size // num_workers)
        rows_ahead = max(2 * size, 0 if size >= num_workers else num_workers * _ROWS_AHEAD)
        ahead = max(2, -(-rows_ahead // (num_workers * chunk)))
        # While one chunk of a worker is read, it may be `ahead` further.
        memory = _Memory(num_workers, ahead + 1, chunk, self.data.crop_size, self.scale)
        turns = stream.turns(self.position, reader)
        workers = [
            memory.samples(
                worker,
                DataLoader(
                    _Worker(stream, memory, self.position, replace(reader, worker=worker), chunk),
                    batch_size=None,  # a worker yields chunks of its own
                    num_workers=1,  # each is asked when it is its turn
                    prefetch_factor=ahead,
                    collate_fn=_as_it_is,
                    worker_init_fn=_start_worker,
                    generator=torch.Generator(),  # of a seed that nothing uses; the global one stays as it is
                ),
            )
            for worker in range(num_workers)
        ]
        for worker in turns:
            yield next(workers[worker])

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
            return torch.empty(size, 3, side, side)
        return torch.empty(size, 3, side, side, dtype=torch.uint8, pin_memory=True)

    def _batch(self, degraded: Tensor, clean: Tensor, labels: list[Label], weight: float) -> Batch:
        if not labels:
            degraded, clean = (_noise(images[:1]) for images in (degraded, clean))
        num = max(1, len(labels))
        source = None
        if len(self.data.train) > 1:
            places = torch.tensor([place for _, place in labels] or [0])
            source = self._to_device(places if self._copies is None else places.pin_memory())
        keys = [key for key, _ in labels]
        return Batch(self._to_device(degraded[:num]), self._to_device(clean[:num]), keys, weight, source)

    def _to_device(self, values: Tensor) -> Tensor:
        if self._copies is None:
            return values
        with torch.cuda.stream(self._copies):  # beside the step that the device is still busy with
            batch = to_float(values.to(self.device, non_blocking=True))
        step = torch.cuda.current_stream(self.device)
        step.wait_stream(self._copies)
        batch.record_stream(step)
        return batch


def _put(batch: Tensor, place: int, image: Pixels) -> Tensor:
    """The batch with the image in it: of bytes until one comes that is none."""
    if batch.dtype == torch.uint8 != torch.from_numpy(image).dtype:
        batch = to_float(batch).pin_memory()
    batch[place].copy_(torch.from_numpy(image))  # one by one they stay in the cache
    if batch.dtype != torch.uint8 and image.dtype == np.uint8:
        batch[place].div_(255)
    return batch


def _noise(images: Tensor) -> Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, tuple(images.shape), np.uint8)
    return torch.from_numpy(pixels).to(images.dtype).div_(1 if images.dtype == torch.uint8 else 255)


def to_float(image: Tensor) -> Tensor:
    """uint8 -> fp32 in [0, 1]; floats pass."""
    return image.float().div_(255) if image.dtype == torch.uint8 else image


def _as_it_is(chunk: Any) -> Any:
    return chunk


def _start_worker(worker: int) -> None:
    """The signals that stop a run go to its whole process group; the main process decides when its workers end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Have glibc reuse the memory of an image or of a row group for the next one. Left alone, it and Arrow's allocator
    hand it back to the system time and again, which then zeroes other pages: up to a fifth of the time of decoding a
    JPEG."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 2**28)
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_ARENA_MAX, 1)  # threads that read row groups share this memory, too
        pa.set_memory_pool(pa.system_memory_pool())


@atexit.register
def _kill_workers() -> None:
    """Those of a program that ends in the middle of an epoch: multiprocessing would send them the SIGTERM they ignore,
    and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed worker for a failure
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
