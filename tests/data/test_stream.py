from collections import Counter

import pytest

from mcir.data.order import COLUMNS
from mcir.data.sources import Row, Units
from mcir.data.stream import SourceStream


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 16])
def test_a_rank_reads_little_more_than_its_share(world_size):
    """96 row groups of unequal length: what all ranks together read in an epoch, counted in whole row groups (they are
    what is fetched from a disk or the Hub), is less than 1.3 times the data; and no rank reads much more than another.
    Nothing of the order changes meanwhile: the rows of all ranks are the epoch."""
    lengths = tuple(10 + (7 * unit) % 13 for unit in range(96))
    num_rows = sum(lengths)
    fetched = [0] * world_size
    seen: Counter[str] = Counter()
    for rank in range(world_size):

        def rows(unit: int, start: int, rank: int = rank):
            fetched[rank] += lengths[unit]
            for row in range(start, lengths[unit]):
                yield Row(f"{unit}-{row}", b"", None, "")

        stream = SourceStream(Units(lengths, rows), seed=5, buffer=256)
        for index in range(rank, num_rows, world_size):
            seen[stream.read(index)[1].key] += 1
    assert len(seen) == num_rows
    assert set(seen.values()) == {1}
    # 24 lanes: 16 ranks meet 3 of them each and share them two by two
    factor = 2 if COLUMNS // 2 % world_size else 1
    assert sum(fetched) / num_rows < 1.3 * factor
    assert max(fetched) < 1.5 * factor * num_rows / world_size
