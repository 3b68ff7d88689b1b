"""Batches with an exact position: what the n-th sample is depends on the seed alone (order.py), so resuming is
counting.

Rank r of R takes every R-th position; worker w of W every W-th of those; the main process puts them back in order.
The position is the number of samples that all ranks together have taken: all a checkpoint needs to know.
"""

import logging
import signal
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mcir.data.degrade import AnyDegradation
from mcir.data.order import Mixture, Order
from mcir.data.sources import AnySource, Row, Units
from mcir.data.transforms import Augment, training_pair
from mcir.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """`degraded` (B, 3, H, W) and `clean` (B, 3, s * H, s * W) in [0, 1], fp32, on the device; `key` names the B
    samples."""

    degraded: Tensor
    clean: Tensor
    key: list[str]


class TrainSource(BaseModel):
    """One source of the training mixture."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    source: AnySource
    weight: PositiveFloat = 1.0
    """Share of this source in the mixture, relative to the others."""
    degradation: AnyDegradation | None = None
    """Makes `degraded` on the fly where the source holds clean images only."""


class DataConfig(BaseModel):
    """Training data."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    train: tuple[TrainSource, ...] = Field(min_length=1)
    crop_size: PositiveInt
    """Side of the clean crop in pixels; degraded crops are crop_size / scale."""
    augment: Augment = "dihedral"
    """dihedral (8 flips and rotations), hflip, flips (none, none, horizontal, vertical: as IDT), none."""
    num_workers: NonNegativeInt = 4
    """Decoding processes of each rank."""
    shuffle_buffer: PositiveInt = 1024
    """Undecoded rows that a process may hold for shuffling."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a row that cannot be used does: stop the run, or be left out of its batch, counted and logged."""


@dataclass(frozen=True)
class _Failure:
    message: str


_Sample = tuple[str, Tensor, Tensor]


class _SampleStream(IterableDataset):
    """This rank's samples from `position` on, for ever; a worker yields every W-th of them."""

    def __init__(self, data: DataConfig, scale: int, seed: int, position: int, stride: int) -> None:
        self.data, self.scale, self.seed = data, scale, seed
        self.position, self.stride = position, stride

    def __iter__(self) -> Iterator[_Sample | _Failure]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            streams = [_Stream(s, self.seed + i, self.data.shuffle_buffer) for i, s in enumerate(self.data.train)]
            mixture = Mixture.of([s.weight for s in self.data.train], self.seed)
        except (UserError, ValueError) as error:
            while True:
                yield _Failure(str(error))
        position = self.position + first * self.stride
        while True:
            which, index = mixture.locate(position)
            epoch, row = streams[which].read(index)
            # not hash(): it differs between processes
            rng = np.random.default_rng([self.seed, epoch, which, zlib.crc32(row.key.encode())])
            try:
                degraded, clean = training_pair(
                    row, self.data.crop_size, self.scale, self.data.train[which].degradation, self.data.augment, rng
                )
                yield row.key, degraded, clean
            except UserError as error:
                yield _Failure(str(error))
            position += step * self.stride


class _Stream:
    """Random access by rising index to one source, holding the current window of each lane that is asked for."""

    def __init__(self, train: TrainSource, seed: int, buffer: int) -> None:
        self.units: Units = train.source.open()
        self.order = Order(self.units.lengths, seed, buffer)
        self.windows: dict[int, tuple[int, int, dict[int, Row]]] = {}  # lane -> (epoch, first row, place -> row)
        self.readers: dict[int, tuple[int, int, Iterator[Row]]] = {}  # lane -> (epoch, next row, reader)

    def read(self, index: int) -> tuple[int, Row]:
        epoch, lane, place = self.order.locate(index)
        first, last, permutation = self.order.window_of(epoch, lane, place)
        held = self.windows.get(lane)
        if held is None or held[:2] != (epoch, first):
            rows = self._rows(epoch, lane, first, last)
            held = (epoch, first, {first + place: rows[row] for place, row in enumerate(permutation)})
            self.windows[lane] = held
        return epoch, held[2][place]

    def _rows(self, epoch: int, lane: int, first: int, last: int) -> list[Row]:
        at_epoch, at, reader = self.readers.get(lane, (-1, -1, iter(())))
        if (at_epoch, at) != (epoch, first):
            reader = self._sequence(epoch, self.order.lane_range(lane)[0] + first)
        rows = [next(reader) for _ in range(last - first)]
        self.readers[lane] = (epoch, last, reader)
        return rows

    def _sequence(self, epoch: int, row: int) -> Iterator[Row]:
        while row < self.order.num_rows:
            _, unit, start = self.order.unit_at(epoch, row)
            yield from self.units.rows(unit, start)
            row += self.order.lengths[unit] - start


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
        self.position = 0
        self.num_skipped = 0

    def __iter__(self) -> Iterator[Batch]:
        samples = _SampleStream(self.data, self.scale, self.seed, self.position + self.rank, self.world_size)
        loader = DataLoader(
            samples,
            batch_size=None,  # a worker yields samples, not batches: only then does it read its own lanes alone
            num_workers=self.data.num_workers,
            prefetch_factor=max(2, 2 * self.batch_size // self.world_size // self.data.num_workers)
            if self.data.num_workers
            else None,
            worker_init_fn=_ignore_signals,
        )
        stream = iter(loader)
        while True:
            batch = [next(stream) for _ in range(self.batch_size // self.world_size)]
            good = [sample for sample in batch if not isinstance(sample, _Failure)]
            for failure in (sample for sample in batch if isinstance(sample, _Failure)):
                if self.data.on_error == "fail":
                    raise UserError(failure.message)
                self.num_skipped += 1
                log.warning("skipped: %s", failure.message)
            if not good:
                raise UserError(f"no usable row in a whole batch, the last: {batch[-1].message}")
            self.position += self.batch_size
            keys, degraded, clean = zip(*good, strict=True)
            yield Batch(self._to_device(degraded), self._to_device(clean), list(keys))

    def _to_device(self, images: tuple[Tensor, ...]) -> Tensor:
        if len({image.dtype for image in images}) > 1:  # 8 and 16 bit files in one batch
            images = tuple(to_float(image) for image in images)
        batch = torch.stack(images)
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        return to_float(batch)


def to_float(image: Tensor) -> Tensor:
    """uint8 -> fp32 in [0, 1]; floats pass."""
    return image.float().div_(255) if image.dtype == torch.uint8 else image


def _ignore_signals(worker: int) -> None:
    """The signals that stop a run go to its whole process group; the main process decides when its workers end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
