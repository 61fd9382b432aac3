"""From measurements to settings: targets, the density of each layer, and the number of proxies."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

NUM_LEVELS = 32


class CalibrationError(ValueError):
    """These settings cannot be had from these texts; the message is one line that says why, and what would help."""


class Point(NamedTuple):
    """What a layer keeps at one level, and the mass that this recovers."""

    density: float
    recovered: float


class Target(NamedTuple):
    """The target of a calibration: one of the two.

    A layer is measured at levels, from sparse to dense: values of ``density``, or of ``gamma`` for a quality.
    """

    density: float | None
    quality: float | None

    @classmethod
    def of(cls, density: Any, quality: Any) -> Target:
        """Raises ValueError unless one of them is given, and is in (0, 1]."""
        if (density is None) == (quality is None):
            raise CalibrationError(
                f"density, quality: expected one of the two, got density={density}, quality={quality}; use for example "
                "density=0.2, or quality=0.98"
            )
        name, value = ("density", density) if quality is None else ("quality", quality)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
            raise CalibrationError(
                f"{name}: expected a number in (0, 1], got {value!r}; use for example 0.2 for a density"
            )
        return cls(density, quality)

    def levels(self) -> list[float]:
        if self.density is not None:
            lowest = max(0.01, self.density / 16)
            steps = [round(lowest ** (1 - step / (NUM_LEVELS - 1)), 4) for step in range(NUM_LEVELS)]
            return sorted({*steps, self.density})
        lost = [0.5 * 0.002 ** (step / (NUM_LEVELS - 2)) for step in range(NUM_LEVELS - 1)]
        return [*(round(1 - share, 4) for share in lost), 1.0]

    def settings(self) -> list[dict[str, Any]]:
        """Fields of ProxyConfig at every level."""
        return [self.setting(level) for level in self.levels()]

    def setting(self, level: float) -> dict[str, Any]:
        """Fields of ProxyConfig at one level."""
        return {"density": None, "gamma": level} if self.density is None else {"density": level}

    def reference(self) -> int:
        """Index of the level that is nearest to the target."""
        wanted = self.density if self.quality is None else self.quality
        distance = [abs(level - (wanted or 0.0)) for level in self.levels()]
        return distance.index(min(distance))


def best_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The most that any of a layer's curves recovers at each level."""
    return [max(points, key=lambda point: point.recovered) for points in zip(*curves, strict=True)]


def fewest(kept: Sequence[Sequence[float]], tolerance: float) -> int:
    """Index of the first grouping with which every head comes within a tolerance of what it keeps with any.

    If there is none that is so good for all heads, the one whose worst head loses least.

    Args:
        kept: share of its peaks, by grouping and head.
    """
    best = [max(by_head) for by_head in zip(*kept, strict=True)]
    lost = [max(most - own for most, own in zip(best, heads, strict=True)) for heads in kept]
    return next((index for index, loss in enumerate(lost) if loss <= tolerance), lost.index(min(lost)))


def share_density(curves: Sequence[Sequence[Point]], density: float) -> list[float]:
    """Densities of the layers whose mean is ``density``, and which recover the most mass.

    A bit of density goes where it recovers most: the layers climb the concave hulls of their curves, steepest part
    first, until the mean is reached.

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
    hulls = [_upper_hull(curve) for curve in curves]
    parts = [
        (_slope(a, b), layer, b.density - a.density) for layer, hull in enumerate(hulls) for a, b in _neighbours(hull)
    ]
    for _, layer, width in sorted(parts, key=lambda part: -part[0]):
        step = min(width, max(left, 0.0))
        shares[layer] += step
        left -= step
    return [round(min(share, 1.0), 4) for share in shares]


def levels_for(curves: Sequence[Sequence[Point]], target: Target) -> list[float]:
    """The level of each layer with which the target is reached."""
    if target.density is not None:
        return share_density(curves, target.density)
    levels = target.levels()
    return [levels[index] for index in nearest_levels(curves, target)]


def nearest_levels(curves: Sequence[Sequence[Point]], target: Target) -> list[int]:
    """Index of the level of each layer that is nearest to what the target asks of it; not below a quality."""
    if target.density is not None:
        shares = share_density(curves, target.density)
        return [
            min(range(len(curve)), key=lambda index: abs(curve[index].density - share))
            for share, curve in zip(shares, curves, strict=True)
        ]
    return [_lowest(curve, target.quality or 0.0) for curve in curves]


def _lowest(curve: Sequence[Point], quality: float) -> int:
    """Index of the sparsest level that recovers a quality; of those that keep the same, the last.

    Where min_budget decides what is kept, a gamma too low would not show before prompts are longer.
    """
    index = next((index for index, point in enumerate(curve) if point.recovered >= quality), len(curve) - 1)
    while index + 1 < len(curve) and curve[index + 1].density == curve[index].density:
        index += 1
    return index


def _neighbours(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(itertools.pairwise(values))


def _upper_hull(curve: Sequence[Point]) -> list[Point]:
    hull: list[Point] = []
    for point in curve:
        if hull and point.density <= hull[-1].density:
            continue  # what min_budget has made the same
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Point, b: Point) -> float:
    return (b.recovered - a.recovered) / (b.density - a.density)
