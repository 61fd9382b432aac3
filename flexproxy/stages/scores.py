"""Stage 2, unified scoring: one score for every block pair and proxy head (paper section 3.2, equation 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

from flexproxy.masks.sampled import SampledMask
from flexproxy.ops.operators import Size, operator
from flexproxy.ops.tensors import logsumexp_, pad_to_multiple

CHUNK_ELEMENTS = 2**24  # logits in one piece, 64 MiB


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
        admissible, summary: bool ``[b, p, Nq, Nk]`` and int32 ``[b, p, Nq, 5]``, the blocks that the mask admits and
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
    keys = k.float().transpose(-1, -2)
    queries = q.float()
    rows_per_chunk = max(1, CHUNK_ELEMENTS // (batch * proxies * num_blocks * q_cell * k_cell)) * q_cell
    out = []
    for start in range(0, num_queries, rows_per_chunk):
        rows = slice(start, min(start + rows_per_chunk, num_queries))
        ok = mask.chunk(rows, slice(0, num_keys), key_step, (q_cell, k_cell))
        logits = (queries[:, :, rows] @ keys).mul_(scale).masked_fill_(~ok, -torch.inf)  # [B, P, rows, keys]
        padded = pad_to_multiple(logits, -1, k_cell, -torch.inf)
        row_max = reduce(padded, "b p row (block key) -> b p row block", "max", key=k_cell)
        lse = logsumexp_(logits, row_max.amax(-1))[..., None]
        relative = (row_max - lse).masked_fill_(row_max == -torch.inf, -torch.inf)
        relative = pad_to_multiple(relative, -2, q_cell, -torch.inf)
        out.append(reduce(relative, "b p (q_block row) block -> b p q_block block", "max", row=q_cell))
    return torch.cat(out, 2)
