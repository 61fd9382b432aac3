"""Stage 4, ranking: the order in which a row keeps its blocks (paper section 3.2; ties and forced blocks are ours)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexproxy.ops import row_summary
from flexproxy.ops.operators import Output, Size, operator

# Scores are log-probabilities. These stand below every score that matters, and keep the classes apart.
_LOWEST_SCORE, _UNSCORED, _INADMISSIBLE = -1e38, -2e38, -torch.inf


class ForcedRule(NamedTuple):
    """Which blocks are forced: those that a row keeps whatever their scores, where they are admissible.

    offset: integers ``[b]``, the position of query 0 among the keys.
    num_queries, block_size: in tokens. sink_blocks, local_blocks: as in ProxyConfig.
    """

    offset: Tensor
    num_queries: Size
    block_size: int
    sink_blocks: int
    local_blocks: int


def forced_blocks(rule: ForcedRule, summary: Tensor, num_k_blocks: int) -> Tensor:
    """Forced blocks: bool ``[b, h, Nq, Nk]``.

    The blocks that hold the positions of the row's own queries (two, where query blocks straddle key blocks), the
    ``local_blocks - 1`` before them, and the first ``sink_blocks`` of the row's sequence. A mask may end before the
    position of a query, for example in a cache with free space at its end: then the query counts as in one of the last
    two blocks that it may see.

    summary: int32 ``[b, h, Nq, 7]`` of ``summarize_rows``.
    """
    end, sink = summary[..., row_summary.END], summary[..., row_summary.SINK, None]
    offset, num_queries, block_size, sink_blocks, local_blocks = rule
    block = torch.arange(num_k_blocks, device=offset.device)
    first_query = torch.arange(end.shape[2], device=offset.device) * block_size
    last_query = (first_query + block_size - 1).clamp(max=num_queries - 1)
    first = (offset[:, None, None] + first_query).div(block_size, rounding_mode="floor")  # [b, 1, Nq]
    last = (offset[:, None, None] + last_query).div(block_size, rounding_mode="floor")
    first = torch.where(last > end - 1, torch.minimum(first, end - 2), first) - (local_blocks - 1)
    last = torch.minimum(last, end - 1)
    local = (block >= first[..., None]) & (block <= last[..., None])
    return local | (block >= sink) & (block < sink + sink_blocks)


@operator(lambda a: (a.scores.shape, torch.int32))
def rank_blocks(scores: Tensor, admissible: Tensor, summary: Tensor, rule: ForcedRule) -> Tensor:
    """Rank of every block in its row, 0 first: int32 ``[B, P, Nq, Nk]``, each row a permutation of 0 .. Nk - 1.

    Forced blocks, then scored ones by score, then unscored ones, then inadmissible ones; equals by block index.

    Args:
        scores: fp32 ``[B, P, Nq, Nk]``, -inf where there is none; NaN counts as none.
        admissible, summary: bool ``[b, p, Nq, Nk]``, and its ``summarize_rows``.
        rule: as in ``forced_blocks``.
    """
    num_k_blocks = scores.shape[-1]
    forced = forced_blocks(rule, summary, num_k_blocks)
    unscored = scores.isnan() | (scores == -torch.inf)
    key = scores.clamp(min=_LOWEST_SCORE).masked_fill(unscored, _UNSCORED)
    key = key.masked_fill(forced, torch.inf).masked_fill(~admissible, _INADMISSIBLE)
    order = key.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(num_k_blocks, dtype=torch.int32, device=scores.device).expand_as(order)
    return torch.empty_like(place, memory_format=torch.contiguous_format).scatter_(-1, order, place)


def _shape_of_forced_counts(a: Any) -> Output:
    return (max(len(a.admissible), len(a.rule.offset)), a.admissible.shape[1]), torch.int32


@operator(_shape_of_forced_counts)
def forced_counts(admissible: Tensor, summary: Tensor, rule: ForcedRule) -> Tensor:
    """The most forced blocks that a row of a head has: int32 ``[b, h]``.

    admissible, summary: bool ``[b, h, Nq, Nk]``, and its ``summarize_rows``.
    """
    forced = forced_blocks(rule, summary, admissible.shape[-1])
    return (forced & admissible).sum(-1, dtype=torch.int32).amax(-1)
