"""Ratios of two ways to do the same work, measured side by side in pairs."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Work = Callable[[], object]
Pair = tuple[float, float]


@dataclass(frozen=True)
class Ratio:
    """Geometric mean of paired ratios with its 95 % interval.

    Args:
        value: Seconds of the reference by our seconds: how many times as fast we are.
        low: Lower end of the interval.
        high: Upper end.
        pairs: Number of pairs.
        seconds: Median time of ours and of the reference.
        width: Bound of the interval's width that was asked for.
    """

    value: float
    low: float
    high: float
    pairs: int
    seconds: Pair
    width: float

    @property
    def narrow(self) -> bool:
        """Whether the interval is as narrow as asked for; else the time ran out before."""
        return self.high - self.low <= self.width


class Enough:
    """Says whether the interval is narrow enough, or the time for it used up.

    Args:
        width: Of the 95 % interval, at most.
        least: Pairs at least.
        budget: Seconds after which the interval is taken as it is.
    """

    def __init__(self, width: float = 0.05, least: int = 8, budget: float = 120) -> None:
        self.width, self._least = width, least
        self._end = time.perf_counter() + budget

    def __call__(self, pairs: Sequence[Pair]) -> bool:
        """Judge the pairs so far."""
        if len(pairs) < self._least:
            return False
        return self.ratio(pairs).narrow or time.perf_counter() > self._end

    def ratio(self, pairs: Sequence[Pair]) -> Ratio:
        """Return the geometric mean of reference / ours with Student's interval of its logarithm.

        Args:
            pairs: Seconds of ours and of the reference, at least two pairs.
        """
        ours, reference = np.array(pairs).T
        logs = np.log(reference / ours)
        half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
        mean = float(logs.mean())
        return Ratio(
            math.exp(mean),
            math.exp(mean - half),
            math.exp(mean + half),
            len(logs),
            (float(np.median(ours)), float(np.median(reference))),
            self.width,
        )


def timed(work: Work) -> float:
    """Return the seconds that a piece of work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(ours: Work, reference: Work, enough: Enough) -> Ratio:
    """Time both in random order, after one unmeasured round, until there are enough pairs."""
    return alternate(lambda: timed(ours), lambda: timed(reference), enough)


def alternate(ours: Callable[[], float], reference: Callable[[], float], enough: Enough) -> Ratio:
    """Likewise for two functions that return their own seconds."""
    ours(), reference()
    order, pairs = random.Random(0), list[Pair]()
    while not enough(pairs):
        if order.random() < 0.5:
            first = ours()
            pairs.append((first, reference()))
        else:
            first = reference()
            pairs.append((ours(), first))
    return enough.ratio(pairs)
