"""Rankings with flexproxy's own budgets and forced blocks: what they differ in is the order of the blocks alone."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.baselines.blocks import (
    BLOCK_SIZE,
    budget_levels,
    check_prompt,
    forced_blocks,
    grouped_logits,
    pool_blocks,
    probe_masses,
    widen,
)

RANKED = 1, 2, 1
"""First blocks, recent ones and dense last rows of a ranking: flexproxy's defaults."""


def ranked(
    scores: Tensor, q: Tensor, k: Tensor, min_budget: int, forced: tuple[int, int, int], block_size: int
) -> Tensor:
    """NOTE [Levels] in ``blocks``, by the gamma of flexproxy's budgets, for any scores ``[B, Hq, N, N]``.

    Args:
        min_budget: tokens that every row keeps at least, as in ProxyConfig.
        forced: first blocks, recent ones and whole last rows that are kept in any case.
    """
    at_least = max(-(-min_budget // block_size), forced[0] + forced[1])
    always = forced_blocks(scores.shape[-1], *forced, q.device)
    return budget_levels(scores, probe_masses(q, k, block_size), always, at_least)


def mean_pooled_levels(
    q: Tensor,
    k: Tensor,
    min_budget: int = 2048,
    forced: tuple[int, int, int] = RANKED,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """The plainest estimate: a block of queries and a block of keys by the product of their means."""
    check_prompt(q, k)
    scores = grouped_logits(widen(pool_blocks(q, block_size)), widen(pool_blocks(k, block_size)))
    return ranked(scores, q, k, min_budget, forced, block_size)


def sink_recent_levels(
    q: Tensor,
    k: Tensor,
    min_budget: int = 2048,
    forced: tuple[int, int, int] = RANKED,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """No estimate at all: the first block and the most recent ones, as in StreamingLLM (arXiv 2309.17453), by block.

    StreamingLLM keeps a few first tokens and a window of fixed length; here the unit is a block, and the window of
    every head is as long as flexproxy's budget for it.
    """
    check_prompt(q, k)
    num_blocks = -(-q.shape[2] // block_size)
    block = torch.arange(num_blocks, device=q.device, dtype=torch.float32)
    recency = torch.where(block == 0, num_blocks, block).expand(*q.shape[:2], num_blocks, num_blocks)
    return ranked(recency, q, k, min_budget, forced, block_size)


def random_levels(
    q: Tensor,
    k: Tensor,
    min_budget: int = 2048,
    forced: tuple[int, int, int] = RANKED,
    block_size: int = BLOCK_SIZE,
    seed: int = 0,
) -> Tensor:
    """The lower end of a comparison: blocks drawn at random, every row of every head its own.

    seed: of the draw. The same seed draws the same order, on one kind of device; a larger budget adds to it.
    """
    check_prompt(q, k)
    num_blocks = -(-q.shape[2] // block_size)
    generator = torch.Generator(q.device).manual_seed(seed)
    drawn = torch.rand(*q.shape[:2], num_blocks, num_blocks, generator=generator, device=q.device)
    return ranked(drawn, q, k, min_budget, forced, block_size)
