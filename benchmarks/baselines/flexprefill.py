"""Our reading of FlexPrefill (arXiv 2502.20766): each head is query-aware or vertical-slash; cumulative gamma.

The paper, section 3. The last block of queries stands for all of them. Its true attention, summed over key blocks, is
compared with an estimate from pooled queries and keys by the square root of the Jensen-Shannon divergence: where that
is less than ``tau``, the head is query-aware, else vertical-slash (query-aware sparse pattern determination).

- Vertical-slash: the attention of the last queries is summed along columns and along diagonals; of each the fewest
  that reach ``gamma`` are kept, and extended over all rows.
- Query-aware: pooled queries and keys give a map of blocks; over the whole map, normalised to one sum, the fewest
  blocks that reach ``gamma`` are kept.

The paper leaves open how lines of single tokens become blocks. Here a column's mass is summed over its key block, and
a diagonal's over the band of its block distance; blocks and bands take the place of lines. A band's diagonals cross
the blocks at its distance and at the next one, so both are kept. Of either kind at least ``min_budget`` tokens are
kept, in query-aware heads exactly that beside the map; the first column and the diagonal always are, and count.

Different from the public code (ByteDance-Seed/FlexPrefill): that counts the *tokens* that reach gamma and keeps a
128th as many blocks, which need not hold gamma; of a band it keeps the nearer distance only; its ``0 log 0`` is
not-a-number; it takes one sequence at a time, and makes the map of query-aware heads only, in a loop over heads that
waits for the device. Here both patterns are made for all heads, without waiting.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.blocks import (
    BLOCK_SIZE,
    below,
    causal_blocks,
    check_prompt,
    compiled_on_gpu,
    cover_levels,
    forced_blocks,
    grouped_logits,
    pool_blocks,
    widen,
)


def flexprefill(
    q: Tensor, k: Tensor, gamma: float = 0.9, tau: float = 0.1, min_budget: int = 1024, block_size: int = BLOCK_SIZE
) -> Tensor:
    """Blocks that FlexPrefill keeps, causal: bool ``[B, Hq, N, N]``.

    Args:
        q: ``[B, Hq, S, D]``, after the position embedding.
        k: ``[B, Hkv, S, D]``.
        gamma: attention mass to reach, in [0, 1]; 1 keeps every block. The paper uses 0.9 and 0.95.
        tau: divergence below which a head is query-aware; the paper's is 0.1, 0 makes every head vertical-slash.
        min_budget: tokens of columns, and of diagonals, that are kept at least; the paper's is 1024.

    Raises:
        ValueError: shapes do not fit.
    """
    return below(flexprefill_levels(q, k, tau, min_budget, block_size), gamma)


def flexprefill_levels(
    q: Tensor, k: Tensor, tau: float = 0.1, min_budget: int = 1024, block_size: int = BLOCK_SIZE
) -> Tensor:
    """From which gamma on each block is kept (NOTE [Levels] in ``blocks``); arguments and errors as above."""
    check_prompt(q, k)
    num_blocks = -(-q.shape[2] // block_size)
    min_blocks = -(-min_budget // block_size)
    queries = q[:, :, -block_size:]
    lines = _line_masses(grouped_logits(queries.flip(2), k), block_size, 1 / math.sqrt(q.shape[3]))
    columns, bands = lines[:, :, 0], lines[:, :, 1]

    mean_k = pool_blocks(k, block_size)
    estimate = grouped_logits(pool_blocks(queries, block_size), mean_k)[:, :, 0]
    query_aware = (_divergence(_probability(estimate, q.shape[3]), columns) < tau)[..., None, None]

    pattern = _vertical_slash(columns, bands, min_blocks)
    least = torch.where(pattern < 0.0, pattern, torch.inf)
    pooled = _pooled_blocks(grouped_logits(pool_blocks(q, block_size), mean_k), q.shape[3])
    levels = torch.where(query_aware, torch.minimum(pooled, least), pattern)
    return levels.masked_fill_(~causal_blocks(num_blocks, q.device), torch.inf)


@compiled_on_gpu
def _line_masses(logits: Tensor, block_size: int, scale: float) -> Tensor:
    """Mean attention that falls on each key block, and on each band of diagonals: ``[B, Hq, 2, N]``, each sums to 1.

    logits: ``[B, Hq, m, S]`` of the last m queries, the last one first.
    """
    rows, length = logits.shape[-2:]
    query = torch.arange(length - 1, length - 1 - rows, -1, device=logits.device)
    key = torch.arange(length, device=logits.device)
    probability = (widen(logits) * scale).masked_fill(key > query[:, None], -torch.inf).softmax(-1)
    missing = -length % block_size
    columns = F.pad(probability.mean(-2), (0, missing)).unflatten(-1, (-1, block_size)).sum(-1)
    # Row r, moved r places to the right, has its pairs of distance t at S - 1 - t, whatever r is.
    skewed = F.pad(probability, (0, rows)).flatten(-2)[..., :-rows].unflatten(-1, (rows, length + rows - 1))
    bands = skewed[..., :length].mean(-2).flip(-1)
    bands = F.pad(bands, (0, missing)).unflatten(-1, (-1, block_size)).sum(-1)
    return torch.stack([columns, bands], 2)


def _probability(logits: Tensor, head_dim: int) -> Tensor:
    """Softmax of logits without their scale, in fp32 or wider."""
    return (widen(logits) / math.sqrt(head_dim)).softmax(-1)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence, natural logarithm: the last dimension is reduced."""
    middle = (p + q) / 2

    def relative_entropy(x: Tensor) -> Tensor:
        entropy: Tensor = torch.special.xlogy(x, x) - torch.special.xlogy(x, middle)
        return entropy.sum(-1)

    return ((relative_entropy(p) + relative_entropy(q)) / 2).clamp(min=0.0).sqrt()


def _vertical_slash(columns: Tensor, bands: Tensor, min_blocks: int) -> Tensor:
    """Levels by the heaviest columns and bands, ``[B, Hq, N]`` each: ``[B, Hq, N, N]``, not yet causal."""
    block = torch.arange(columns.shape[-1], device=columns.device)
    vertical = cover_levels(columns, block == 0, min_blocks)
    band = cover_levels(bands, block == 0, min_blocks)
    crossed = torch.minimum(band, F.pad(band[..., :-1], (1, 0), value=torch.inf))
    distance = (block[:, None] - block).clamp(min=0)
    return torch.minimum(vertical[..., None, :], crossed[..., distance])


def _pooled_blocks(logits: Tensor, head_dim: int) -> Tensor:
    """Levels of the blocks of a head's pooled map by gamma of all of it: as ``logits`` ``[B, Hq, N, N]``."""
    num_blocks = logits.shape[-1]
    causal = causal_blocks(num_blocks, logits.device)
    mass = _probability(logits.masked_fill(~causal, -torch.inf), head_dim)
    forced = forced_blocks(num_blocks, 1, 1, 0, logits.device)
    levels: Tensor = cover_levels(mass.flatten(2), forced.flatten()).unflatten(2, (num_blocks, num_blocks))
    return levels
