"""Our reading of FlashPrefill V2 (arXiv 2608.19758): FlashPrefill's selection per KV head, and a mean correction.

Selection. The paper restates that of the first (section 3.1; ``flashprefill``), and packs the query heads of a group
into the rows of a tile, so that there is one selection per KV head (section 3.3, PackGQA): equation 1 sums over the
queries of all heads of the group. Where the paper is silent, as in its public code (qhfan/FlashPrefillv2): a query
scores every block from its first token on, so also the one that it stands in; the numbers of first, recent and last
blocks are those of the first paper. alpha: 0.18 for Llama-3.1-8B, 0.08 for Qwen2.5-7B, 0.12 for Qwen3-30B, say
comments there; the default of its class is 1.0, the example of its README has 0.1.

Correction (section 3.2, "zero-order mean correction"). It changes the output, and no selection: a block that was not
kept still counts in the softmax, as ``|B|`` tokens with its mean key and mean value (equations 5 and 6). Only blocks
that every query of the row sees whole are corrected. In the paper this is part of the kernel; here ``mean_correction``
does it for the output and the LSE of any sparse attention, eagerly and at the cost of ``S N`` logits a head.

Different from the public code: its tiles have 128 packed rows, that is 128 / G positions of G heads each, here a row of
blocks has ``block_size`` positions of all G heads, since this is what one row of the mask covers: coarser by G. Its
"last blocks" are such tiles. There a ragged last block is not scored, here it is, by the mean of the keys that it has.
Its class scores key blocks of 64 tokens unless told otherwise; the example of its README has 128, as here.
Its example of a server leaves the first 4 layers dense, which is a matter of who calls this, and has 8 last tiles.
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
    forced_blocks,
    grouped_logits,
    pool_blocks,
    widen,
)
from benchmarks.baselines.flashprefill import near_the_maximum, pooled_scores


def flashprefill_v2(
    q: Tensor,
    k: Tensor,
    alpha: float = 0.12,
    sink_blocks: int = 2,
    local_blocks: int = 4,
    last_rows: int = 2,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """Blocks that FlashPrefill V2 keeps, causal, the same for all heads of a group: bool ``[B, Hq, N, N]``.

    Args:
        q: ``[B, Hq, S, D]``, after the position embedding.
        k: ``[B, Hkv, S, D]``.
        alpha, sink_blocks, local_blocks, last_rows: as in ``flashprefill``.

    Raises:
        ValueError: shapes do not fit.
    """
    return flashprefill_v2_levels(q, k, sink_blocks, local_blocks, last_rows, block_size) <= 1.0 - alpha


def flashprefill_v2_levels(
    q: Tensor, k: Tensor, sink_blocks: int = 2, local_blocks: int = 4, last_rows: int = 2, block_size: int = BLOCK_SIZE
) -> Tensor:
    """From which ``1 - alpha`` on each block is kept (NOTE [Levels] in ``blocks``); arguments and errors as above."""
    check_prompt(q, k)
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    keys = pool_blocks(k, block_size)
    num_blocks = keys.shape[2]
    heads = F.pad(q, (0, 0, 0, num_blocks * block_size - length)).unflatten(2, (num_blocks, block_size))
    packed = heads.unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 4)  # [B, Hkv, N G block_size, D]
    position = torch.arange(num_blocks * block_size, device=q.device)
    position = position.masked_fill(position >= length, -1).view(num_blocks, 1, block_size)
    first_key = torch.arange(num_blocks, device=q.device) * block_size
    scores = pooled_scores(packed, keys, position.expand(-1, group, -1).flatten(), first_key)
    forced = forced_blocks(num_blocks, sink_blocks, local_blocks, last_rows, q.device)
    return near_the_maximum(scores, forced).repeat_interleave(group, 1)


def mean_correction(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block_map: Tensor, block_size: int = BLOCK_SIZE
) -> Tensor:
    """The output of sparse attention with the means of the other blocks added, equation 6: as ``out``.

    Args:
        q: ``[B, Hq, S, D]``, after the position embedding.
        k, v: ``[B, Hkv, S, D]``.
        out: ``[B, Hq, S, D]``, causal attention over the kept blocks.
        lse: ``[B, Hq, S]``, natural logarithm of its softmax's denominators.
        block_map: bool ``[B, Hq, N, N]``, the kept blocks, the diagonal among them.

    Raises:
        ValueError: shapes do not fit.
    """
    check_prompt(q, k)
    batch, heads, length, head_dim = q.shape
    num_blocks = block_map.shape[-1]
    dropped = ~block_map & causal_blocks(num_blocks, q.device).tril(-1)  # before the diagonal: whole, and seen whole
    mean_k, mean_v = pool_blocks(k, block_size), widen(pool_blocks(v, block_size))
    corrected = torch.empty_like(out)
    step = max(1, CHUNK_ELEMENTS // (batch * heads * num_blocks * block_size))
    for start in range(0, num_blocks, step):
        tokens = slice(start * block_size, min((start + step) * block_size, length))
        logits = widen(grouped_logits(q[:, :, tokens], mean_k)) / math.sqrt(head_dim) + math.log(block_size)
        counted = dropped[:, :, start : start + step].repeat_interleave(block_size, 2)[:, :, : logits.shape[2]]
        logits = logits.masked_fill(~counted, -torch.inf)
        total = torch.logaddexp(lse[:, :, tokens], logits.logsumexp(-1))[..., None]
        added = (logits - total).exp().unflatten(1, (k.shape[1], -1)) @ mean_v[:, :, None]
        kept = (lse[:, :, tokens, None] - total).exp() * out[:, :, tokens]
        corrected[:, :, tokens] = kept + added.flatten(1, 2)
    return corrected
