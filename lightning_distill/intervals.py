"""95 % intervals of means: over episodes by the bootstrap, over seeds by Student's t."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom; more take the last, which is wider.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def resampled_means(
    values: np.ndarray, kinds: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Draw episodes anew, identical ones together, and return the mean of each draw, (10 000,).

    A greedy policy in a deterministic game repeats itself: identical episodes carry no further
    information.

    Args:
        values: Returns, or differences of returns (E,).
        kinds: Equal for identical episodes (E,).
        generator: Of the draws.
    """
    _, first, copies = np.unique(kinds, return_index=True, return_counts=True)
    drawn = generator.choice(len(first), (RESAMPLES, len(first)))
    means = (values[first] * copies)[drawn].sum(axis=1) / copies[drawn].sum(axis=1)
    return np.asarray(means)


def bootstrap_interval(returns: np.ndarray, kinds: np.ndarray) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of the mean return.

    Args:
        returns: (E,).
        kinds: Equal for identical episodes (E,).
    """
    return middle(resampled_means(returns, kinds, np.random.default_rng(0)))


def middle(means: np.ndarray) -> tuple[float, float]:
    """Return what leaves 2.5 % of the draws on each side."""
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of the mean of two or more values by Student's t."""
    mean, degrees = statistics.fmean(values), len(values) - 1
    quantile = T_QUANTILES[min(degrees, len(T_QUANTILES)) - 1]
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half
