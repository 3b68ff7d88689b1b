"""Batches with an exact position: what the n-th sample is depends on the seed alone (stream.py), so resuming is
counting.

Rank r of R takes every R-th position; worker w of W every W-th of those; the main process puts them back in order.
The position is the number of samples that all ranks together have taken: all a checkpoint needs to know.
"""

import atexit
import ctypes
import logging
import math
import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mcir.data.stream import DataConfig, Failure, Sample, SampleStream
from mcir.data.transforms import Pixels
from mcir.errors import UserError

log = logging.getLogger(__name__)

_MOST_UNUSABLE = 1000
"""So many rows on end that cannot be used stop a run that skips such rows."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


@dataclass(frozen=True)
class Batch:
    """`degraded` (B, 3, H, W) and `clean` (B, 3, s * H, s * W) in [0, 1], fp32, on the device; `key` names the B
    samples."""

    degraded: Tensor
    clean: Tensor
    key: list[str]


@dataclass(frozen=True)
class _Chunk:
    """Some samples of one worker, in order: a key or a failure each. Images of 8 bits lie in `slot` of its memory, by
    the sample's place among these; others come along."""

    labels: list[str | Failure]
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
            key, *images = sample
            chunk.labels.append(key)
            if all(image.dtype == np.uint8 for image in images):
                for memory, image in zip(place, images, strict=True):
                    memory[...] = image
            else:
                chunk.others[i] = images[0], images[1]
        return chunk

    def load(self, worker: int, chunk: _Chunk) -> Iterator[Sample | Failure]:
        """The images are views, and the worker writes there again when it comes back to this slot."""
        places = zip(self.degraded[worker, chunk.slot].numpy(), self.clean[worker, chunk.slot].numpy(), strict=True)
        for i, (label, place) in enumerate(zip(chunk.labels, places, strict=True)):
            yield label if isinstance(label, Failure) else (label, *chunk.others.get(i, place))


class _Worker(IterableDataset):
    """What one process of W yields: every W-th of this rank's samples from `position` on, `chunk` at a time."""

    def __init__(self, stream: SampleStream, memory: _Memory, position: int, stride: int, chunk: int) -> None:
        self.stream, self.memory = stream, memory
        self.position, self.stride, self.chunk = position, stride, chunk

    def __iter__(self) -> Iterator[_Chunk]:
        worker = get_worker_info()
        assert worker is not None
        samples = self.stream.samples(self.position + worker.id * self.stride, worker.num_workers * self.stride)
        for slot in cycle(range(self.memory.num_slots)):
            yield self.memory.store(worker.id, slot, islice(samples, self.chunk))


class Loader:
    """This rank's batches. `position` may be set before iterating starts and rises with each batch."""

    def __init__(
        self,
        data: DataConfig,
        *,
        scale: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """`batch_size` is that of all ranks together, which they share equally."""
        assert batch_size % world_size == 0
        assert data.crop_size % scale == 0
        self.data, self.scale, self.seed = data, scale, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.device = torch.device(device)
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.position = 0
        self.num_skipped = 0
        self.order: str | None = None
        """`SampleStream.order` that `position` counts in; known when iterating starts, where it is compared."""

    def __iter__(self) -> Iterator[Batch]:
        share = self.batch_size // self.world_size
        with closing(self._samples(share)) as stream:  # an error keeps this frame, and must not keep the workers
            ahead: deque[Sample | Failure] = deque()  # read before their place
            while True:
                batch = [ahead.popleft() if ahead else next(stream) for _ in range(share)]
                good = [sample for sample in batch if not isinstance(sample, Failure)]
                failures = [sample for sample in batch if isinstance(sample, Failure)]
                for failure in failures:
                    if self.data.on_error == "fail":
                        raise UserError(failure.message)
                    self.num_skipped += 1
                    log.warning("skipped: %s", failure.message)
                if not good:
                    good = [_next_usable(ahead, stream)]
                self.position += self.batch_size
                keys, degraded, clean = zip(*good, strict=True)
                yield Batch(self._to_device(degraded), self._to_device(clean), list(keys))

    def _samples(self, batch_size: int) -> Generator[Sample | Failure]:
        """This rank's samples in order, `batch_size` of them in a batch."""
        _keep_freed_memory()
        position, num_workers = self.position + self.rank, self.data.num_workers
        stream = SampleStream(self.data, self.scale, self.seed)
        if self.order not in (None, stream.order):
            raise UserError(
                "the order of the samples is not that of the checkpoint, so some would be lost and others come again: "
                "change back what was changed of seed, data.shuffle_buffer, the weights and the datasets' rows, or "
                "start another run from the checkpoint's weights (init_from)"
            )
        self.order = stream.order
        if not num_workers:
            yield from stream.samples(position, self.world_size)
        chunk = max(1, batch_size // num_workers)
        ahead = max(2, -(-2 * batch_size // (num_workers * chunk)))
        # A batch may hold views of three chunks of a worker, and the worker be `ahead` chunks further.
        memory = _Memory(num_workers, ahead + 3, chunk, self.data.crop_size, self.scale)
        chunks = iter(
            DataLoader(
                _Worker(stream, memory, position, self.world_size, chunk),
                batch_size=None,  # a worker yields chunks of its own, not batches: so it reads its own lanes alone
                num_workers=num_workers,
                prefetch_factor=ahead,
                collate_fn=_as_it_is,
                worker_init_fn=_start_worker,
            )
        )
        while True:  # the DataLoader asks its workers in turn
            turns = [memory.load(worker, next(chunks)) for worker in range(num_workers)]
            for _ in range(chunk):
                yield from map(next, turns)

    def _to_device(self, images: tuple[Pixels, ...]) -> Tensor:
        as_bytes = self._copies is not None and all(image.dtype == np.uint8 for image in images)
        batch = torch.empty(
            (len(images), *images[0].shape),
            dtype=torch.uint8 if as_bytes else torch.float32,
            pin_memory=self._copies is not None,
        )
        for place, image in zip(batch, images, strict=True):  # one by one they stay in the cache
            place.copy_(torch.from_numpy(image))
            if image.dtype == np.uint8 and not as_bytes:
                place.div_(255)
        if self._copies is None:
            return batch
        with torch.cuda.stream(self._copies):  # beside the step that the device is still busy with
            batch = to_float(batch.to(self.device, non_blocking=True))
        step = torch.cuda.current_stream(self.device)
        step.wait_stream(self._copies)
        batch.record_stream(step)
        return batch


def to_float(image: Tensor) -> Tensor:
    """uint8 -> fp32 in [0, 1]; floats pass."""
    return image.float().div_(255) if image.dtype == torch.uint8 else image


def _next_usable(ahead: deque[Sample | Failure], stream: Iterator[Sample | Failure]) -> Sample:
    """The first usable sample to come; what is read to find it waits in `ahead`."""
    for sample in ahead:
        if not isinstance(sample, Failure):
            return sample
    fault = ""
    while len(ahead) < _MOST_UNUSABLE:
        found = next(stream)
        if not isinstance(found, Failure):
            key, degraded, clean = found
            own = key, degraded.copy(), clean.copy()  # their memory is written again before their place comes
            ahead.append(own)
            return own
        ahead.append(found)
        fault = found.message
    raise UserError(f"no usable row among {len(ahead)}, the last: {fault}")


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
