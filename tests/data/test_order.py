from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcir.data.order import BLOCK, COLUMNS, Mixture, Order

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=70).map(tuple)


@settings(deadline=None, max_examples=60)
@given(lengths, st.integers(0, 5), st.integers(1, 300))
def test_every_row_once_in_each_epoch(lengths, seed, buffer):
    order = Order(lengths, seed, buffer)
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


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6, 8, 16])
def test_a_process_meets_only_its_own_lanes(stride):
    """With a stride that divides the number of lanes, the positions of a process fall into num_lanes / stride lanes."""
    order = Order((5,) * 200, seed=0)
    assert order.num_lanes == COLUMNS
    lanes = {order.locate(position)[1] for position in range(1, order.num_rows, stride)}
    assert len(lanes) == COLUMNS // stride


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), st.integers(0, 3))
def test_a_mixture_takes_every_source_in_its_share_and_skips_nothing(weights, seed):
    mixture = Mixture.of(weights, seed)
    located = [mixture.locate(position) for position in range(2 * BLOCK * COLUMNS)]
    counts = Counter(source for source, _ in located)
    for source, weight in enumerate(weights):
        assert abs(counts[source] / len(located) - weight / sum(weights)) <= 1 / BLOCK
        indices = [index for which, index in located if which == source]
        assert sorted(indices) == list(range(len(indices)))
    highest = [0] * len(weights)
    for position, (source, index) in enumerate(located):
        assert index % COLUMNS == position % COLUMNS  # what keeps a process in its own lanes
        highest[source] = max(highest[source], index)
        assert highest[source] - index <= mixture.spread(source)


def test_a_weight_too_small_to_keep_is_an_error():
    with pytest.raises(ValueError, match="smallest weight"):
        Mixture.of([1, 1000], seed=0)
