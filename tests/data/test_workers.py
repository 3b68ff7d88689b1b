import os

import pytest

from mcir.data.workers import workers_of_a_rank


@pytest.mark.parametrize(("cores", "ranks", "expected"), [(1, 1, 1), (2, 1, 1), (16, 1, 8), (16, 4, 3), (8, 8, 1)])
def test_auto_leaves_each_rank_of_the_host_a_core(monkeypatch, cores, ranks, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("mcir.data.workers.Path.read_text", lambda _: "max 100000\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert workers_of_a_rank("auto") == expected
    assert workers_of_a_rank(5) == 5
    monkeypatch.setattr("mcir.data.workers.Path.read_text", lambda _: "150000 100000\n")
    assert workers_of_a_rank("auto") == 1
