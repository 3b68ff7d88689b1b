"""What is read, counted in whole row groups (they are what is fetched from a disk or the Hub), without decoding."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import islice

import numpy as np
import pytest

from mcir.data.order import Order, share
from mcir.data.rows import Row, Units
from mcir.data.sources import ParquetSource
from mcir.data.stream import DataConfig, Reader, SampleStream


class Counted(SampleStream):
    """Over sources of rows that are only counted: `fetched` per source."""

    fetched: list[int]


def stream_of(*lengths: tuple[int, ...], batch_size: int, buffer: int = 1024) -> Counted:
    """Sources of row groups of these lengths, with keys source-unit-row, in equal shares."""
    fetched = [0] * len(lengths)

    def rows(source: int, unit: int, start: int):
        fetched[source] += lengths[source][unit]
        return (Row(f"{source}-{unit}-{row}", b"", None, "") for row in range(start, lengths[source][unit]))

    def opened(source: ParquetSource, extra: Sequence[str] = ()) -> Units:
        return Units(lengths[int(source.path)], partial(rows, int(source.path)))

    train = [{"source": {"format": "parquet", "path": str(i)}} for i in range(len(lengths))]
    data = DataConfig.model_validate({"train": train, "crop_size": 1, "shuffle_buffer": buffer})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParquetSource, "open", opened)
        stream = Counted(data, 1, 3, batch_size)
    stream.fetched = fetched
    return stream


def read(stream: Counted, reader: Reader, num_batches: int, position: int = 0) -> list[tuple[int, int, str]]:
    """(source, epoch, key) of the samples that the reader decodes in so many batches."""
    size = num_batches * stream.num_lanes // reader.world_size
    dealt = islice(stream._dealt(position, reader), size)
    return [(which, epoch, unit.rows[at].key) for which, epoch, unit, at in dealt if unit.worker == reader.worker]


def lengths_of(num_units: int, mean: int = 16) -> tuple[int, ...]:
    """A row group ends by bytes: they are of unequal length."""
    return tuple(np.random.default_rng(num_units).integers(mean // 2, 2 * mean - mean // 2, num_units).tolist())


SIZES = [  # ranks, workers, row groups, batch
    (1, 0, 5, 16),
    (1, 1, 40, 16),
    (1, 4, 96, 16),
    (2, 3, 24, 4),
    (3, 2, 60, 24),
    (5, 4, 100, 40),
    (7, 3, 140, 56),
    (8, 8, 320, 8),
    (8, 4, 300, 64),
    (12, 5, 300, 48),
    (16, 8, 680, 16),
    (40, 2, 400, 40),
    (64, 8, 3000, 64),
    (512, 0, 2048, 512),
    (512, 8, 20_000, 512),
    (512, 8, 100_000, 2048),
]


@pytest.mark.parametrize(("ranks", "workers", "num_units", "batch_size"), SIZES)
def test_a_reader_fetches_at_most_a_quarter_more_than_its_share(ranks, workers, num_units, batch_size):
    """An epoch of a handful of ranks, the outermost among them; every sample comes to one worker, in turn."""
    stream = stream_of(lengths := lengths_of(num_units, mean=8), batch_size=batch_size)
    num_batches = sum(lengths) // batch_size
    for rank in sorted({0, 1, ranks // 2, ranks - 1} & set(range(ranks)))[: 2 if ranks == 512 else 4]:
        used, shares = 0, []
        stream.fetched[0] = 0
        for worker in range(max(1, workers)):
            samples = read(stream, Reader(rank, ranks, worker, max(1, workers)), num_batches)
            used += len(samples)
            shares.append(len(samples))
        assert used == num_batches * batch_size // ranks
        assert sum(stream.fetched) <= 1.25 * used + 2 * max(lengths)  # where the reading begins and ends
        assert max(shares) <= 1.3 * used / len(shares) + 2 * max(lengths)
    assert sum(stream.fetched) / used <= stream.excess(ranks)[0] * 1.1 + 2 * max(lengths) / used


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 4), (2, 2), (3, 1), (6, 2)])
@pytest.mark.parametrize("batch_size", [6, 24])
def test_all_readers_together_fetch_little_more_than_the_epochs(ranks, workers, batch_size):
    """Two epochs and a bit of a mixture; every row comes once an epoch, and the order is that of one process alone."""
    sources = lengths_of(40), lengths_of(70, mean=9)
    stream = stream_of(*sources, batch_size=batch_size, buffer=64)
    num_batches = 2 * sum(map(sum, sources)) // batch_size
    seen = Counter(
        sample
        for rank in range(ranks)
        for worker in range(workers)
        for sample in read(stream, Reader(rank, ranks, worker, workers), num_batches)
    )
    assert set(seen.values()) == {1}
    alone = stream_of(*sources, batch_size=batch_size, buffer=64)
    assert set(seen) == set(read(alone, Reader(), num_batches))
    bound = max(stream.excess(ranks))
    assert sum(stream.fetched) <= bound * len(seen) + 4 * ranks * 24 + batch_size * 24


def test_the_samples_of_the_workers_are_those_of_the_order():
    lengths = lengths_of(30)
    stream = stream_of(lengths, batch_size=12)
    order = Order(lengths, 3, num_lanes=12)
    for rank in range(2):
        turns = list(islice(stream.turns(24, Reader(rank, 2, num_workers=3)), 60))
        workers = [iter(read(stream, Reader(rank, 2, worker, 3), 10, position=24)) for worker in range(3)]
        places = [place for batch in range(24, 144, 12) for place in share(batch, rank, 2, 12)]
        for worker, place in zip(turns, places, strict=True):
            unit, row = order.row(place)
            assert next(workers[worker])[2] == f"0-{unit}-{row}"


@pytest.mark.parametrize("num_units", [100, 20_000])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_what_one_process_holds_is_bounded_whatever_the_size_of_the_dataset(num_units, batch_size):
    """The rows for shuffling, and two row groups at most for each place of the batch."""
    stream = stream_of(lengths := lengths_of(num_units), batch_size=batch_size, buffer=256)
    held: dict[int, object] = {}
    most = 0
    for _, _, unit, _ in islice(stream._dealt(0, Reader()), min(sum(lengths), 20_000)):
        held[id(unit)] = unit
        held = {key: other for key, other in held.items() if other.left > 0}
        most = max(most, sum(len(other.rows) for other in held.values()))
    assert most <= 256 + 2 * batch_size * max(lengths)


def test_workers_share_a_rank_evenly():
    """Of 64 samples in a row, whatever the workers: none has far more than its part, so none waits for another."""
    for workers, batch_size in ((2, 16), (4, 16), (3, 16), (4, 4)):
        stream = stream_of(lengths_of(400), batch_size=batch_size)
        turns = list(islice(stream.turns(0, Reader(num_workers=workers)), 4096))
        for start in range(0, 4096, 256):
            counts = Counter(turns[start : start + 256])
            assert max(counts.values()) <= 1.6 * 256 / workers
