"""Stage 4, ranking: the order in which a row keeps its blocks (paper section 3.2; ties and forced blocks are ours)."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores are log-probabilities. These stand below every score that matters, and keep the classes apart.
_LOWEST_SCORE, _UNSCORED, _INADMISSIBLE = -1e38, -2e38, -torch.inf


def forced_blocks(
    offset: Tensor, admissible: Tensor, num_queries: int, block_size: int, sink_blocks: int, local_blocks: int
) -> Tensor:
    """Blocks that a row keeps in any case, where they are admissible: bool ``[b, p, Nq, Nk]``.

    The blocks in which the queries of the row stand themselves (two, where query blocks straddle key blocks), the
    ``local_blocks - 1`` before them, and the ``sink_blocks`` first. A mask may end before the position of a query, for
    example in a cache with free places behind: then the query stands in one of the last two blocks that it may see.

    Args:
        offset: int64 ``[b]``, the position of query 0 among the keys.
        admissible: bool ``[b, p, Nq, Nk]``.
    """
    num_q_blocks, num_k_blocks = admissible.shape[2:]
    block = torch.arange(num_k_blocks, device=offset.device)
    first_query = torch.arange(num_q_blocks, device=offset.device) * block_size
    last_query = (first_query + block_size - 1).clamp(max=num_queries - 1)
    first = (offset[:, None, None] + first_query).div(block_size, rounding_mode="floor")  # [b, 1, Nq]
    last = (offset[:, None, None] + last_query).div(block_size, rounding_mode="floor")
    end = torch.where(admissible, block, -1).amax(-1)  # [b, p, Nq]
    first = torch.where(last > end, torch.minimum(first, end - 1), first) - (local_blocks - 1)
    last = torch.minimum(last, end)
    return (block >= first[..., None]) & (block <= last[..., None]) | (block < sink_blocks)


def rank_blocks(scores: Tensor, admissible: Tensor, forced: Tensor) -> Tensor:
    """Rank of every block in its row, 0 first: int32 ``[B, P, Nq, Nk]``, each row a permutation of 0 .. Nk - 1.

    Forced blocks, then scored ones by score, then unscored ones, then inadmissible ones; equals by block index.

    Args:
        scores: fp32 ``[B, P, Nq, Nk]``, -inf where there is none; not-a-number counts as none.
        admissible: bool ``[b, p, Nq, Nk]``.
        forced: bool ``[b, p, Nq, Nk]``; an inadmissible block is not forced.
    """
    unscored = scores.isnan() | (scores == -torch.inf)
    key = scores.clamp(min=_LOWEST_SCORE).masked_fill(unscored, _UNSCORED)
    key = key.masked_fill(forced, torch.inf).masked_fill(~admissible, _INADMISSIBLE)
    order = key.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device).expand_as(order)
    return torch.empty_like(place, memory_format=torch.contiguous_format).scatter_(-1, order, place)
