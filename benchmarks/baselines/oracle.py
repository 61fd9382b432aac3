"""What a ranking can reach: blocks by the attention that they truly hold. It computes dense attention, to save it.

Not a contender in time, but the upper end of a comparison: every row and head ranks its blocks by the sum of their
exact probabilities. ``oracle`` keeps them by flexproxy's budgets, so that only the ranking differs; the one per row
takes in every row the fewest blocks that hold a share of its attention, so that the budgets are as good as the ranking.
It is a bound for attention mass, block by block and query by query summed; a mask with a better output may exist.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.blocks import (
    BLOCK_SIZE,
    CHUNK_ELEMENTS,
    causal_blocks,
    check_prompt,
    compiled_on_gpu,
    cover_levels,
    forced_blocks,
    grouped_logits,
    widen,
)
from benchmarks.baselines.rankings import RANKED, ranked


def oracle_levels(
    q: Tensor,
    k: Tensor,
    min_budget: int = 2048,
    forced: tuple[int, int, int] = RANKED,
    block_size: int = BLOCK_SIZE,
    mass: Tensor | None = None,
) -> Tensor:
    """Blocks with the most attention, as many as flexproxy keeps: NOTE [Levels] in ``blocks``, by gamma.

    Args:
        q: ``[B, Hq, S, D]``, after the position embedding.
        k: ``[B, Hkv, S, D]``.
        min_budget, forced: as in ``ranked``.
        mass: ``block_mass`` of q and k, where it is known already: it is nearly all of the work.

    Raises:
        ValueError: shapes do not fit.
    """
    check_prompt(q, k)
    mass = block_mass(q, k, block_size) if mass is None else mass
    return ranked(mass, q, k, min_budget, forced, block_size)


def oracle_per_row_levels(
    q: Tensor,
    k: Tensor,
    min_budget: int = 2048,
    forced: tuple[int, int, int] = RANKED,
    block_size: int = BLOCK_SIZE,
    mass: Tensor | None = None,
) -> Tensor:
    """The fewest blocks of every row that hold a share of its attention: NOTE [Levels] in ``blocks``, by that share.

    Arguments and errors as of ``oracle_levels``.
    """
    check_prompt(q, k)
    mass = block_mass(q, k, block_size) if mass is None else mass
    num_blocks = mass.shape[-1]
    levels = cover_levels(mass, forced_blocks(num_blocks, *forced, q.device), -(-min_budget // block_size))
    return levels.masked_fill_(~causal_blocks(num_blocks, q.device), torch.inf)


def block_mass(q: Tensor, k: Tensor, block_size: int = BLOCK_SIZE) -> Tensor:
    """Sum of the exact causal attention in every block: ``[B, Hq, N, N]``, fp32 or wider.

    A row sums to the number of its queries. The products are fp32 too: what is exact should not rank by bf16.
    """
    batch, heads, length, head_dim = q.shape
    num_blocks = -(-length // block_size)
    pad = (0, 0, 0, num_blocks * block_size - length)
    queries, keys = F.pad(q, pad), F.pad(widen(k), pad)
    position = torch.arange(num_blocks * block_size, device=q.device)
    mass = torch.zeros(batch, heads, num_blocks, num_blocks, dtype=keys.dtype, device=q.device)
    pairs = max(1, CHUNK_ELEMENTS // (batch * heads * block_size**2))  # of blocks in one piece
    step = max(1, pairs // num_blocks)
    width = pairs // step
    for start in range(0, num_blocks, step):
        end = min(start + step, num_blocks)
        rows = slice(start * block_size, end * block_size)
        chunk = widen(queries[:, :, rows])
        parts = []
        for first in range(0, end, width):
            columns = slice(first * block_size, min(first + width, end) * block_size)
            logits = grouped_logits(chunk, keys[:, :, columns])
            parts.append(_log_mass(logits, position[rows], position[columns], block_size, 1 / math.sqrt(head_dim)))
        log_mass = torch.cat(parts, -1)
        probability = (log_mass - log_mass.logsumexp(-1, keepdim=True)).exp_()
        probability.masked_fill_(position[rows, None] >= length, 0.0)
        mass[:, :, start:end, :end] = probability.unflatten(2, (-1, block_size)).sum(3)
    return mass


@compiled_on_gpu
def _log_mass(logits: Tensor, q_position: Tensor, k_position: Tensor, block_size: int, scale: float) -> Tensor:
    """Logarithm of each query's sum of exponentials in every block: ``[B, Hq, m, n]``, -inf where it sees none."""
    scores = (logits * scale).masked_fill(k_position > q_position[:, None], -torch.inf)
    log_mass: Tensor = scores.unflatten(-1, (-1, block_size)).logsumexp(-1)
    return log_mass
