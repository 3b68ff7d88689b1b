"""What a difference between two arms is worth.

The pairs are seeds: for each, an arm's mean over a set's images less the first arm's. Their spread says how much of a
difference another run would give again; images are a second source of chance, which the bootstrap adds.
"""

import math
from dataclasses import dataclass

import numpy as np

from mcir.evaluation.report import CONFIDENCE, difference

POWER = 0.8
NUM_RESAMPLES = 9999


@dataclass(frozen=True)
class Comparison:
    """Of one arm with the first, on one set, in one metric; NaN where there are too few seeds to say."""

    num_seeds: int
    mean: float
    """Of the paired differences."""
    deviation: float
    """Their standard deviation over seeds."""
    low: float
    high: float
    """Ends of Student's interval of the mean, over seeds."""
    p_t: float
    """Of the paired t test, two-sided."""
    p_signs: float
    """Of the sign-flip permutation test, two-sided: no less than 2 / 2^seeds."""
    bootstrap_low: float
    bootstrap_high: float
    """Ends of the percentile interval over resampled seeds and resampled images."""

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves out zero: only then may a difference be called one."""
        return self.low > 0 or self.high < 0


def compare(differences: np.ndarray) -> Comparison:
    """Of paired differences, one row a seed, one column an image: (S, I)."""
    from scipy import stats

    by_seed = differences.mean(axis=1)
    count, mean = len(by_seed), float(by_seed.mean())
    nan = math.nan
    if count < 2 or not np.isfinite(differences).all():
        return Comparison(count, mean, nan, nan, nan, nan, nan, nan, nan)
    deviation = float(by_seed.std(ddof=1))
    interval = difference(by_seed.tolist(), [0.0] * count)
    p_t = float(stats.ttest_1samp(by_seed, 0).pvalue) if np.ptp(by_seed) > 0 else nan
    return Comparison(
        count, mean, deviation, interval.low, interval.high, p_t, sign_flip_p(by_seed), *bootstrap(differences)
    )


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p-value of the mean, if each difference were as likely to have the other sign: over all 2^n patterns
    where these are few, else over random ones."""
    from scipy import stats

    result = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def bootstrap(differences: np.ndarray) -> tuple[float, float]:
    """Percentile interval of the mean of (S, I) over resampled seeds and, independently, resampled images: the same
    images for all seeds, as they were measured."""
    rng = np.random.default_rng(0)
    num_seeds, num_images = differences.shape
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), NUM_RESAMPLES) / num_seeds  # (R, S)
    images = rng.multinomial(num_images, np.full(num_images, 1 / num_images), NUM_RESAMPLES) / num_images  # (R, I)
    means = ((seeds @ differences) * images).sum(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def seeds_needed(deviation: float, effect: float) -> int | None:
    """Seeds with which a paired t test sees a difference of `effect` with probability POWER, if the differences spread
    by `deviation`; None where that is unknown, or beyond a million."""
    from scipy import stats

    if not deviation > 0:
        return 2 if deviation == 0 else None
    ratio = effect / deviation
    normal = ((stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)) / ratio) ** 2
    if not normal < 1e6:
        return None
    count = max(2, int(normal))  # the t test needs a little more
    while True:
        critical, shift = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1), ratio * math.sqrt(count)
        seen = stats.nct.sf(critical, count - 1, shift) + stats.nct.cdf(-critical, count - 1, shift)
        if seen >= POWER:
            return count
        count += 1
