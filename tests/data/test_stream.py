from collections import Counter

import pytest

from mcir.data.order import COLUMNS, Mixture
from mcir.data.rows import Row, Units
from mcir.data.stream import SourceStream


def counted(lengths: tuple[int, ...], fetched: list[int]) -> Units:
    """Rows `unit-row`; what is read of them is counted in whole units in `fetched`."""

    def rows(unit: int, start: int):
        fetched[0] += lengths[unit]
        for row in range(start, lengths[unit]):
            yield Row(f"{unit}-{row}", b"", None, "")

    return Units(lengths, rows)


@pytest.mark.parametrize("buffer", [256, 1024])
@pytest.mark.parametrize(("num_units", "world_size"), [(8, 1), (40, 1), (40, 2), (100, 1), (100, 3), (192, 4)])
def test_a_mixture_reads_little_more_than_its_sources(num_units, world_size, buffer):
    """Four epochs of two sources; bounds of lanes and epochs, and windows begun at the end, cost the rest."""
    lengths = (61,) * (num_units - 1) + (55,)
    mixture = Mixture.of([1, 1], seed=3)
    num_samples, total = 4 * 2 * sum(lengths), 0
    seen: Counter[tuple[int, int, str]] = Counter()
    for rank in range(world_size):
        fetched = [0]
        streams = [SourceStream(counted(lengths, fetched), 3 + i, buffer, mixture.spread(i)) for i in range(2)]
        for position in range(rank, num_samples, world_size):
            source, index = mixture.locate(position)
            epoch, row = streams[source].read(index)
            seen[source, epoch, row.key] += 1
        total += fetched[0]
    assert set(seen.values()) == {1}
    assert total / num_samples < 1.5


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 16])
def test_a_rank_reads_little_more_than_its_share(world_size):
    """96 row groups of unequal length: what all ranks together read in an epoch, counted in whole row groups (they are
    what is fetched from a disk or the Hub), is less than 1.3 times the data; and no rank reads much more than another.
    Nothing of the order changes meanwhile: the rows of all ranks are the epoch."""
    lengths = tuple(10 + (7 * unit) % 13 for unit in range(96))
    num_rows = sum(lengths)
    fetched = []
    seen: Counter[str] = Counter()
    for rank in range(world_size):
        count = [0]
        stream = SourceStream(counted(lengths, count), seed=5, buffer=256)
        for index in range(rank, num_rows, world_size):
            seen[stream.read(index)[1].key] += 1
        fetched += count
    assert len(seen) == num_rows
    assert set(seen.values()) == {1}
    # 24 lanes: 16 ranks meet 3 of them each and share them two by two
    factor = 2 if COLUMNS // 2 % world_size else 1
    assert sum(fetched) / num_rows < 1.3 * factor
    assert max(fetched) < 1.5 * factor * num_rows / world_size
