"""Which row is the n-th sample: a pure function of (seed, position), whatever the number of processes and workers.

A source is a list of units (Parquet row groups, runs of files) of known length, N rows in all. In each epoch the units
and the rows inside each are permuted and laid end to end; that sequence is cut into as many lanes as a batch has
places, and place j of each batch takes the next row of lane j, after a permutation inside windows of that lane. Ranks
share a batch by runs of places, so each rank has a run of lanes, that is of the sequence, to itself: R ranks, for any R
that divides the batch, all read their own share of the units and no more, apart from the one that is cut in two where
one rank's run ends and the next begins. Together they read less than 1 + R / N units' worth for each of an epoch's,
and nothing in the order depends on R. Odd lanes run backwards: where two lanes of one rank meet inside a unit, both
meet it at the same time, and it is read once.

What is traded for it: the order depends on the number of samples in a batch, and whoever reads the whole of it alone
holds, beside the rows for shuffling, a unit or two for each place of the batch (a batch of 16: 16 row groups of 16 MiB
and the rows; of 512, on a laptop, 8 GiB). MosaicML Streaming's canonical nodes, where the idea of lanes comes from, fix
a number of lanes instead, which must divide the nodes or be divided by them, and keep what is open on a disk.

Several sources are mixed in blocks: each place of the batch holds every source its exact number of times in a block, in
a seeded order, so that source i's own positions keep their place in the batch and the above holds for each. That order
is even (any stretch of a place holds each source in its share, give or take a few), so that of no source one place runs
far ahead of another: a reader that remembers `Mixture.spread` indices reads no unit twice.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import numpy as np

VERSION = 2
"""Of this definition: a position means nothing under another one."""
BLOCK = 1000
"""Times a batch in a block of a mixture: weights are kept to 1/BLOCK."""


@dataclass(frozen=True, eq=False)
class Order:
    """The order of one source. `lengths`: rows of each unit; `buffer`: rows that all lanes together may hold for
    shuffling; `num_lanes`: places of a batch."""

    lengths: tuple[int, ...]
    seed: int
    buffer: int = 1024
    num_lanes: int = 16
    num_rows: int = field(init=False)
    window: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_rows", sum(self.lengths))
        object.__setattr__(self, "window", max(1, self.buffer // self.num_lanes))

    def locate(self, index: int) -> tuple[int, int, int]:
        """Sample `index` (counted over all epochs) -> (epoch, lane, place in the lane's shuffled order). Epochs begin
        and end anywhere in a batch."""
        epoch = index // self.num_rows
        lane = index % self.num_lanes
        return epoch, lane, index // self.num_lanes - self._before(epoch * self.num_rows, lane)

    def lane_range(self, epoch: int, lane: int) -> tuple[int, int]:
        """First and last-but-one row of a lane in the epoch's sequence of permuted units."""
        first, end = epoch * self.num_rows, (epoch + 1) * self.num_rows
        start, stop = (self._below(end, bound) - self._below(first, bound) for bound in (lane, lane + 1))
        return start, stop

    def row_of(self, epoch: int, lane: int, place: int) -> int:
        """The row of the epoch's sequence at `place` of the lane's shuffled order. The lanes' windows end one after the
        other: a process that holds several fills them in turn, not all at one time."""
        start, stop = self.lane_range(epoch, lane)
        ahead = lane * self.window // self.num_lanes
        begin = place - (place + ahead) % self.window
        first, last = max(0, begin), min(begin + self.window, stop - start)
        if last - first > 1:
            place = first + int(_permutation(self.seed, 1, epoch, lane, first, size=last - first)[place - first])
        return stop - 1 - place if lane % 2 else start + place

    def unit_at(self, epoch: int, row: int) -> tuple[int, int, int]:
        """Row of the epoch's sequence -> (place of its unit in that sequence, the unit, the unit's first row there)."""
        units, ends = _permuted(self, epoch)
        place = bisect_right(ends, row)
        return place, int(units[place]), ends[place - 1] if place else 0

    def rows_in(self, epoch: int, unit: int) -> np.ndarray:
        """The rows of a unit as they follow one another in the epoch's sequence."""
        return _permutation(self.seed, 3, epoch, unit, size=self.lengths[unit])

    def last_place(self, epoch: int, lane: int, first: int, last: int) -> int:
        """The last place of any lane from whose window a row from `first` to `last` - 1 of the sequence may be drawn;
        `lane` is one of those that hold them."""
        low = high = lane
        while self.lane_range(epoch, low)[0] > first:
            low -= 1
        while self.lane_range(epoch, high)[1] < last:
            high += 1
        places = []
        for held in range(low, high + 1):
            start, stop = self.lane_range(epoch, held)
            places.append(stop - 1 - max(first, start) if held % 2 else min(last, stop) - 1 - start)
        return max(places) + self.window

    def row(self, index: int) -> tuple[int, int]:
        """Sample `index` -> (unit, row): the definition; readers stream the same order without asking row by row."""
        epoch, lane, place = self.locate(index)
        row = self.row_of(epoch, lane, place)
        _, unit, first = self.unit_at(epoch, row)
        return unit, int(self.rows_in(epoch, unit)[row - first])

    def _before(self, index: int, lane: int) -> int:
        """How many indices below `index` are in `lane`."""
        return index // self.num_lanes + (index % self.num_lanes > lane)

    def _below(self, index: int, lane: int) -> int:
        """How many indices below `index` are in lanes below `lane`."""
        return index // self.num_lanes * lane + min(index % self.num_lanes, lane)


@dataclass(frozen=True)
class Mixture:
    """Position of the run -> (source, index in that source). Weights are shares, kept to 1/BLOCK, each at least that.
    `num_lanes`: places of a batch."""

    counts: tuple[int, ...]
    seed: int
    num_lanes: int = 16

    @classmethod
    def of(cls, weights: Sequence[float], seed: int, num_lanes: int = 16) -> "Mixture":
        if len(weights) == 1:
            return cls((1,), seed, num_lanes)
        shares = np.asarray(weights, float) / np.sum(weights) * BLOCK
        counts = np.floor(shares).astype(int)
        remainder = np.argsort(counts - shares, kind="stable")[: BLOCK - counts.sum()]
        counts[remainder] += 1
        if counts.min() < 1:
            raise ValueError(f"the smallest weight is under 1/{BLOCK} of their sum")
        return cls(tuple(int(c) for c in counts), seed, num_lanes)

    def spread(self, source: int) -> int:
        """How far an index of `source` may lie below one that came earlier."""
        if len(self.counts) == 1:
            return 0
        # When s batches of a place are dealt, its time (see `_column`) is within S / BLOCK of s / BLOCK, S being the
        # number of sources, and each source has had its share of that time to less than one.
        apart = 2 * (1 + len(self.counts) * self.counts[source] / BLOCK)
        return math.ceil(apart + 1) * self.num_lanes

    def locate(self, position: int) -> tuple[int, int]:
        if len(self.counts) == 1:
            return 0, position
        batch, lane = divmod(position, self.num_lanes)
        block, place = divmod(batch, sum(self.counts))
        sources, ranks = _column(self.counts, self.seed, block, lane)
        source = sources[place]
        return source, (block * self.counts[source] + ranks[place]) * self.num_lanes + lane


def share(position: int, rank: int, world_size: int, num_lanes: int) -> range:
    """The positions that `rank` takes of the batch that begins at `position`: a run of places."""
    size = num_lanes // world_size
    return range(position + rank * size, position + (rank + 1) * size)


@lru_cache(maxsize=8192)
def _permutation(*key: int, size: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(size)


@lru_cache(maxsize=8)
def _permuted(order: Order, epoch: int) -> tuple[np.ndarray, list[int]]:
    units = _permutation(order.seed, 0, epoch, size=len(order.lengths))
    return units, list(accumulate(order.lengths[u] for u in units))


@lru_cache(maxsize=4096)
def _column(counts: tuple[int, ...], seed: int, block: int, column: int) -> tuple[list[int], list[int]]:
    """For each batch of the block what this place of it holds: the source, and how many of that source came before."""
    # The r-th of a source's c falls somewhere into the r-th c-th of the block.
    sources, ranks = np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(count) for count in counts])
    times = (ranks + np.random.default_rng((seed, 2, block, column)).random(len(ranks))) / np.take(counts, sources)
    batches = np.argsort(times, kind="stable")
    return sources[batches].tolist(), ranks[batches].tolist()
