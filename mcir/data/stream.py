"""The samples of a mixture of sources by position: what the n-th one is depends on the seed alone (order.py)."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mcir.data.chain import AnyDegradation
from mcir.data.degrade import Bicubic
from mcir.data.mixup import Mixup
from mcir.data.order import VERSION, Mixture, Order, share
from mcir.data.rows import Row, Units
from mcir.data.sources import AnySource
from mcir.data.transforms import Augment, Kept, Pixels, training_pair
from mcir.errors import UserError
from mcir.section import Section


class TrainSource(Section):
    """One source of the training mixture."""

    source: AnySource
    weight: PositiveFloat = 1.0
    """Share of this source in the mixture, relative to the others."""
    repeat: PositiveInt | None = None
    """Instead of a weight: the source counts by its number of rows times this, as datasets laid end to end do of which
    small ones are repeated (PromptIR: haze 1, rain 120)."""
    degradation: AnyDegradation | None = None
    """Makes `degraded` on the fly where the source holds clean images only."""
    label: str | None = None
    """Its name in curves and tables of several sources; by default its place in the list."""


class DataConfig(Section):
    """Training data."""

    train: tuple[TrainSource, ...] = Field(min_length=1)
    crop_size: PositiveInt
    """Side of the clean crop in pixels; degraded crops are crop_size / scale."""
    augment: Augment = "dihedral"
    """dihedral (8 flips and rotations), hflip, flips (none, none, horizontal, vertical: as IDT), none."""
    edge_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Crops near a border are rare: with a probability of this times crop / image a side's crop is flush with one of
    its ends instead (DehazeFormer, MixDehazeNet)."""
    mixup: Mixup | None = None
    degrade_on_device: bool = False
    """Whether the device makes a whole batch smaller instead of a loader process each image, where all sources have
    `bicubic`: the same bytes."""
    small_images: Literal["fail", "reflect"] = "fail"
    """Of an image smaller than the crop: a mistake, or mirrored at its lower and right border up to the crop's size
    (Restormer, MPRNet)."""
    num_workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = "auto"
    """Decoding processes of each rank; auto: one for each core that is left when every rank of the host has one, from 1
    to 8."""
    shuffle_buffer: PositiveInt = 1024
    """Undecoded rows of a source that all processes together hold for shuffling, beside the row groups that are
    open: two for each sample of a batch at most."""
    keep_mib: NonNegativeInt = 256
    """MiB of decoded images that each loader process may hold, so that small datasets are decoded once and not once an
    epoch. All images have an equal share of it; those of more bytes (and of 16 bits) are decoded each time."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a row that cannot be used does: stop the run, or be left out of its batch, counted and logged: its place
    adds nothing to the gradient. A row group or tar that turns unreadable counts row by row; what cannot be found or
    opened at the start always stops the run."""

    @property
    def labels(self) -> list[str]:
        """Of the sources, each its own."""
        return [str(i) if source.label is None else source.label for i, source in enumerate(self.train)]

    @model_validator(mode="after")
    def _one_way_to_mix(self) -> Self:
        if any(train.repeat for train in self.train):
            for i, train in enumerate(self.train):
                if train.repeat is None:
                    raise ValueError(f"train.{i}: other sources have a repeat; give this one its own (1: as it is)")
                if train.weight != 1:
                    raise ValueError(f"train.{i}: has a weight and a repeat; leave one of them out")
        return self

    @model_validator(mode="after")
    def _device_can(self) -> Self:
        if self.degrade_on_device and not all(isinstance(train.degradation, Bicubic) for train in self.train):
            raise ValueError("degrade_on_device: needs the degradation bicubic of every source")
        return self

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        if repeated := sorted({label for label in self.labels if self.labels.count(label) > 1}):
            raise ValueError(f"train: two sources are labelled {', '.join(repeated)}")
        return self


Label = tuple[str, int]
"""key of a sample, place of its source in `data.train`"""
Sample = tuple[Label, *tuple[Pixels, ...]]
"""label, degraded (3, h, w), clean (3, s * h, s * w), and one of that size for each further column; with
`degrade_on_device` one (3, s * (h + 4), s * (w + 4)) and one (3, 1, 1) in place of the first two"""


@dataclass(frozen=True)
class Reader:
    """Which process reads: worker w of W of rank r of R, or none of them (None), which only knows who does."""

    rank: int = 0
    world_size: int = 1
    worker: int | None = 0
    num_workers: int = 1


@dataclass(frozen=True)
class Failure:
    """Takes the place of a sample that cannot be had."""

    message: str


class SampleStream:
    """The samples of all sources of `data`, which are opened here once, for all workers. `num_lanes`: places of a
    batch, which the ranks share equally; `columns`: further images of the rows."""

    def __init__(self, data: DataConfig, scale: int, seed: int, num_lanes: int, columns: Sequence[str] = ()) -> None:
        """UserError where a source cannot be opened or holds nothing."""
        self.data, self.scale, self.seed, self.num_lanes, self.columns = data, scale, seed, num_lanes, columns
        self.units = [
            train.source.open_at(
                f"data.train.{i}.source",
                dict.fromkeys(train.degradation.columns if train.degradation else (), f"data.train.{i}.degradation")
                | dict.fromkeys(columns, "objective.contrast.columns"),
            )
            for i, train in enumerate(data.train)
        ]
        num_rows = [sum(units.lengths) for units in self.units]
        weights = [t.repeat * rows if t.repeat else t.weight for t, rows in zip(data.train, num_rows, strict=True)]
        try:
            self.mixture = Mixture.of(weights, seed, num_lanes)
        except ValueError as error:
            raise UserError(f"data.train: {error}") from error
        beside_clean = [
            len((*columns, *(t.degradation.columns if t.degradation else ["degraded"]))) for t in data.train
        ]
        num_images = sum(rows * (1 + beside) for rows, beside in zip(num_rows, beside_clean, strict=True))
        self.kept_bytes = data.keep_mib * 2**20 // num_images
        """Of an image that each worker keeps."""
        decides = (VERSION, seed, num_lanes, data.shuffle_buffer, self.mixture.counts, [u.lengths for u in self.units])
        self.order = f"{zlib.crc32(repr(decides).encode()):08x}"
        """Of what decides which sample is the n-th."""

    def samples(self, position: int, reader: Reader, crop_size: int) -> Iterator[Sample | Failure]:
        """Those that `reader` decodes from `position`, where a batch begins, on, for ever."""
        kept = [Kept(self.kept_bytes) for _ in self.units]
        for which, epoch, unit, row in self._dealt(position, reader):
            if unit.worker == reader.worker:
                yield self._sample(which, epoch, unit, row, crop_size, kept[which])

    def sides(self, crop_size: int) -> list[int]:
        """Of a sample's images."""
        pair = [crop_size + 4 * self.scale, 1] if self.data.degrade_on_device else [crop_size // self.scale, crop_size]
        return [*pair, *[crop_size] * len(self.columns)]

    def turns(self, position: int, reader: Reader) -> Iterator[int]:
        """Which worker of the rank decodes each of its samples."""
        return (unit.worker for _, _, unit, _ in self._dealt(position, replace(reader, worker=None)))

    def excess(self, world_size: int) -> list[float]:
        """How many times its own share of the bytes of each source a rank reads: the units where the shares of two
        ranks meet are read by both."""
        return [1 + (world_size - 1) / len(units.lengths) for units in self.units]

    def _dealt(self, position: int, reader: Reader) -> Iterator[tuple[int, int, "_Unit", int]]:
        """(source, epoch, unit, row of the unit) of each sample of the rank."""
        desk = Desk(reader.num_workers)
        streams = [
            SourceStream(
                units,
                Order(units.lengths, self.seed + i, self.data.shuffle_buffer, self.num_lanes),
                desk,
                reader,
                self.mixture.spread(i),
            )
            for i, units in enumerate(self.units)
        ]
        while True:
            for place in share(position, reader.rank, reader.world_size, self.num_lanes):
                which, index = self.mixture.locate(place)
                yield which, *streams[which].find(index)
            position += self.num_lanes

    def _sample(self, which: int, epoch: int, unit: "_Unit", at: int, crop_size: int, kept: Kept) -> Sample | Failure:
        train = self.data.train[which]
        row = unit.rows[at]
        if isinstance(row, UserError):
            return Failure(str(row))
        # not hash(): it differs between processes
        rng = np.random.default_rng([self.seed, epoch, which, zlib.crc32(row.key.encode())])
        try:
            pair = training_pair(
                row,
                crop_size,
                self.scale,
                train.degradation,
                self.data.augment,
                rng,
                self.data.edge_decay,
                self.data.small_images == "reflect",
                self.columns,
                self.data.degrade_on_device,
                kept,
            )
        except UserError as error:
            return Failure(str(error))
        return ((row.key, which), *pair)


class SourceStream:
    """Access to one source by an index that rises, but for `spread`. Of each unit that the rank meets it holds which
    worker of the rank reads it, and of those that `reader` itself reads the rows, until the last of them is used."""

    def __init__(self, units: Units, order: Order, desk: "Desk", reader: Reader, spread: int = 0) -> None:
        self.units, self.order, self.desk, self.reader, self.spread = units, order, desk, reader, spread
        self.open: dict[tuple[int, int], _Unit] = {}  # by epoch and place in its sequence

    def find(self, index: int) -> tuple[int, "_Unit", int]:
        """(epoch, unit, row of the unit) of a sample."""
        epoch, lane, place = self.order.locate(index)
        row = self.order.row_of(epoch, lane, place)
        at, number, first = self.order.unit_at(epoch, row)
        unit = self.open.get((epoch, at))
        if unit is None:
            for key in [key for key, unit in self.open.items() if unit.until <= index - self.spread]:
                self.desk.close(self.open.pop(key))
            unit = self.open[epoch, at] = self._begin(epoch, lane, number, first)
        unit.left -= 1
        if not unit.left:
            self.desk.close(self.open.pop((epoch, at)))
        return epoch, unit, row - first

    def _begin(self, epoch: int, lane: int, number: int, first: int) -> "_Unit":
        order, last = self.order, first + self.order.lengths[number]
        lanes = share(0, self.reader.rank, self.reader.world_size, order.num_lanes)
        start, stop = order.lane_range(epoch, lanes[0])[0], order.lane_range(epoch, lanes[-1])[1]
        until = epoch * order.num_rows + (order.last_place(epoch, lane, first, last) + 2) * order.num_lanes
        worker = self.desk.open()
        rows: list[Row | UserError] = []
        if worker == self.reader.worker:
            read = list(self.units.rows(number, 0))
            rows = [read[row] for row in order.rows_in(epoch, number)]
        return _Unit(worker, min(last, stop) - max(first, start), until, rows)


@dataclass
class _Unit:
    """A unit of which samples are still to come: `left` of this rank, where it has met them all; none after index
    `until`."""

    worker: int
    left: int
    until: int
    rows: list[Row | UserError]


class Desk:
    """Deals units to the workers of a rank, each to the one with the fewest still open, of several to the one that has
    waited longest. Every process of the rank comes to the same result."""

    def __init__(self, num_workers: int) -> None:
        self.num_open, self.dealt, self.count = [0] * num_workers, [0] * num_workers, 0

    def open(self) -> int:
        worker = min(range(len(self.dealt)), key=lambda worker: (self.num_open[worker], self.dealt[worker]))
        self.count += 1
        self.num_open[worker] += 1
        self.dealt[worker] = self.count
        return worker

    def close(self, unit: _Unit) -> None:
        self.num_open[unit.worker] -= 1
