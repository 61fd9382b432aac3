"""The plainest estimate: a block of queries and a block of keys by the product of their means.

FlexPrefill's query-aware heads and others build on it. Here it is only the ranking, with flexproxy's budgets, so that
it stands beside flexproxy's own ranking and beside the oracle.
"""

from __future__ import annotations

from torch import Tensor

from benchmarks.baselines.blocks import BLOCK_SIZE, check_prompt, grouped_logits, pool_blocks, widen
from benchmarks.baselines.budgets import best_blocks, budgets


def mean_pooled(
    q: Tensor,
    k: Tensor,
    gamma: float = 0.95,
    density: float | None = None,
    min_budget: int = 2048,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """Blocks with the largest products of means, as many as flexproxy keeps, causal: bool ``[B, Hq, N, N]``.

    Args:
        q: ``[B, Hq, S, D]``, after the position embedding.
        k: ``[B, Hkv, S, D]``.
        gamma, density, min_budget: as in ProxyConfig.

    Raises:
        ValueError: shapes do not fit, or a setting is out of range.
    """
    check_prompt(q, k)
    scores = grouped_logits(widen(pool_blocks(q, block_size)), widen(pool_blocks(k, block_size)))
    return best_blocks(scores, budgets(q, k, gamma, density, min_budget, block_size))
