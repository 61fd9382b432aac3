"""Stage 2, unified scoring: one score for every block pair and proxy head (paper section 3.2, equation 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexproxy.masks.sampled import SampledMask, uncertain
from flexproxy.ops.operators import Size, operator
from flexproxy.ops.tensors import logsumexp_, pad_to_multiple

CHUNK_ELEMENTS = 2**20  # logits in one piece, 4 MiB: the passes over them stay in the caches of a CPU


class Sampling(NamedTuple):
    """Which queries and keys the scores look at.

    q_cell, k_cell: sampled queries, and sampled keys, of a block. key_step: tokens from one sampled key to the next.
    chosen: the sampled queries, int64 ``[B, P, sampled queries]``, ``q_cell`` of each block in a row; None where q has
        these alone.
    """

    q_cell: int
    k_cell: int
    key_step: int
    chosen: Tensor | None = None


@operator(lambda a: ((*a.q.shape[:2], *a.admissible.shape[2:]), torch.float32))
def block_scores(
    q: Tensor,
    k: Tensor,
    mask: SampledMask,
    admissible: Tensor,
    summary: Tensor,
    sampling: Sampling,
    scale: float,
    workspace: Size,
) -> Tensor:
    """Largest log-probability of the sampled pairs of each block pair: fp32 ``[B, P, Nq, Nk]``.

    ``max(score) - logsumexp(scores of the query)`` ranks as the probabilities do and never underflows.

    Args:
        q, k: pooled and sampled, ``[B, P, sampled queries, D]`` and ``[B, P, sampled keys, D]``; where queries are
            chosen, q has all of them.
        mask: at the sampled queries and keys; where queries are chosen, its clauses are those of all queries.
        admissible, summary: bool ``[b, p, Nq, Nk]`` and int32 ``[b, p, Nq, 7]``, the blocks that the mask admits and
            their ``summarize_rows``: what a kernel may pass over. They say nothing that the mask does not.
        sampling: which queries and keys these are.
        scale: factor of the scores.
        workspace: bytes that a kernel may take for its intermediate results.

    Returns:
        Scores; -inf for a block pair without an admissible sampled pair, NaN where the inputs were not finite.
    """
    q_cell, k_cell, key_step, chosen = sampling
    if chosen is not None:
        q = q.gather(2, chosen[..., None].expand(-1, -1, -1, q.shape[3]))
        mask = mask.at(chosen)
    batch, proxies, num_queries, _ = q.shape
    num_keys = k.shape[2]
    num_blocks = -(-num_keys // k_cell)
    keys, queries = k.float(), q.float() * scale
    rows_per_chunk = max(1, CHUNK_ELEMENTS // (batch * proxies * num_blocks * q_cell * k_cell)) * q_cell
    out = queries.new_full((batch, proxies, -(-num_queries // q_cell), num_blocks), -torch.inf)
    for start in range(0, num_queries, rows_per_chunk):
        rows = slice(start, min(start + rows_per_chunk, num_queries))
        seen, certain = mask.reach(rows, num_keys, key_step)
        blocks = slice(seen.start // k_cell, -(-seen.stop // k_cell))
        part = slice(blocks.start * k_cell, min(blocks.stop * k_cell, num_keys))
        if part.start >= part.stop:
            continue
        # Keys come first: reductions over them, and over those of a block, then add rows as vectors.
        logits = keys[:, :, part] @ queries[:, :, rows].mT  # [B, P, keys, rows]
        for side in uncertain(part, certain):
            ok = mask.chunk(rows, side, key_step, (q_cell, k_cell))
            logits[:, :, side.start - part.start : side.stop - part.start].masked_fill_(~ok.mT, -torch.inf)
        by_block: Tensor = pad_to_multiple(logits, -2, k_cell, -torch.inf).unflatten(-2, (-1, k_cell))
        row_max = by_block.amax(-2)  # [B, P, blocks, rows]
        lse = logsumexp_(logits, row_max.amax(-2))[..., None, :]
        relative = (row_max - lse).masked_fill_(row_max == -torch.inf, -torch.inf)
        relative = pad_to_multiple(relative, -1, q_cell, -torch.inf).unflatten(-1, (-1, q_cell)).amax(-1)
        out[:, :, start // q_cell : -(-rows.stop // q_cell), blocks] = relative.mT
    return out
