"""From what layers lose when they are sparse to the density of each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class CalibrationError(ValueError):
    """These settings cannot be had from these texts; the message is one line that says why, and what would help."""


class Point(NamedTuple):
    """What a layer keeps, and what is lost by it."""

    density: float
    lost: float


def share_density(curves: Sequence[Sequence[Point]], density: float) -> list[float]:
    """Densities of the layers whose mean is ``density``, and which together lose least.

    A bit of density goes where it saves most: the layers go down the convex hulls of their curves, steepest part first,
    until the mean is reached.

    Args:
        curves: of every layer, points from sparse to dense.

    Raises:
        ValueError: the layers keep more than that at their sparsest.
    """
    shares = [curve[0].density for curve in curves]
    left = density * len(curves) - sum(shares)
    if left < -1e-9 * len(curves):
        raise CalibrationError(
            f"density: expected at least {sum(shares) / len(shares):.4f}, which min_budget and the forced blocks keep "
            f"at this length, got {density}; lower min_budget, or use longer texts"
        )
    parts = [
        (_slope(a, b), layer, b.density - a.density)
        for layer, curve in enumerate(curves)
        for a, b in itertools.pairwise(_lower_hull(curve))
    ]
    for _, layer, width in sorted(parts):
        step = min(width, max(left, 0.0))
        shares[layer] += step
        left -= step
    return [round(min(share, 1.0), 4) for share in shares]


def _lower_hull(curve: Sequence[Point]) -> list[Point]:
    hull: list[Point] = []
    for point in curve:
        if hull and point.density <= hull[-1].density:
            continue  # what min_budget has made the same
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Point, b: Point) -> float:
    return (b.lost - a.lost) / (b.density - a.density)
