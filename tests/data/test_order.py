from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcir.data.order import BLOCK, Mixture, Order, share

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=70).map(tuple)


@settings(deadline=None, max_examples=60)
@given(lengths, st.integers(0, 5), st.integers(1, 300), st.integers(1, 24))
def test_every_row_once_in_each_epoch(lengths, seed, buffer, num_lanes):
    order = Order(lengths, seed, buffer, num_lanes)
    rows = {(unit, row) for unit, length in enumerate(lengths) for row in range(length)}
    for epoch in (0, 1, 3):
        seen = [order.row(epoch * order.num_rows + q) for q in range(order.num_rows)]
        assert len(seen) == len(rows)
        assert set(seen) == rows


def test_epochs_and_seeds_differ_and_nothing_is_in_file_order():
    order = Order((8,) * 60, seed=1)
    first = [order.row(i) for i in range(order.num_rows)]
    assert first != [order.row(order.num_rows + i) for i in range(order.num_rows)]
    assert first != [Order((8,) * 60, seed=2).row(i) for i in range(order.num_rows)]
    assert first != sorted(first)


def test_one_row_group_is_shuffled_anew_in_each_epoch():
    """Fewer row groups than places: which rows meet in a batch must not be the same for ever."""
    order = Order((64,), seed=0, num_lanes=16)
    batches = [frozenset(order.row(16 * batch + place)[1] for place in range(16)) for batch in range(4 * 8)]
    assert len(set(batches)) == len(batches)


@settings(deadline=None, max_examples=60)
@given(lengths, st.integers(1, 24), st.integers(0, 3), st.data())
def test_the_places_of_a_rank_are_a_run_of_the_sequence(lengths, num_lanes, epoch, data):
    """Whatever divides the batch: the rows that a rank meets in an epoch are one piece of its sequence."""
    world_size = data.draw(st.sampled_from([n for n in range(1, num_lanes + 1) if num_lanes % n == 0]))
    order = Order(lengths, seed=1, buffer=32, num_lanes=num_lanes)
    first, end = epoch * order.num_rows, (epoch + 1) * order.num_rows
    seen: list[list[int]] = [[] for _ in range(world_size)]
    for batch in range(first // num_lanes * num_lanes, end, num_lanes):
        for rank in range(world_size):
            for position in share(batch, rank, world_size, num_lanes):
                if first <= position < end:
                    assert order.locate(position)[0] == epoch
                    seen[rank].append(order.row_of(*order.locate(position)))
    assert [row for rows in seen for row in sorted(rows)] == list(range(order.num_rows))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), st.integers(0, 3), st.integers(1, 6))
def test_a_mixture_takes_every_source_in_its_share_and_skips_nothing(weights, seed, num_lanes):
    mixture = Mixture.of(weights, seed, num_lanes)
    located = [mixture.locate(position) for position in range(2 * BLOCK * num_lanes)]
    counts = Counter(source for source, _ in located)
    for source, weight in enumerate(weights):
        assert abs(counts[source] / len(located) - weight / sum(weights)) <= 1 / BLOCK
        indices = [index for which, index in located if which == source]
        assert sorted(indices) == list(range(len(indices)))
    highest = [0] * len(weights)
    for position, (source, index) in enumerate(located):
        assert index % num_lanes == position % num_lanes  # what keeps a rank in its own lanes
        highest[source] = max(highest[source], index)
        assert highest[source] - index <= mixture.spread(source)


def test_a_weight_too_small_to_keep_is_an_error():
    with pytest.raises(ValueError, match="smallest weight"):
        Mixture.of([1, 2000], seed=0)
