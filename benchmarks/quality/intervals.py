"""Confidence intervals of 95 %."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from scipy import stats


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Interval of a share, by Wilson's score; it takes the trials to be independent."""
    interval = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap(values: Sequence[float]) -> tuple[float, float] | None:
    """Interval of a mean, by percentiles over resamples of the values with a fixed seed; None of fewer than two."""
    if len(values) < 2:
        return None
    interval = stats.bootstrap((values,), numpy.mean, method="percentile", rng=0).confidence_interval
    return float(interval.low), float(interval.high)
