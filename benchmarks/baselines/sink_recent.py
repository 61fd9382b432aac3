"""No estimate at all: the first block and the most recent ones, as in StreamingLLM (arXiv 2309.17453), by block.

StreamingLLM keeps a few first tokens and a window of fixed length; here the unit is a block, and the window of every
head is as long as flexproxy's budget for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.baselines.blocks import BLOCK_SIZE, check_prompt
from benchmarks.baselines.budgets import best_blocks, budgets


def sink_recent(
    q: Tensor,
    k: Tensor,
    gamma: float = 0.95,
    density: float | None = None,
    min_budget: int = 2048,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """The diagonal, then the first block, then those before the diagonal, as many as flexproxy keeps.

    Args:
        q: ``[B, Hq, S, D]``, after the position embedding.
        k: ``[B, Hkv, S, D]``.
        gamma, density, min_budget: as in ProxyConfig.

    Returns:
        Kept blocks, causal: bool ``[B, Hq, N, N]``.

    Raises:
        ValueError: shapes do not fit, or a setting is out of range.
    """
    check_prompt(q, k)
    num_blocks = -(-q.shape[2] // block_size)
    block = torch.arange(num_blocks, device=q.device, dtype=torch.float32)
    recency = torch.where(block == 0, num_blocks, block).expand(*q.shape[:2], num_blocks, num_blocks)
    return best_blocks(recency, budgets(q, k, gamma, density, min_budget, block_size))
