"""Stage 3, dynamic budgets: how many blocks each query head keeps (paper section 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexproxy.masks.sampled import SampledMask, uncertain
from flexproxy.ops import row_summary
from flexproxy.ops.operators import Size, operator
from flexproxy.ops.tensors import logsumexp_, pad_to_multiple

CHUNK_ELEMENTS = 2**20  # logits in one piece, 4 MiB, as for the scores


@operator(lambda a: ((*a.valid.shape[:2], a.number), torch.int64))
def last_valid_queries(valid: Tensor, number: int) -> Tensor:
    """Indices of the last ``number`` valid queries, in order: int64 ``[b, h, number]``; -1 where there are fewer.

    valid: bool ``[b, h, Sq]``.
    """
    from_end = valid.flip(-1).to(torch.int32).cumsum(-1).flip(-1)  # 1 for the last valid query
    slot = torch.where(valid & (from_end <= number), number - from_end, number).to(torch.int64)
    index = torch.arange(valid.shape[-1], device=valid.device).expand(slot.shape)
    empty = torch.full((*valid.shape[:-1], number + 1), -1, dtype=torch.int64, device=valid.device)
    return empty.scatter_(-1, slot, index)[..., :number].contiguous()  # all the others went to the last slot


@operator(lambda a: ((*a.q.shape[:2], -(-a.k.shape[2] // a.block_size)), torch.float32))
def block_masses(
    q: Tensor, k: Tensor, probes: Tensor, mask: SampledMask, summary: Tensor, block_size: int, scale: float
) -> Tensor:
    """Probability mass of every key block, the mean over the probed queries: fp32 ``[B, Hq, Nk]``.

    The masses of a head sum to 1. NaN counts as no mass.

    Args:
        q: all queries ``[B, Hq, Sq, D]``.
        k: all keys ``[B, Hkv, Skv, D]``.
        probes: int64 ``[b, h, m]``, which of the queries are probed; -1 is none.
        mask: by clauses at all queries and keys, or by bits at the probes and all keys.
        summary: int32 ``[b, h, Nq, 7]`` of ``summarize_rows``, of the heads: kernels evaluate the mask outside of the
            keys that it says all queries of a row see.
        block_size: tokens per block.
        scale: factor of the scores.
    """
    batch, num_q_heads, _, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1], k.shape[2]
    num_probes = probes.shape[2]
    present = probes >= 0
    place = probes.clamp(min=0)
    probed = q.gather(2, place.expand(batch, num_q_heads, -1)[..., None].expand(-1, -1, -1, head_dim))
    mask = mask.at(place).listed_at(place, block_size)
    every = slice(0, num_probes)
    queries = (probed.float() * scale).unflatten(1, (num_kv_heads, -1)).flatten(2, 3).mT  # [B, Hkv, D, G m]
    per_chunk = max(1, CHUNK_ELEMENTS // (batch * num_q_heads * num_probes * block_size)) * block_size
    _, certain = mask.reach(every, num_keys)
    parts = []
    for start in range(0, num_keys, per_chunk):
        keys = slice(start, min(start + per_chunk, num_keys))
        logits = k[:, :, keys].float() @ queries  # [B, Hkv, keys, G m], as in block_scores
        for side in uncertain(keys, certain):
            ok = mask.chunk(every, side, cell=(1, block_size))
            ok = ok.unflatten(1, (1, 1) if ok.shape[1] == 1 else (num_kv_heads, -1)).permute(0, 1, 4, 2, 3)
            piece = logits[:, :, side.start - start : side.stop - start].unflatten(-1, (-1, num_probes))
            piece.masked_fill_(~ok, -torch.inf)
        by_block: Tensor = pad_to_multiple(logits, -2, block_size, -torch.inf).unflatten(-2, (-1, block_size))
        parts.append(logsumexp_(by_block, by_block.amax(-2)))
    blocks: Tensor = torch.cat(parts, 2).unflatten(-1, (-1, num_probes)).permute(0, 1, 3, 4, 2).flatten(1, 2)
    probability = (blocks - blocks.logsumexp(-1, keepdim=True)).exp_().masked_fill_(~present[..., None], 0.0)
    return (probability.sum(2) / present.sum(2).clamp(min=1)[..., None]).nan_to_num_(0.0)


@operator(lambda a: ((*a.masses.shape[:2], a.summary.shape[2]), torch.int32))
def count_blocks(
    masses: Tensor, summary: Tensor, forced: Tensor, gamma: float, density: float | None, min_blocks: int,
    max_blocks: Size,
) -> Tensor:  # fmt: skip
    """How many blocks every row of a head keeps: int32 ``[B, Hq, Nq]``; dense rows keep Nk.

    Args:
        masses: fp32 ``[B, Hq, Nk]`` of ``block_masses``.
        summary: int32 ``[b, h, Nq, 7]`` of ``summarize_rows``, of the heads.
        forced, min_blocks, max_blocks: as in ``clip_counts``.
        gamma, density: as in ProxyConfig.
    """
    cumulative = cumulative_masses(masses)
    limit: float | Tensor = gamma
    if density is not None:
        limit = gamma_for_density(cumulative, summary, forced, density, min_blocks, max_blocks)
    num_blocks = masses.shape[-1]
    count = clip_counts(blocks_to_reach(cumulative, limit), forced, min_blocks, max_blocks, num_blocks)
    return rows_with_count(count, summary, num_blocks)


def rows_with_count(count: Tensor, summary: Tensor, num_blocks: int) -> Tensor:
    """The count of every row, from one for each head ``[B, Hq]``: int32 ``[B, Hq, Nq]``; dense rows have all."""
    return torch.where(summary[..., row_summary.DENSE] != 0, num_blocks, count[..., None]).to(torch.int32)


def cumulative_masses(masses: Tensor) -> Tensor:
    """Mass of the n + 1 heaviest blocks, for every n: fp32 ``[B, Hq, Nk]``."""
    return masses.sort(dim=-1, descending=True).values.cumsum(-1)


def blocks_to_reach(cumulative: Tensor, gamma: float | Tensor) -> Tensor:
    """The smallest number of blocks whose masses reach gamma, a number or ``[B, 1, 1]``: int32 ``[B, Hq]``."""
    return (cumulative < gamma).sum(-1, dtype=torch.int32) + 1


def clip_counts(count: Tensor, forced: Tensor, min_blocks: int, max_blocks: int, num_blocks: int) -> Tensor:
    """A head's count between its bounds: int32, broadcast over ``count`` and ``forced``.

    forced: int32, the most forced blocks that a row of the sequence has; they are always kept.
    """
    count = count.clamp(min=min_blocks, max=max_blocks)
    return torch.maximum(count, forced).clamp(max=num_blocks).to(torch.int32)


def gamma_for_density(
    cumulative: Tensor, summary: Tensor, forced: Tensor, density: float, min_blocks: int, max_blocks: int
) -> Tensor:
    """The one gamma of each sequence whose mean density over heads is nearest to the target: fp32 ``[B, 1, 1]``.

    Args:
        cumulative: ``[B, Hq, Nk]`` of ``cumulative_masses``.
        summary: int32 ``[b, h, Nq, 7]`` of ``summarize_rows``, of the heads.
        forced: as in ``clip_counts``, ``[b, h]``.
        density: the target, kept / admissible blocks.

    Returns:
        One of the values of ``cumulative`` (each head's count changes only there), or inf for every block.
    """
    num_heads, num_blocks = cumulative.shape[1:]
    rows, is_dense = summary[..., row_summary.NUMBER], summary[..., row_summary.DENSE] != 0
    # kept[c]: blocks that a head keeps with count c: all of its dense rows, min(c, admissible blocks) of the others.
    histogram = torch.zeros(*rows.shape[:2], num_blocks + 1, dtype=torch.float64, device=rows.device)
    histogram.scatter_add_(-1, rows.to(torch.int64), (~is_dense).to(torch.float64))
    rows_with_more = histogram.flip(-1).cumsum(-1).flip(-1)[..., 1:]  # [..., c]: rows with more than c blocks
    kept = F.pad(rows_with_more.cumsum(-1), (1, 0)) + (rows * is_dense).sum(-1, keepdim=True)
    count = torch.arange(num_blocks + 1, device=rows.device)
    clipped = clip_counts(count, forced[..., None], min_blocks, max_blocks, num_blocks).to(torch.int64)
    kept, clipped = torch.broadcast_tensors(kept, clipped)
    kept = kept.gather(-1, clipped)
    density_of = kept / rows.sum(-1, keepdim=True).clamp(min=1)  # [b, h, count]
    density_of = density_of.expand(cumulative.shape[0], num_heads, -1)

    # Past cumulative[n], a head that kept n + 1 blocks keeps n + 2. Walk through all these steps of all heads in order.
    step = F.pad(density_of[..., 2:] - density_of[..., 1:-1], (0, 1)).flatten(1) / num_heads
    threshold, order = cumulative.flatten(1).sort(dim=-1)
    before = F.pad(step.gather(1, order).cumsum(-1), (1, 0))[:, :-1]
    first_equal = torch.searchsorted(threshold, threshold)
    reached = density_of[..., 1].mean(1, keepdim=True) + before.gather(1, first_equal)
    everything = density_of[..., -1].mean(1, keepdim=True)
    distance = (torch.cat([reached, everything], 1) - density).abs()
    candidates = F.pad(threshold, (0, 1), value=torch.inf)
    return candidates.gather(1, distance.argmin(1, keepdim=True))[..., None]
