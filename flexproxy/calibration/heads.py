"""Groupings of the heads of a layer, and the attention mass that each recovers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

from torch import Tensor

from flexproxy import ProxyConfig
from flexproxy.calibration.choose import Point, Target
from flexproxy.calibration.collect import Layer
from flexproxy.calibration.measure import Heads, Rows, contiguous, levels_of


class Grouping(NamedTuple):
    """One way to group the heads of a layer.

    config: has it as ``num_proxies`` or as ``groups``.
    peaks: share of its peaks that every head keeps at every level, fp64 ``[Hq, L]``; see NOTE [Peaks].
    curve: mass that it recovers at every level, the mean over heads.
    """

    groups: tuple[Heads, ...]
    config: ProxyConfig
    peaks: Tensor
    curve: list[Point]


def groupings_of(layer: Layer, config: ProxyConfig, target: Target, max_proxies: int, num_rows: int) -> list[Grouping]:
    """Groupings of up to ``max_proxies`` proxies of one layer, at every level of the target; from few to many."""
    levels = levels_of(layer, config, target.settings())
    rows = Rows(layer, config, num_rows)
    counts = levels.counts[..., target.reference()]
    groupings: list[Grouping] = []
    num_heads, num_kv_heads = layer.q.shape[1], layer.k.shape[1]
    merged = merge(rows, counts)
    for groups, proxies in _candidates(merged, min(max_proxies, num_heads), num_heads, num_kv_heads):
        grouped = replace(config, num_proxies=1, groups=None)
        grouped = replace(grouped, num_proxies=proxies) if proxies else replace(grouped, groups=proxy_indices(groups))
        mass, peaks = rows.kept(grouped, levels.counts)
        curve = [Point(*point) for point in zip(levels.density.tolist(), mass.mean(0).tolist(), strict=True)]
        groupings.append(Grouping(groups, grouped, peaks, curve))
    return groupings


def merge(rows: Rows, counts: Tensor) -> dict[int, tuple[Heads, ...]]:
    """Groups of heads for every number of proxies, from Hq down to 1: two are merged at a time, where least is lost.

    What a group is worth are the peaks that its heads keep by the ranking of its pooled proxy, not how alike they look:
    a mean of heads with different keys may rank worse than any of them.

    Args:
        rows: of the layer.
        counts: blocks that every row keeps, ``[B, Hq]``.
    """
    groups: list[Heads] = [(head,) for head in range(counts.shape[1])]
    worth: dict[Heads, float] = {}

    def learn(candidates: list[Heads]) -> None:
        new = [heads for heads in candidates if heads not in worth]
        for heads, peaks in zip(new, rows.peaks_kept(new, counts), strict=True):
            worth[heads] = float(peaks[list(heads)].sum())

    learn(groups)
    found = {len(groups): tuple(groups)}
    while len(groups) > 1:
        pairs = {tuple(sorted(a + b)): (a, b) for a, b in combinations(groups, 2)}
        learn(list(pairs))
        best = max(pairs, key=lambda union: worth[union] - sum(worth[heads] for heads in pairs[union]))
        groups = sorted([heads for heads in groups if heads not in pairs[best]] + [best])
        found[len(groups)] = tuple(groups)
    return found


def proxy_indices(groups: tuple[Heads, ...]) -> tuple[int, ...]:
    """The proxy of every head, as ``ProxyConfig.groups`` has it."""
    index = {head: proxy for proxy, heads in enumerate(groups) for head in heads}
    return tuple(index[head] for head in sorted(index))


def _candidates(
    merged: dict[int, tuple[Heads, ...]], max_proxies: int, num_heads: int, num_kv_heads: int
) -> Iterator[tuple[tuple[Heads, ...], int | None]]:
    """Groups, and the ``num_proxies`` that makes them if there is one; that of each number first."""
    for number in range(1, max_proxies + 1):
        plain = contiguous(number, num_heads, num_kv_heads)
        if plain is not None:
            yield plain, number
        if merged[number] != plain:
            yield merged[number], None
