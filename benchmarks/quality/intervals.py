"""Confidence intervals of 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch

_Z = NormalDist().inv_cdf(0.975)
_RESAMPLES = 10000


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Interval of a share, by Wilson's score (Journal of the American Statistical Association 22, 1927).

    It takes the trials to be independent.

    Raises:
        ValueError: not 0 <= successes <= trials, or no trials.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"successes: expected 0 to {trials} of at least one trial, got {successes}; count both again")
    share, squared = successes / trials, _Z**2 / trials
    centre = share + squared / 2
    half = _Z * math.sqrt((share * (1 - share) + squared / 4) / trials)
    low, high = (centre - half) / (1 + squared), (centre + half) / (1 + squared)
    # Without rounding, no success has the lower end 0, and no failure the upper end 1.
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)


def bootstrap(values: Sequence[float]) -> tuple[float, float] | None:
    """Interval of a mean, by percentiles over resamples of the values with a fixed seed; None of fewer than two."""
    if len(values) < 2:
        return None
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (_RESAMPLES, len(values)), generator=generator)
    ends = data[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(ends[0]), float(ends[1])
