"""Attention mass that blocks of one layer hold, by the ranking of any heads and at any count.

Rankings, counts and densities are those of ``flexproxy.select``: nothing of the estimate is done again here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flexproxy
from flexproxy import ProxyConfig, Selection
from flexproxy.calibration.collect import Layer
from flexproxy.ops import row_summary
from flexproxy.stages.proxy import head_groups, pool_heads
from flexproxy.stages.ranking import ForcedRule, forced_blocks
from flexproxy.stats import recovered_mass, row_masses, spread_rows

_POOLED_ELEMENTS = 2**28  # of the pooled queries in one piece, 512 MiB in 16 bits
_FEW_PEAKS = 0.01  # peaks of a row, on average, below which a head matters less

Heads = tuple[int, ...]
"""Query heads that share a proxy."""


class Levels(NamedTuple):
    """Counts and densities of a layer under several settings, from sparse to dense.

    counts: int64 ``[B, Hq, Nq, L]``, blocks that each row keeps.
    density: fp64 ``[L]``, kept / admissible blocks, the mean over sequences and heads.
    """

    counts: Tensor
    density: Tensor


def levels_of(layer: Layer, config: ProxyConfig, settings: Sequence[Mapping[str, Any]]) -> Levels:
    """Counts and densities of a layer. settings: fields of ProxyConfig that take the place of those in ``config``."""
    counts, densities = [], []
    for setting in settings:
        sparse = _without_scores(replace(config, **setting))
        selection = flexproxy.select(layer.q, layer.k, block_mask=layer.block_mask, config=sparse, scale=layer.scale)
        counts.append(selection.count.to(torch.int64))
        densities.append(selection.density().double().mean())
    return Levels(torch.stack(counts, -1), torch.stack(densities).cpu())


class Rows:
    """Some rows of dense attention of a layer, to compare rankings with.

    NOTE [Peaks]
    How good a ranking is shows where attention is concentrated, and the mean of the mass hardly sees it: of a head that
    in some rows copies from far away, most mass lies nearby, and spread out. So rankings are compared by squares of the
    mass in blocks, without the blocks that are kept in any case: the share of these *peaks* that is kept.

    Args:
        layer: what the layer attends with.
        config: settings of the estimate; its proxies and budgets do not matter.
        number: rows to look at.

    Attributes:
        index: the rows, int64 ``[m]``.
        mass: share of a head's mass in every row and block, fp32 ``[B, Hq, m, Nk]``; those of a head sum to 1.
        peaks: share of its peaks, likewise; of a head that hardly has any they sum to less.
    """

    def __init__(self, layer: Layer, config: ProxyConfig, number: int) -> None:
        self._layer = layer
        self._config = replace(config, groups=None, gamma=1.0, density=None, max_budget=None)
        self.index = spread_rows(layer.q.shape[2], number).to(layer.q.device)
        plain = _without_scores(self._config)
        selection = flexproxy.select(layer.q, layer.k, block_mask=layer.block_mask, config=plain, scale=layer.scale)
        masses = row_masses(layer.q, layer.k, selection, self.index, layer.scale)
        rows = masses.shape[0] * masses.shape[2]
        self.mass = masses / rows
        forced = self._at_rows(_forced(selection, config))
        squares = masses.masked_fill(forced, 0.0).square()
        self.peaks = squares / squares.sum((0, 2, 3), keepdim=True).clamp(min=_FEW_PEAKS * rows)

    def peaks_kept(self, candidates: Sequence[Heads], counts: Tensor) -> Iterator[Tensor]:
        """Share of its peaks that every head keeps by the ranking of each candidate: fp32 ``[Hq]`` for each.

        Candidates need not be a partition of the heads. A pooled candidate is a head of its own with a key head of its
        own, for which ``select`` has nothing left to pool.

        counts: ``[B, Hq, Nq]``, blocks that each row keeps.
        """
        layer, num_heads = self._layer, self._layer.q.shape[1]
        heads_per_kv = num_heads // layer.k.shape[1]
        per_piece = max(1, _POOLED_ELEMENTS // (layer.q.numel() // num_heads))
        for start in range(0, len(candidates), per_piece):
            q_heads = tuple(candidates[start : start + per_piece])
            k_heads = tuple(tuple(sorted({head // heads_per_kv for head in heads})) for heads in q_heads)
            selection = flexproxy.select(
                pool_heads(layer.q, q_heads, 1),
                pool_heads(layer.k, k_heads, 1),
                block_mask=layer.block_mask,
                config=replace(self._config, num_proxies=len(q_heads)),
                scale=layer.scale,
            )
            for rank in self._at_rows(selection.rank).unbind(1):
                kept = rank[:, None] < self._at_rows(counts)[..., None]
                yield self.peaks.where(kept, 0.0).sum((0, 2, 3))

    def kept(self, config: ProxyConfig, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of mass and of peaks that the proxies of a configuration keep: fp64 ``[Hq, L]`` each.

        counts: as in Levels.
        """
        layer = self._layer
        settings = replace(self._config, num_proxies=config.num_proxies, groups=config.groups)
        selection = flexproxy.select(layer.q, layer.k, block_mask=layer.block_mask, config=settings, scale=layer.scale)
        place = self._at_rows(selection.rank)[:, selection.proxy_of].to(torch.int64)
        last = (self._at_rows(counts) - 1).clamp(min=0)  # [B, Hq, rows, L]

        def shares(weights: Tensor) -> Tensor:
            by_rank = torch.zeros_like(weights).scatter_(-1, place, weights)  # [B, Hq, rows, Nk]
            return by_rank.cumsum(-1, dtype=torch.float64).gather(-1, last).sum((0, 2)).cpu()

        return shares(self.mass), shares(self.peaks)

    def _at_rows(self, blocks: Tensor) -> Tensor:
        return blocks[:, :, self.index // self._config.block_size]


def _without_scores(config: ProxyConfig) -> ProxyConfig:
    """The settings with the cheapest scores: the mask and budgets by head do not depend on scores.

    Rows that share keep as many blocks in all.
    """
    scores: dict[str, Any] = {"stride": config.block_size, "query_stride": None, "query_choice": "first"}
    return replace(config, num_proxies=1, groups=None, sharing="heads", **scores)


def _forced(selection: Selection, config: ProxyConfig) -> Tensor:
    """Blocks that a row keeps in any case: bool ``[b, h, Nq, Nk]``."""
    admissible = selection.admissible
    num_blocks = admissible.shape[-1]
    rows = admissible.new_zeros(*admissible.shape[:3], row_summary.COLUMNS, dtype=torch.int64)
    rows[..., row_summary.END] = (admissible * torch.arange(1, num_blocks + 1, device=admissible.device)).amax(-1)
    offset = torch.zeros(1, dtype=torch.int64, device=admissible.device)
    num_queries, _ = selection.lengths
    rule = ForcedRule(offset, num_queries, config.block_size, config.sink_blocks, config.local_blocks)
    return forced_blocks(rule, rows, num_blocks)


class Kept(NamedTuple):
    """What a configuration keeps of a layer; ``density`` and ``recovered`` are means over sequences, by head."""

    density: list[float]
    recovered: list[float]


def evaluate(layer: Layer, config: ProxyConfig, number: int) -> Kept:
    """Density and recovered mass of a layer, as ``flexproxy.select`` and ``flexproxy.stats`` give them."""
    selection = flexproxy.select(layer.q, layer.k, block_mask=layer.block_mask, config=config, scale=layer.scale)
    rows = spread_rows(layer.q.shape[2], number).to(layer.q.device)
    recovered = recovered_mass(layer.q, layer.k, selection, scale=layer.scale, rows=rows)
    return Kept(selection.density().double().mean(0).tolist(), recovered.double().mean(0).tolist())


def contiguous(num_proxies: int, num_q_heads: int, num_kv_heads: int) -> tuple[Heads, ...] | None:
    """The groups of ``num_proxies``; None where it does not fit the heads."""
    try:
        return head_groups(num_proxies, None, num_q_heads, num_kv_heads)[0]
    except ValueError:
        return None
