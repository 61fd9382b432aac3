"""The lower end of a comparison: blocks drawn at random, as many as flexproxy keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.baselines.blocks import BLOCK_SIZE, check_prompt
from benchmarks.baselines.budgets import best_blocks, budgets


def random_blocks(
    q: Tensor,
    k: Tensor,
    gamma: float = 0.95,
    density: float | None = None,
    min_budget: int = 2048,
    block_size: int = BLOCK_SIZE,
    seed: int = 0,
) -> Tensor:
    """The diagonal and randomly drawn blocks, every row of every head its own, causal: bool ``[B, Hq, N, N]``.

    Args:
        q: ``[B, Hq, S, D]``, after the position embedding.
        k: ``[B, Hkv, S, D]``.
        gamma, density, min_budget: as in ProxyConfig.
        seed: of the draw. The same seed draws the same order, on one kind of device; a larger budget adds to it.

    Raises:
        ValueError: shapes do not fit, or a setting is out of range.
    """
    check_prompt(q, k)
    num_blocks = -(-q.shape[2] // block_size)
    generator = torch.Generator(q.device).manual_seed(seed)
    drawn = torch.rand(*q.shape[:2], num_blocks, num_blocks, generator=generator, device=q.device)
    return best_blocks(drawn, budgets(q, k, gamma, density, min_budget, block_size))
