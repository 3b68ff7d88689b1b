"""The samples of a mixture of sources by position: what the n-th one is depends on the seed alone (order.py)."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from mcir.data.degrade import AnyDegradation
from mcir.data.order import Mixture, Order
from mcir.data.rows import Row, Units
from mcir.data.sources import AnySource
from mcir.data.transforms import Augment, Pixels, training_pair
from mcir.errors import UserError
from mcir.section import Section


class TrainSource(Section):
    """One source of the training mixture."""

    source: AnySource
    weight: PositiveFloat = 1.0
    """Share of this source in the mixture, relative to the others."""
    degradation: AnyDegradation | None = None
    """Makes `degraded` on the fly where the source holds clean images only."""


class DataConfig(Section):
    """Training data."""

    train: tuple[TrainSource, ...] = Field(min_length=1)
    crop_size: PositiveInt
    """Side of the clean crop in pixels; degraded crops are crop_size / scale."""
    augment: Augment = "dihedral"
    """dihedral (8 flips and rotations), hflip, flips (none, none, horizontal, vertical: as IDT), none."""
    num_workers: NonNegativeInt = 4
    """Decoding processes of each rank."""
    shuffle_buffer: PositiveInt = 1024
    """Undecoded rows of a source that a process may hold for shuffling, in a mixture some 200 more."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a row that cannot be used does: stop the run, or be left out of its batch, counted and logged. Where a
    process has none left in a batch, its next usable sample stands in, and comes again in its own place. A row group or
    tar that turns unreadable counts row by row; what cannot be found or opened at the start always stops the run."""


Sample = tuple[str, Pixels, Pixels]
"""key, degraded (3, h, w), clean (3, s * h, s * w)"""


@dataclass(frozen=True)
class Failure:
    """Takes the place of a sample that cannot be had."""

    message: str


class SampleStream:
    """The samples of all sources of `data`, which are opened here once, for all workers."""

    def __init__(self, data: DataConfig, scale: int, seed: int) -> None:
        """UserError where a source cannot be opened or holds nothing."""
        self.data, self.scale, self.seed = data, scale, seed
        try:
            self.mixture = Mixture.of([train.weight for train in data.train], seed)
        except ValueError as error:
            raise UserError(f"data.train: {error}") from error
        self.units = [train.source.open() for train in data.train]
        decides = (seed, data.shuffle_buffer, self.mixture.counts, [units.lengths for units in self.units])
        self.order = f"{zlib.crc32(repr(decides).encode()):08x}"
        """Of what decides which sample is the n-th."""

    def samples(self, position: int, stride: int) -> Iterator[Sample | Failure]:
        """Those at `position`, `position + stride`, ..., for ever."""
        streams = [
            SourceStream(units, self.seed + i, self.data.shuffle_buffer, self.mixture.spread(i))
            for i, units in enumerate(self.units)
        ]
        while True:
            which, index = self.mixture.locate(position)
            train = self.data.train[which]
            try:
                epoch, row = streams[which].read(index)
                # not hash(): it differs between processes
                rng = np.random.default_rng([self.seed, epoch, which, zlib.crc32(row.key.encode())])
                pair = training_pair(row, self.data.crop_size, self.scale, train.degradation, self.data.augment, rng)
                sample: Sample | Failure = (row.key, *pair)
            except UserError as error:
                sample = Failure(str(error))
            yield sample  # outside of try: a program that ends here has no UserError left to compare with
            position += stride


class SourceStream:
    """Access to one source by an index that rises, but for `spread`; holds the windows that may be asked for again."""

    def __init__(self, units: Units, seed: int, buffer: int, spread: int = 0) -> None:
        self.units, self.spread = units, spread
        self.order = Order(units.lengths, seed, buffer)
        self.windows: dict[int, list[_Window]] = {}  # of each lane
        self.readers: dict[int, tuple[int, int, Iterator[Row | UserError]]] = {}  # lane -> (epoch, next row, reader)

    def read(self, index: int) -> tuple[int, Row]:
        """(epoch, row) of a sample. UserError where its row cannot be read."""
        epoch, lane, place = self.order.locate(index)
        held = self.windows.setdefault(lane, [])
        window = next((w for w in held if w.epoch == epoch and w.first <= place < w.last), None)
        if window is None:
            at_epoch, _, at = self.order.locate(max(0, index - self.spread))
            held[:] = [w for w in held if (w.epoch, w.last) > (at_epoch, at)]
            window = self._window(epoch, lane, place)
            held.append(window)
        row = window.rows[place - window.first]
        if isinstance(row, UserError):
            raise row
        return epoch, row

    def _window(self, epoch: int, lane: int, place: int) -> "_Window":
        first, last, permutation = self.order.window_of(epoch, lane, place)
        at_epoch, at, reader = self.readers.get(lane, (-1, -1, iter(())))
        if (at_epoch, at) != (epoch, first):
            reader = self._sequence(epoch, self.order.lane_range(lane)[0] + first)
        rows = list(islice(reader, last - first))
        self.readers[lane] = (epoch, last, reader)
        return _Window(epoch, first, last, [rows[row] for row in permutation])

    def _sequence(self, epoch: int, row: int) -> Iterator[Row | UserError]:
        """The epoch's rows from `row` on."""
        while row < self.order.num_rows:
            _, unit, start = self.order.unit_at(epoch, row)
            row += self.order.lengths[unit] - start
            yield from self.units.rows(unit, start)


@dataclass(frozen=True)
class _Window:
    """The rows of places `first` to `last` - 1 of a lane, in the order of the samples."""

    epoch: int
    first: int
    last: int
    rows: list[Row | UserError]
