"""Our reading of FlashPrefill (arXiv 2603.06199): pooled keys, and a threshold relative to each row's maximum.

As the second paper restates the first (arXiv 2608.19758, section 3.1): every key block is represented by the mean of
its keys. All queries of a row of blocks score it, and the row's score for a block is the sum of their exponentials,
relative to the row's maximum (equation 1); dividing by the row's sum (equation 2) changes nothing in what follows and
is left out. A row keeps the blocks whose score is at least ``alpha`` times its largest (equation 3), and without
regard to scores the first blocks, a band of recent ones, and all blocks of the last rows.

Left open there is how the blocks around the diagonal are scored, and how many blocks are always kept. Here as in the
public code of the first paper (qhfan/FlashPrefill): a query scores the blocks that end at or before it; 2 first
blocks, 4 recent ones and 2 last rows; alpha 0.12, its value for Qwen3 (the default of the function itself is 0.7).

Different from that code: there the padding rows of a ragged last block add ``exp(0)`` to the scores, here they add
nothing; there the pooled keys are summed in the inputs' dtype. The second paper's selection and its mean correction are
in ``flashprefill_v2``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.blocks import (
    BLOCK_SIZE,
    CHUNK_ELEMENTS,
    FORCED,
    causal_blocks,
    check_prompt,
    compiled_on_gpu,
    forced_blocks,
    grouped_logits,
    pool_blocks,
    widen,
)


def flashprefill(
    q: Tensor,
    k: Tensor,
    alpha: float = 0.12,
    sink_blocks: int = 2,
    local_blocks: int = 4,
    last_rows: int = 2,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """Blocks that FlashPrefill keeps, causal: bool ``[B, Hq, N, N]``.

    Args:
        q: ``[B, Hq, S, D]``, after the position embedding.
        k: ``[B, Hkv, S, D]``.
        alpha: share of a row's largest score that a block must reach, in [0, 1]; 0 keeps every block, 1 the largest.
        sink_blocks: first key blocks, always kept.
        local_blocks: most recent key blocks, always kept; the diagonal is the first of them.
        last_rows: rows of blocks at the end of the prompt that keep everything.

    Raises:
        ValueError: shapes do not fit.
    """
    return flashprefill_levels(q, k, sink_blocks, local_blocks, last_rows, block_size) <= 1.0 - alpha


def flashprefill_levels(
    q: Tensor, k: Tensor, sink_blocks: int = 2, local_blocks: int = 4, last_rows: int = 2, block_size: int = BLOCK_SIZE
) -> Tensor:
    """From which ``1 - alpha`` on each block is kept (NOTE [Levels] in ``blocks``); arguments and errors as above."""
    check_prompt(q, k)
    length = q.shape[2]
    keys = pool_blocks(k, block_size)
    num_blocks = keys.shape[2]
    queries = F.pad(q, (0, 0, 0, num_blocks * block_size - length))
    position = torch.arange(num_blocks * block_size, device=q.device)
    last_key = torch.arange(1, num_blocks + 1, device=q.device) * block_size - 1
    scores = pooled_scores(queries, keys, position.masked_fill(position >= length, -1), last_key)
    return near_the_maximum(scores, forced_blocks(num_blocks, sink_blocks, local_blocks, last_rows, q.device))


def near_the_maximum(scores: Tensor, forced: Tensor) -> Tensor:
    """Levels of equation 3: how far each causal block's score is below its row's largest, as a share of it."""
    largest = scores.amax(-1, keepdim=True)
    levels = 1.0 - scores / largest.clamp(min=torch.finfo(scores.dtype).tiny)
    levels = levels.masked_fill_((scores >= largest) | forced, FORCED)
    return levels.masked_fill_(~causal_blocks(scores.shape[-1], scores.device), torch.inf)


def pooled_scores(queries: Tensor, keys: Tensor, position: Tensor, visible_from: Tensor) -> Tensor:
    """Sum of ``exp(q . mean key)`` over the queries of a row, relative to its maximum: ``[B, H, N, N]``.

    Args:
        queries: ``[B, H, N m, D]``, m of every row of blocks.
        keys: mean keys ``[B, H or a divisor of it, N, D]``.
        position: ``[N m]``, place of each query in the prompt; -1 for padding, which sees nothing.
        visible_from: ``[N]``, the first position from which a query scores the block.
    """
    batch, heads, _, head_dim = queries.shape
    num_blocks = keys.shape[2]
    per_row = queries.shape[2] // num_blocks
    scale = 1 / math.sqrt(head_dim)
    dtype = torch.promote_types(queries.dtype, torch.float32)
    scores = torch.zeros(batch, heads, num_blocks, num_blocks, dtype=dtype, device=queries.device)
    step = max(1, CHUNK_ELEMENTS // (batch * heads * num_blocks * per_row))
    for start in range(0, num_blocks, step):
        end = min(start + step, num_blocks)
        rows = slice(start * per_row, end * per_row)
        logits = grouped_logits(queries[:, :, rows], keys[:, :, :end])
        scores[:, :, start:end, :end] = _row_scores(logits, position[rows], visible_from[:end], per_row, scale)
    return scores


@compiled_on_gpu
def _row_scores(logits: Tensor, position: Tensor, visible_from: Tensor, per_row: int, scale: float) -> Tensor:
    """Equation 1, with the row's maximum instead of the block's: ``[B, H, rows, N]``, 0 for blocks that none sees."""
    scores = (widen(logits) * scale).masked_fill(visible_from > position[:, None], -torch.inf)
    scores = scores.unflatten(2, (-1, per_row))
    peak = scores.amax((3, 4), keepdim=True)
    energy: Tensor = (scores - peak.masked_fill(peak == -torch.inf, 0.0)).exp().sum(3)
    return energy
