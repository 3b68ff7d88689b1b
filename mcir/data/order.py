"""Which row is the n-th sample: a pure function of (seed, position), whatever the number of processes and workers.

A source is a list of units (Parquet row groups, tar shards, runs of files) of known length, N rows in all. In each
epoch the units are permuted and laid end to end; that sequence is cut into L lanes of equal length (to one row), and
sample q of the epoch is the (q // L)-th row of lane q % L, after a permutation inside windows of that lane. A process
that takes every M-th position therefore meets only L / gcd(L, M) lanes: with M dividing L it reads its own share of
the bytes and little more, and still nothing in the order depends on M. (The idea of canonical lanes is MosaicML
Streaming's.)

What "little more" is: a lane begins and ends inside a unit, which the neighbouring lane reads too. A lane holds
UNITS_IN_A_LANE units at least, so all processes together read less than 1 + 1 / UNITS_IN_A_LANE = 1.25 times the
bytes of an epoch (1.13 at 384 units), for any number of processes that divides L.

Several sources are mixed in blocks: each of COLUMNS columns of a block holds every source its exact number of times, in
a seeded order, so that source i's own positions keep their residue modulo COLUMNS and the above holds for each. That
order is even (any stretch of a column holds each source in its share, give or take a few), so that of no source one
column runs far ahead of another: a reader that keeps `Mixture.spread` more rows reads no window twice.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import numpy as np

COLUMNS = 48
LANES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
"""Divisors of COLUMNS: how many lanes a source may have."""
UNITS_IN_A_LANE = 4
"""At least, where there is more than one lane."""
BLOCK = 100
"""Stripes of COLUMNS positions in a block of a mixture: weights are kept to 1/BLOCK."""


@dataclass(frozen=True)
class Order:
    """The order of one source. `lengths`: rows of each unit; `buffer`: rows that all lanes together may hold for
    shuffling."""

    lengths: tuple[int, ...]
    seed: int
    buffer: int = 1024
    num_rows: int = field(init=False)
    num_lanes: int = field(init=False)
    window: int = field(init=False)

    def __post_init__(self) -> None:
        num_lanes = max(lanes for lanes in LANES if lanes <= max(1, len(self.lengths) // UNITS_IN_A_LANE))
        object.__setattr__(self, "num_rows", sum(self.lengths))
        object.__setattr__(self, "num_lanes", num_lanes)
        object.__setattr__(self, "window", max(1, self.buffer // num_lanes))

    def locate(self, index: int) -> tuple[int, int, int]:
        """Sample `index` (counted over all epochs) -> (epoch, lane, place in the lane's shuffled order)."""
        epoch, q = divmod(index, self.num_rows)
        return epoch, q % self.num_lanes, q // self.num_lanes

    def lane_range(self, lane: int) -> tuple[int, int]:
        """First and last-but-one row of a lane in the epoch's sequence of permuted units."""
        size, longer = divmod(self.num_rows, self.num_lanes)
        start = lane * size + min(lane, longer)
        return start, start + size + (lane < longer)

    def window_of(self, epoch: int, lane: int, place: int) -> tuple[int, int, np.ndarray]:
        """The window that holds `place`: (first row, one past the last row, permutation from place - first to row -
        first), all counted within the lane. The lanes' windows end one after the other: a process that holds several
        fills them in turn, not all at one time."""
        start, stop = self.lane_range(lane)
        ahead = lane * self.window // self.num_lanes
        first = place - (place + ahead) % self.window
        first, last = max(0, first), min(first + self.window, stop - start)
        return first, last, _permutation(self.seed, 1, epoch, lane, first, size=last - first)

    def unit_at(self, epoch: int, row: int) -> tuple[int, int, int]:
        """Row of the epoch's sequence -> (place of its unit in that sequence, the unit, the row inside the unit)."""
        units, ends = _permuted(self, epoch)
        place = bisect_right(ends, row)
        return place, int(units[place]), row - (ends[place - 1] if place else 0)

    def row(self, index: int) -> tuple[int, int]:
        """Sample `index` -> (unit, row): the definition; readers stream the same order without asking row by row."""
        epoch, lane, place = self.locate(index)
        first, _, permutation = self.window_of(epoch, lane, place)
        _, unit, row = self.unit_at(epoch, self.lane_range(lane)[0] + first + int(permutation[place - first]))
        return unit, row


@dataclass(frozen=True)
class Mixture:
    """Position of the run -> (source, index in that source). Weights are shares, kept to 1/BLOCK, each at least
    that."""

    counts: tuple[int, ...]
    seed: int

    @classmethod
    def of(cls, weights: Sequence[float], seed: int) -> "Mixture":
        if len(weights) == 1:
            return cls((1,), seed)
        shares = np.asarray(weights, float) / np.sum(weights) * BLOCK
        counts = np.floor(shares).astype(int)
        remainder = np.argsort(counts - shares, kind="stable")[: BLOCK - counts.sum()]
        counts[remainder] += 1
        if counts.min() < 1:
            raise ValueError(f"the smallest weight is under 1/{BLOCK} of their sum")
        return cls(tuple(int(c) for c in counts), seed)

    def spread(self, source: int) -> int:
        """How far an index of `source` may lie below one that came earlier."""
        if len(self.counts) == 1:
            return 0
        # When s stripes of a column are dealt, its time (see `_column`) is within S / BLOCK of s / BLOCK, S being the
        # number of sources, and each source has had its share of that time to less than one.
        apart = 2 * (1 + len(self.counts) * self.counts[source] / BLOCK)
        return math.ceil(apart + 1) * COLUMNS

    def locate(self, position: int) -> tuple[int, int]:
        stripe, column = divmod(position, COLUMNS)
        block, place = divmod(stripe, sum(self.counts))
        source, rank = _column(self.counts, self.seed, block, column)[place]
        return source, (block * self.counts[source] + rank) * COLUMNS + column


def _permutation(*key: int, size: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(size)


@lru_cache(maxsize=8)
def _permuted(order: Order, epoch: int) -> tuple[np.ndarray, list[int]]:
    units = _permutation(order.seed, 0, epoch, size=len(order.lengths))
    return units, list(accumulate(order.lengths[u] for u in units))


@lru_cache(maxsize=4 * COLUMNS)
def _column(counts: tuple[int, ...], seed: int, block: int, column: int) -> list[tuple[int, int]]:
    """(source, how many of that source came before in this column of this block) for each stripe of the block."""
    if len(counts) == 1:
        return [(0, 0)]
    # The r-th of a source's c falls somewhere into the r-th c-th of the block.
    sources, ranks = np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(count) for count in counts])
    times = (ranks + np.random.default_rng((seed, 2, block, column)).random(len(ranks))) / np.take(counts, sources)
    stripes = np.argsort(times, kind="stable")
    return list(zip(sources[stripes].tolist(), ranks[stripes].tolist(), strict=True))
