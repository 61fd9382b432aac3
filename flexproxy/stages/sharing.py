"""Stage 3 with one budget for a sequence: its rows and heads share it by their scores (ours, not the paper's).

Where every head has scores of its own, they say more than which block of a row is better: how much any block matters,
beside those of other rows and heads. So one threshold on them decides, and as many blocks are kept as one count for
each head would keep. See ``sharing`` in ProxyConfig.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexproxy.ops import row_summary
from flexproxy.ops.operators import Output, Size, operator
from flexproxy.ops.tensors import BINS_PER_UNIT, NUM_BINS

CHUNK_ELEMENTS = 2**24  # blocks that are counted at a time


def total_blocks(summary: Tensor, count: Tensor | None, shape: tuple[int, ...], density: float | None) -> Tensor:
    """Blocks that all rows and heads of a sequence are to keep together: int64 ``[B]``.

    Args:
        summary: int32 ``[b, h, Nq, 7]`` of ``summarize_rows``, of the heads.
        count: int32 ``[B, Hq, Nq]``, one count for each head: as many as these keep; or None, and
        density: the share of the admissible blocks, rounded down.
        shape: B, Hq.
    """
    number = summary[..., row_summary.NUMBER].expand(*shape, -1)
    if density is None:
        return torch.minimum(number, count).sum((1, 2))  # type: ignore[arg-type]
    return (number.sum((1, 2)).to(torch.float64) * density).to(torch.int64)


def _shape_of_counts(a: Any) -> Output:
    return (a.scores.shape[0], a.proxy_of.shape[0], a.scores.shape[2]), torch.int32


@operator(_shape_of_counts)
def shared_counts(
    scores: Tensor, rank: Tensor, proxy_of: Tensor, summary: Tensor, forced: Tensor, total: Tensor, min_blocks: int,
    max_blocks: Size,
) -> Tensor:  # fmt: skip
    """How many blocks every row keeps: int32 ``[B, Hq, Nq]``; dense rows keep Nk.

    A row has its best ``max(forced, min_blocks, 1)`` blocks in any case, and then those whose scores, in steps of 1/64,
    reach a threshold; with it the sequence comes nearest to its total, and of two that are as near keeps less. As ranks
    go by scores, what a row keeps are its best blocks. A batch row of packed documents is one sequence.

    Args:
        scores, rank: fp32 and int32 ``[B, P, Nq, Nk]`` of ``block_scores`` and ``rank_blocks``.
        proxy_of: int64 ``[Hq]``, which of the P every head has.
        summary: int32 ``[b, h, Nq, 7]`` of ``summarize_rows``, of the heads.
        forced: int32 ``[b, h]`` of ``forced_counts``.
        total: int64 ``[B]`` of ``total_blocks``.
        min_blocks, max_blocks: that a row keeps at least and at most; not of dense rows.
    """
    number, dense = summary[..., row_summary.NUMBER], summary[..., row_summary.DENSE] != 0
    num_blocks = scores.shape[-1]

    def bound(blocks: int) -> Tensor:
        of_row = torch.where(dense, num_blocks, forced.clamp(min=blocks)[..., None])
        return torch.minimum(of_row, number)[..., None]

    bins = (scores * -BINS_PER_UNIT).masked_fill_(scores.isnan(), torch.inf).clamp_(0, NUM_BINS - 2)
    rank, bins = (x[:, proxy_of] for x in (rank, bins.to(torch.int16) + 1))
    bins = bins.masked_fill(rank < bound(max(min_blocks, 1)), 0).masked_fill_(rank >= bound(max_blocks), NUM_BINS)
    kept = total.new_zeros(len(bins), NUM_BINS + 1)
    for part in bins.flatten(1).split(CHUNK_ELEMENTS, 1):
        kept.scatter_add_(1, part.to(torch.int64), kept.new_ones(1, 1).expand(part.shape))
    distance = (kept[:, :-1].cumsum(1) - total[:, None]).abs()
    threshold = distance.argmin(1)[:, None, None, None]  # the first of equals
    return torch.where(dense, num_blocks, (bins <= threshold).sum(-1)).to(torch.int32)
