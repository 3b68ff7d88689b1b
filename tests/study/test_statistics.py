"""Intervals and p-values against published examples, hand counts, and data whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from mcir.evaluation.report import difference
from mcir.study.statistics import bootstrap, compare, seeds_needed, sign_flip_p


def test_student_on_students_own_data():
    """The sleep data of Student (Biometrika 1908), paired: t = 4.0621, p = 0.002833, [0.70, 2.46] (R's t.test)."""
    first = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    second = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    found = compare((second - first)[:, None])
    assert (found.num_seeds, found.mean) == (10, pytest.approx(1.58))
    assert (found.low, found.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert found.p_t == pytest.approx(0.002833, abs=1e-6)
    assert found.is_shown


def test_sign_flips_are_counted():
    # 1, 2, 3 and -4: of 16 sign patterns those with |sum| >= 2 are all but sum = 0 (2 of them: 1+4-2-3 and its mirror)
    assert sign_flip_p(np.array([1.0, 2.0, 3.0, -4.0])) == pytest.approx(14 / 16)
    # All of one sign: only the two extreme patterns of 2^5 reach it. No five seeds can give less.
    assert sign_flip_p(np.array([0.01, 0.02, 0.03, 0.01, 0.05])) == pytest.approx(2 / 32)


def test_darwins_plants_by_sign_flips():
    """Fisher's randomisation test (The Design of Experiments, 1935, section 21): of the 32768 patterns of Darwin's 15
    differences 1726 are as extreme, 5.267 %. Beyond 2^13 patterns ours draws them at random."""
    eighths = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48])
    assert sign_flip_p(eighths.astype(float)) == pytest.approx(0.05267, abs=0.006)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    found = [difference(0.02 + 0.05 * rng.standard_normal(5), np.zeros(5)) for _ in range(1500)]
    assert np.mean([f.low <= 0.02 <= f.high for f in found]) == pytest.approx(0.95, abs=0.017)  # three deviations


def test_the_bootstrap_knows_both_sources_of_chance():
    """Seed effects of deviation 0.05 and image effects of 0.1: the mean's variance is 0.05² / S + 0.1² / I."""
    rng = np.random.default_rng(2)
    lengths, held = [], 0
    for _ in range(50):
        data = 0.3 + 0.05 * rng.standard_normal((20, 1)) + 0.1 * rng.standard_normal((1, 30))
        low, high = bootstrap(data)
        lengths.append(high - low)
        held += low <= 0.3 <= high
    deviation = math.sqrt(0.05**2 / 20 + 0.1**2 / 30)
    assert np.mean(lengths) == pytest.approx(2 * 1.96 * deviation, rel=0.08)
    assert held / 50 >= 0.84


def test_what_cannot_be_said_is_not():
    one = compare(np.array([[0.5, 0.7]]))
    assert one.mean == pytest.approx(0.6)
    assert math.isnan(one.low)
    assert math.isnan(one.p_t)
    assert not one.is_shown
    assert not compare(np.array([[0.1], [-0.1], [0.05]])).is_shown
    assert not compare(np.zeros((5, 3))).is_shown  # twice the same run
    assert not compare(np.array([[math.inf, 1.0], [1.0, 1.0]])).is_shown


def test_seeds_needed_have_the_power():
    """R: power.t.test(delta = 1, sd = 2, power = .8, type = "paired") gives n = 33.37; delta = sd: n = 9.94."""
    assert seeds_needed(2.0, 1.0) == 34
    assert seeds_needed(1.0, 1.0) == 10
    rng = np.random.default_rng(3)
    trials = 0.02 + 0.03 * rng.standard_normal((4000, seeds_needed(0.03, 0.02)))
    assert np.mean(stats.ttest_1samp(trials, 0, axis=1).pvalue < 0.05) == pytest.approx(0.81, abs=0.03)
    assert seeds_needed(math.nan, 0.02) is None
    assert seeds_needed(0.0, 0.02) == 2
    assert seeds_needed(1e9, 0.02) is None
