"""flexproxy's own budgets for other rankings: what the rankings differ in is then the order of the blocks alone."""

from __future__ import annotations

import torch
from torch import Tensor

import flexproxy
from benchmarks.baselines.blocks import causal_blocks
from flexproxy import ProxyConfig


def budgets(q: Tensor, k: Tensor, gamma: float, density: float | None, min_budget: int, block_size: int) -> Tensor:
    """How many blocks flexproxy keeps in every row of a head, whatever the ranking: int32 ``[B, Hq]``.

    gamma, density, min_budget, block_size: as in ProxyConfig. The fewest blocks that hold ``gamma`` of the attention of
    the last ``block_size`` queries; or, with a density, of the one gamma for all heads that comes nearest to it.
    """
    config = ProxyConfig(gamma=gamma, density=density, min_budget=min_budget, block_size=block_size)
    return flexproxy.select(q, k, config=config).count


def best_blocks(scores: Tensor, count: Tensor) -> Tensor:
    """The ``count [B, Hq]`` blocks of every row with the highest scores ``[B, Hq, N, N]``, causal: bool, as ``scores``.

    As in flexproxy's selection the diagonal comes first and counts, equals go by index, and a row with fewer causal
    blocks keeps them all.
    """
    num_blocks = scores.shape[-1]
    causal = causal_blocks(num_blocks, scores.device)
    diagonal = torch.eye(num_blocks, dtype=torch.bool, device=scores.device)
    ranked = scores.masked_fill(~causal, -torch.inf).masked_fill(diagonal, torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    kept = torch.arange(num_blocks, device=scores.device) < count[..., None, None]
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, kept.expand_as(order)) & causal
