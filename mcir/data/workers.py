"""A rank's samples in order, decoded by worker processes.

The workers share the rank's row groups, so that none is read twice (stream.py), and hand images over in shared memory;
the main process takes each sample from the worker whose turn it is.
"""

import atexit
import ctypes
import math
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset

from mcir.data.stream import Failure, Label, Reader, Sample, SampleStream
from mcir.data.transforms import Pixels
from mcir.errors import UserError

_ROWS_AHEAD = 16
"""Of one row group at least that a worker decodes ahead where a rank has fewer places in a batch than workers, which
then have their row groups one after the other."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def workers_of_a_rank(num_workers: int | Literal["auto"]) -> int:
    """`data.num_workers` as a number. Cores are those that this process may use: by affinity and by quota."""
    if num_workers != "auto":
        return num_workers
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    with suppress(OSError, ValueError):  # "max 100000" where there is none
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return max(1, min(8, int(cores / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) - 1))


def decoded(
    stream: SampleStream, position: int, crop_size: int, size: int, rank: int, world_size: int, num_workers: int
) -> Generator[Sample | Failure]:
    """The samples of a rank from `position` on, where a batch begins, for ever; `size` of them are a batch of its own.
    Images are views, for as long as no other sample is asked for. 0 workers: decoded when asked for."""
    keep_freed_memory()
    reader = Reader(rank, world_size, num_workers=max(1, num_workers))
    if not num_workers:
        yield from stream.samples(position, reader, crop_size)
    chunk = max(1, size // num_workers)
    rows_ahead = max(2 * size, 0 if size >= num_workers else num_workers * _ROWS_AHEAD)
    ahead = max(2, -(-rows_ahead // (num_workers * chunk)))
    # While one chunk of a worker is read, it may be `ahead` further.
    memory = _Memory(num_workers, ahead + 1, chunk, stream.sides(crop_size))
    readers = [replace(reader, worker=worker) for worker in range(num_workers)]
    loaders = [
        DataLoader(
            _Worker(stream, memory, position, reader, crop_size, chunk),
            batch_size=None,  # a worker yields chunks of its own
            num_workers=1,  # each is asked when it is its turn
            prefetch_factor=ahead,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # of a seed that nothing uses; the global one stays as it is
        )
        for reader in readers
    ]
    workers = [memory.samples(worker, loader) for worker, loader in enumerate(loaders)]
    for worker in stream.turns(position, reader):
        yield next(workers[worker])


@dataclass(frozen=True)
class _Chunk:
    """Some samples of one worker, in order: a label or a failure each. Images of 8 bits lie in `slot` of its memory, by
    the sample's place among these; others come along."""

    labels: list[Label | Failure]
    slot: int
    others: dict[int, tuple[Pixels, ...]]


class _Memory:
    """What the workers hand images over in, shared: of each kind of image `[worker, slot, place]`. It stays for as long
    as they do; memory sent with each batch would be mapped, zeroed and unmapped each time."""

    def __init__(self, num_workers: int, num_slots: int, chunk: int, sides: Sequence[int]) -> None:
        self.num_slots = num_slots
        shapes = [(num_workers, num_slots, chunk, 3, side, side) for side in sides]
        try:
            self.kinds = [torch.empty(shape, dtype=torch.uint8).share_memory_() for shape in shapes]
        except RuntimeError as error:
            size = -(-sum(math.prod(shape) for shape in shapes) // 2**20)
            raise UserError(
                f"data.num_workers: the {num_workers} workers of a rank need {size} MiB of /dev/shm, which has less; "
                "enlarge it (docker run --shm-size) or take fewer workers"
            ) from error

    def store(self, worker: int, slot: int, samples: Iterable[Sample | Failure]) -> _Chunk:
        chunk = _Chunk([], slot, {})
        places = zip(*(images[worker, slot].numpy() for images in self.kinds), strict=True)
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
                chunk.others[i] = tuple(images)
        return chunk

    def samples(self, worker: int, chunks: DataLoader) -> Iterator[Sample | Failure]:
        """The images are views, and the worker writes there again when it comes back to their slot."""
        it = iter(chunks)  # starts the worker
        return (sample for chunk in it for sample in self._load(worker, chunk))

    def _load(self, worker: int, chunk: _Chunk) -> Iterator[Sample | Failure]:
        places = zip(*(images[worker, chunk.slot].numpy() for images in self.kinds), strict=True)
        for i, (label, place) in enumerate(zip(chunk.labels, places, strict=True)):
            yield label if isinstance(label, Failure) else (label, *chunk.others.get(i, place))


class _Worker(IterableDataset):
    """What one process of W yields: its own of this rank's samples from `position` on, `chunk` at a time."""

    def __init__(
        self, stream: SampleStream, memory: _Memory, position: int, reader: Reader, crop_size: int, chunk: int
    ) -> None:
        self.stream, self.memory, self.position = stream, memory, position
        self.reader, self.crop_size, self.chunk = reader, crop_size, chunk

    def __iter__(self) -> Iterator[_Chunk]:
        assert self.reader.worker is not None
        samples = self.stream.samples(self.position, self.reader, self.crop_size)
        for slot in cycle(range(self.memory.num_slots)):
            yield self.memory.store(self.reader.worker, slot, islice(samples, self.chunk))


def _as_it_is(chunk: Any) -> Any:
    return chunk


def _start_worker(worker: int) -> None:
    """The signals that stop a run go to its whole process group; the main process decides when its workers end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()


def keep_freed_memory() -> None:
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
