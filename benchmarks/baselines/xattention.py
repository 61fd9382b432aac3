"""Our reading of XAttention (arXiv 2503.16428): blocks by the sums of their strided antidiagonals.

The paper, section 2 and algorithm 1. Every window of ``stride`` x ``stride`` token pairs is represented by its
antidiagonal: the products of query ``stride - 1 - t`` with key ``t``, summed over t. These sums, divided by ``sqrt(D)
* stride``, are softmaxed over the key windows of each query window; a block's score is the sum of the probabilities
of its windows, and every row of blocks keeps the fewest blocks that hold ``threshold`` of its sum (section 2.2). The
search for one threshold per head (section 2.3) needs a calibration and is left out.

Not said in the paper; here as in its public code (mit-han-lab/x-attention):
- causality is that of windows: the antidiagonal of a window on the diagonal is summed whole, with the pairs in it
  that look ahead;
- the first key block and the diagonal block are always kept, and count towards the threshold;
- a ragged end is filled with zeros; windows past the end count for nothing.

Different from the public code: that fills up to a multiple of a chunk of at least 2048 tokens, wants the keys of a
group repeated, rounds the probabilities to the inputs' dtype before they are summed, and needs a GPU whose name has
"100" in it for its own kernel. Here the products are in the inputs' dtype, as there, and all that follows is fp32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.blocks import (
    BLOCK_SIZE,
    CHUNK_ELEMENTS,
    below,
    causal_blocks,
    check_prompt,
    compiled_on_gpu,
    cover_levels,
    forced_blocks,
    grouped_logits,
    widen,
)


def xattention(q: Tensor, k: Tensor, threshold: float = 0.9, stride: int = 8, block_size: int = BLOCK_SIZE) -> Tensor:
    """Blocks that XAttention keeps, causal: bool ``[B, Hq, N, N]``.

    Args:
        q: ``[B, Hq, S, D]``, after the position embedding.
        k: ``[B, Hkv, S, D]``.
        threshold: share of a row's score to keep, in [0, 1]; 1 keeps every block. The paper's fixed one is 0.9.
        stride: side of a window, a divisor of ``block_size``; the paper uses 8 and 16.

    Raises:
        ValueError: shapes do not fit.
    """
    return below(xattention_levels(q, k, stride, block_size), threshold)


def xattention_levels(q: Tensor, k: Tensor, stride: int = 8, block_size: int = BLOCK_SIZE) -> Tensor:
    """From which threshold on each block is kept (NOTE [Levels] in ``blocks``); arguments and errors as above."""
    check_prompt(q, k)
    if block_size % stride:
        raise ValueError(f"stride: expected a divisor of block_size {block_size}, got {stride}; use 8 or 16")
    scores = antidiagonal_scores(q, k, stride, block_size)
    num_blocks = scores.shape[-1]
    levels = cover_levels(scores, forced_blocks(num_blocks, 1, 1, 0, q.device))
    return levels.masked_fill_(~causal_blocks(num_blocks, q.device), torch.inf)


def antidiagonal_scores(q: Tensor, k: Tensor, stride: int, block_size: int) -> Tensor:
    """Sum of the windows' probabilities in every block: ``[B, Hq, N, N]``, 0 above the diagonal, fp32 or wider."""
    batch, heads, length, head_dim = q.shape
    num_blocks = -(-length // block_size)
    cell = block_size // stride  # windows a block
    pad = (0, 0, 0, num_blocks * block_size - length)
    keys = F.pad(k, pad).unflatten(2, (-1, stride)).flatten(3)  # [B, Hkv, windows, stride D]
    windows = F.pad(q, pad).unflatten(2, (-1, stride))  # [B, Hq, windows, stride, D]
    real = -(-length // stride)
    scale = 1 / (math.sqrt(head_dim) * stride)
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.zeros(batch, heads, num_blocks, num_blocks, dtype=dtype, device=q.device)
    step = max(1, CHUNK_ELEMENTS // (batch * heads * num_blocks * cell * cell))
    for start in range(0, num_blocks, step):
        end = min(start + step, num_blocks)
        antidiagonal = windows[:, :, start * cell : end * cell].flip(3).flatten(3)
        logits = grouped_logits(antidiagonal, keys[:, :, : end * cell])
        window = torch.arange(end * cell, device=q.device)
        scores[:, :, start:end, :end] = _block_sums(logits, window[start * cell :], window, real, cell, scale)
    return scores


@compiled_on_gpu
def _block_sums(logits: Tensor, q_window: Tensor, k_window: Tensor, real: int, cell: int, scale: float) -> Tensor:
    """Probabilities summed over blocks of ``cell`` x ``cell`` windows; windows from ``real`` on are past the end."""
    scores = (widen(logits) * scale).masked_fill(k_window > q_window[:, None], -torch.inf)
    probability = scores.softmax(-1).masked_fill(q_window[:, None] >= real, 0.0)
    sums: Tensor = probability.unflatten(-1, (-1, cell)).sum(-1).unflatten(-2, (-1, cell)).sum(-2)
    return sums
