"""What blocks hold of one layer's attention: by the ranking of any heads, at any count.

Rankings, counts and densities are those of ``flexproxy.select``: nothing of the estimate is done again here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flexproxy
from flexproxy import ProxyConfig
from flexproxy.calibration.collect import Layer
from flexproxy.proxy import head_groups, pool_heads
from flexproxy.stats import recovered_mass, row_masses

_POOLED_ELEMENTS = 2**28  # of the pooled queries in one piece, 512 MiB in 16 bits

Heads = tuple[int, ...]
"""Query heads that share a proxy."""


class Levels(NamedTuple):
    """What a layer keeps under each of some settings, from sparse to dense.

    counts: int64 ``[B, Hq, L]``, blocks that every row keeps.
    density: fp64 ``[L]``, kept / admissible blocks, the mean over sequences and heads.
    """

    counts: Tensor
    density: Tensor


def levels_of(layer: Layer, config: ProxyConfig, settings: Sequence[Mapping[str, Any]]) -> Levels:
    """Counts and densities of a layer. settings: fields of ProxyConfig that take the place of those in ``config``."""
    counts, densities = [], []
    for setting in settings:
        # Budgets do not depend on the scores, so these are made as cheap as they can be.
        sparse = replace(replace(config, **setting), num_proxies=1, groups=None, stride=config.block_size)
        selection = flexproxy.select(layer.q, layer.k, block_mask=layer.block_mask, config=sparse, scale=layer.scale)
        counts.append(selection.count.to(torch.int64))
        densities.append(selection.density().double().mean())
    return Levels(torch.stack(counts, -1), torch.stack(densities).cpu())


class Rows:
    """Some rows of dense attention of a layer, to hold rankings against.

    Args:
        layer: what the layer attends with.
        config: settings of the estimate; its proxies and budgets do not matter.
        number: rows to look at.
    """

    def __init__(self, layer: Layer, config: ProxyConfig, number: int) -> None:
        self._layer = layer
        self._config = replace(config, groups=None, gamma=1.0, density=None, max_budget=None)
        self.index = row_index(layer.q.shape[2], number, layer.q.device)
        cheap = replace(self._config, num_proxies=1, stride=config.block_size)
        selection = flexproxy.select(layer.q, layer.k, block_mask=layer.block_mask, config=cheap, scale=layer.scale)
        self.masses = row_masses(layer.q, layer.k, selection, self.index, layer.scale)  # [B, Hq, m, Nk]

    def rankings(self, candidates: Sequence[Heads]) -> Iterator[Tensor]:
        """Rank of every block by the proxy of each candidate, at the rows: int32 ``[B, m, Nk]``.

        Candidates need not be a partition of the heads. A pooled candidate is a head of its own with a key head of its
        own, for which ``select`` has nothing left to pool.
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
            yield from self._at_rows(selection.rank).unbind(1)

    def recovered(self, candidates: Sequence[Heads], counts: Tensor) -> list[Tensor]:
        """Mass that each candidate's ranking recovers for each of its heads: fp32 ``[heads of the candidate]`` each.

        counts: ``[B, Hq]``, blocks that every row keeps.
        """
        found = []
        for heads, rank in zip(candidates, self.rankings(candidates), strict=True):
            members = list(heads)
            kept = rank[:, None] < counts[:, members, None, None]
            found.append(self.masses[:, members].where(kept, 0.0).sum(-1).mean((0, 2)))
        return found

    def recovered_by(self, config: ProxyConfig, counts: Tensor) -> Tensor:
        """Mass that the proxies of a configuration recover, by head and level: fp64 ``[Hq, L]``.

        counts: of Levels.
        """
        layer = self._layer
        settings = replace(self._config, num_proxies=config.num_proxies, groups=config.groups)
        selection = flexproxy.select(layer.q, layer.k, block_mask=layer.block_mask, config=settings, scale=layer.scale)
        rank = self._at_rows(selection.rank)
        found = []
        for head, proxy in enumerate(selection.proxy_of.tolist()):
            order = rank[:, proxy].to(torch.int64)
            by_rank = torch.zeros_like(self.masses[:, head]).scatter_(-1, order, self.masses[:, head])
            at = (counts[:, head] - 1).clamp(min=0)[:, None].expand(-1, order.shape[1], -1)
            found.append(by_rank.cumsum(-1, dtype=torch.float64).gather(-1, at).mean((0, 1)))
        return torch.stack(found).cpu()

    def similarity(self, counts: Tensor) -> Tensor:
        """Mass of a head (column) that it would recover by the ranking of another (row): fp32 ``[Hq, Hq]``."""
        alone = [(head,) for head in range(self.masses.shape[1])]
        kept = (rank[:, None] < counts[..., None, None] for rank in self.rankings(alone))
        return torch.stack([self.masses.where(blocks, 0.0).sum(-1).mean((0, 2)) for blocks in kept]).cpu()

    def _at_rows(self, rank: Tensor) -> Tensor:
        return rank[:, :, self.index // self._config.block_size]


class Kept(NamedTuple):
    """What a configuration keeps of a layer; ``density`` and ``recovered`` are means over sequences, by head."""

    density: list[float]
    recovered: list[float]


def evaluate(layer: Layer, config: ProxyConfig, number: int) -> Kept:
    """Density and recovered mass of a layer, as ``flexproxy.select`` and ``flexproxy.stats`` give them."""
    selection = flexproxy.select(layer.q, layer.k, block_mask=layer.block_mask, config=config, scale=layer.scale)
    rows = row_index(layer.q.shape[2], number, layer.q.device)
    recovered = recovered_mass(layer.q, layer.k, selection, scale=layer.scale, rows=rows)
    return Kept(selection.density().double().mean(0).tolist(), recovered.double().mean(0).tolist())


def contiguous(num_proxies: int, num_q_heads: int, num_kv_heads: int) -> tuple[Heads, ...] | None:
    """The groups of ``num_proxies``; None where it does not fit the heads."""
    try:
        return head_groups(num_proxies, None, num_q_heads, num_kv_heads)[0]
    except ValueError:
        return None


def row_index(length: int, number: int, device: torch.device) -> Tensor:
    """Rows to look at, ascending: spread at random, for evenly spaced ones could all be among the sampled."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    return order[:number].sort().values.to(device)
