"""Other choices of blocks for about the same time, to be measured one by one beside flexproxy's on the same kernel.

Each is a function of q, k and ``min_budget`` to levels (NOTE [Levels] in ``benchmarks.baselines.blocks``), in plain
PyTorch. What helps on the real models goes into the package; the others stay here with their figures in
NOTEBOOK.md. A name says what is scored: ``kv`` are queries and keys pooled to one proxy for each key/value head,
``all`` every query head by itself; ``16:4`` every 16th query and 4th key. ``max`` is the paper's score, the largest
probability of a pair; ``sums`` the largest of a query's sum over a block; ``mass`` the sum over all pairs. Blocks are
kept by the paper's counts, one for each head, unless a rule says otherwise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.blocks import (
    BLOCK_SIZE,
    CHUNK_ELEMENTS,
    FORCED,
    budget_levels,
    causal_blocks,
    cover_levels,
    forced_blocks,
    grouped_logits,
    pool_blocks,
    probe_masses,
    widen,
)

NEVER = torch.inf
USUAL = 1, 2, 1  # first blocks, recent ones and dense last rows that are forced
SEGMENTS, PER_SEGMENT = 8, 16  # of probes that are spread
Scores = Callable[[Tensor, Tensor], Tensor]


# Scores: q and k to [B, Hq or a divisor of it, N, N], logarithms


def pooled(x: Tensor, heads: int) -> Tensor:
    """Means over runs of heads: ``[B, H, S, D]`` to ``[B, heads, S, D]``."""
    mean: Tensor = x.unflatten(1, (heads, -1)).mean(2, dtype=torch.promote_types(x.dtype, torch.float32))
    return mean.to(x.dtype)


def sampled(q: Tensor, k: Tensor, strides: tuple[int, int], reduction: str, block_size: int = BLOCK_SIZE) -> Tensor:
    """Scores of every ``strides[0]``-th query and ``strides[1]``-th key, -inf above the diagonal.

    q: ``[B, P, S, D]``, k ``[B, P or a divisor of it, S, D]``. reduction: ``max``, ``sums`` or ``mass``.
    """
    batch, heads, length, head_dim = q.shape
    num_blocks = -(-length // block_size)
    q_position, k_position = (torch.arange(0, length, stride, device=q.device) for stride in strides)
    q_cell, k_cell = (block_size // stride for stride in strides)
    queries, keys = q[:, :, :: strides[0]], k[:, :, :: strides[1]]
    out = []
    step = max(1, CHUNK_ELEMENTS // (batch * heads * num_blocks * q_cell * k_cell))
    for start in range(0, num_blocks, step):
        rows = slice(start * q_cell, (start + step) * q_cell)
        logits = widen(grouped_logits(queries[:, :, rows], keys)) / math.sqrt(head_dim)
        logits = logits.masked_fill_(k_position > q_position[rows, None], -torch.inf)
        total = logits.logsumexp(-1, keepdim=True)
        blocks = F.pad(logits, (0, -logits.shape[-1] % k_cell), value=-torch.inf).unflatten(-1, (-1, k_cell))
        by_query = (blocks.amax(-1) if reduction == "max" else blocks.logsumexp(-1)) - total
        by_query = F.pad(by_query, (0, 0, 0, -by_query.shape[2] % q_cell), value=-torch.inf).unflatten(2, (-1, q_cell))
        out.append(by_query.logsumexp(3) if reduction == "mass" else by_query.amax(3))
    return torch.cat(out, 2)


def by_heads(kind: str, strides: tuple[int, int], reduction: str) -> Scores:
    """``sampled`` with one proxy for each key head (``kv``), or with every query head by itself (``all``)."""

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return sampled(pooled(q, k.shape[1]) if kind == "kv" else q, k, strides, reduction)

    return scores


def mean_keys(q: Tensor, k: Tensor) -> Tensor:
    """Every 4th query of every head with the mean key of each block, as FlashPrefill: the largest share of a query."""
    num_blocks = -(-q.shape[2] // BLOCK_SIZE)
    block = torch.arange(num_blocks, device=q.device)
    logits = widen(grouped_logits(q[:, :, ::4], pool_blocks(k, BLOCK_SIZE))) / math.sqrt(q.shape[3])
    row = torch.arange(0, q.shape[2], 4, device=q.device) // BLOCK_SIZE
    share = logits.masked_fill_(block > row[:, None], -torch.inf).log_softmax(-1)
    cell = BLOCK_SIZE // 4
    share = F.pad(share, (0, 0, 0, -share.shape[2] % cell), value=-torch.inf)
    best: Tensor = share.unflatten(2, (-1, cell)).amax(3)
    return best


def larger(first: Scores, second: Scores) -> Scores:
    """The larger of two scores of a block; each may be of fewer heads."""

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return torch.maximum(*(to_heads(score(q, k), q.shape[1]) for score in (first, second)))

    return scores


def with_probe_columns(score: Scores) -> Scores:
    """The larger of a score and what the last queries of the head itself give the block: known from the budgets."""

    def scores(q: Tensor, k: Tensor) -> Tensor:
        columns = probe_masses(q, k, BLOCK_SIZE).log()[..., None, :]
        return torch.maximum(to_heads(score(q, k), q.shape[1]), columns)

    return scores


def with_probe_row(score: Scores) -> Scores:
    """The exact masses of the last queries instead of the score of their row of blocks."""

    def scores(q: Tensor, k: Tensor) -> Tensor:
        found = to_heads(score(q, k), q.shape[1]).clone()
        found[:, :, -1] = probe_masses(q, k, BLOCK_SIZE).log()
        return found

    return scores


def to_heads(scores: Tensor, num_heads: int) -> Tensor:
    return scores.repeat_interleave(num_heads // scores.shape[1], 1)


# Rules: scores to levels


def counts(q: Tensor, k: Tensor, scores: Tensor, always: Tensor, at_least: int) -> Tensor:
    """One count for each head, of its last queries: the paper's."""
    return budget_levels(scores, probe_masses(q, k, BLOCK_SIZE), always, at_least)


def spread_counts(q: Tensor, k: Tensor, scores: Tensor, always: Tensor, at_least: int) -> Tensor:
    """One count for each head, of as many queries in eight places of the sequence: the mean of what each reaches."""
    length = q.shape[2]
    ends = torch.arange(1, SEGMENTS + 1, device=q.device) * length // SEGMENTS
    place = (ends[:, None] - torch.arange(PER_SEGMENT, 0, -1, device=q.device)).flatten()
    key = torch.arange(length, device=q.device)
    logits = widen(grouped_logits(q[:, :, place], k)) / math.sqrt(q.shape[3])
    probability = logits.masked_fill_(key > place[:, None], -torch.inf).softmax(-1)
    masses = F.pad(probability, (0, -length % BLOCK_SIZE)).unflatten(-1, (-1, BLOCK_SIZE)).sum(-1)
    masses = masses.unflatten(2, (SEGMENTS, PER_SEGMENT)).mean(3).sort(dim=-1, descending=True).values.mean(2)
    return budget_levels(scores, masses, always, at_least)


def changing_counts(q: Tensor, k: Tensor, scores: Tensor, always: Tensor, at_least: int, power: float) -> Tensor:
    """Counts that go with a power of a row's length: 1 keeps the same share of every row, 0 is the paper's."""
    num_blocks = scores.shape[-1]
    causal = causal_blocks(num_blocks, q.device)
    cumulative = probe_masses(q, k, BLOCK_SIZE).sort(dim=-1, descending=True).values.cumsum(-1)
    keys = scores.masked_fill(always, torch.inf).masked_fill(~causal, -torch.inf)
    order = keys.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(num_blocks, device=q.device)
    rank = torch.empty_like(order).scatter_(-1, order, rank.expand_as(order))
    share = (torch.arange(1, num_blocks + 1, device=q.device) / num_blocks) ** power  # of the last row's count
    last = (rank / share[:, None]).floor().long().clamp(max=num_blocks)  # the same rank in the last row
    before = F.pad(cumulative, (1, 0))[..., None, :].expand(*rank.shape[:3], -1).gather(-1, last)
    levels = before.masked_fill_(rank < max(1, at_least), FORCED).masked_fill_(always, FORCED)
    return levels.masked_fill_(~causal, NEVER)


def threshold(q: Tensor, k: Tensor, scores: Tensor, always: Tensor, at_least: int) -> Tensor:
    """One threshold over all rows and heads."""
    causal = causal_blocks(scores.shape[-1], q.device)
    keys = scores.masked_fill(always, torch.inf).masked_fill(~causal, -torch.inf)
    first = keys.topk(min(at_least, keys.shape[-1]), -1).indices
    levels = scores.neg().clamp(min=0.0, max=1e30).scatter(-1, first, FORCED).masked_fill_(always, FORCED)
    return levels.masked_fill_(~causal, NEVER)


def by_row(q: Tensor, k: Tensor, scores: Tensor, always: Tensor, at_least: int) -> Tensor:
    """The fewest blocks of every row that hold a share of its scores."""
    causal = causal_blocks(scores.shape[-1], q.device)
    mass = scores.masked_fill(~causal, -torch.inf).exp()
    return cover_levels(mass, always, at_least).masked_fill_(~causal, NEVER)


Rule = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def trial(
    q: Tensor,
    k: Tensor,
    score: Scores,
    rule: Rule = counts,
    forced: tuple[int, int, int] = USUAL,
    min_budget: int = 2048,
) -> Tensor:
    """Levels of a score under a rule."""
    scores = to_heads(score(q, k), q.shape[1])
    always = forced_blocks(scores.shape[-1], *forced, q.device)
    at_least = max(-(-min_budget // BLOCK_SIZE), forced[0] + forced[1])
    return rule(q, k, scores, always, at_least)


def _trial(score: Scores, rule: Rule = counts, forced: tuple[int, int, int] = USUAL) -> functools.partial[Tensor]:
    return functools.partial(trial, score=score, rule=rule, forced=forced)


_KV = by_heads("kv", (4, 4), "max")
_KV_SUMS = by_heads("kv", (4, 4), "sums")
_ALL_SUMS = by_heads("all", (16, 4), "sums")
TRIALS: dict[str, Callable[..., Tensor]] = {
    "kv 4:4 max": _trial(_KV),  # flexproxy's own
    "kv 4:4 sums": _trial(_KV_SUMS),
    "kv 4:4 mass": _trial(by_heads("kv", (4, 4), "mass")),
    "kv 8:2 sums": _trial(by_heads("kv", (8, 2), "sums")),
    "all 8:8 sums": _trial(by_heads("all", (8, 8), "sums")),
    "all 16:4 max": _trial(by_heads("all", (16, 4), "max")),
    "all 16:4 sums": _trial(_ALL_SUMS),
    "all, mean keys": _trial(mean_keys),
    "kv 4:4 and all 16:8, sums": _trial(larger(_KV_SUMS, by_heads("all", (16, 8), "sums"))),
    "kv 4:4 sums, probe columns": _trial(with_probe_columns(_KV_SUMS)),
    "kv 4:4 sums, threshold": _trial(_KV_SUMS, threshold),
    "all 8:8 sums, threshold": _trial(by_heads("all", (8, 8), "sums"), threshold),
    "all 16:4 sums, threshold": _trial(_ALL_SUMS, threshold),
    "all 16:4 max, threshold": _trial(by_heads("all", (16, 4), "max"), threshold),
    "all 4:4 sums, threshold": _trial(by_heads("all", (4, 4), "sums"), threshold),
    "all 16:4 sums, by row": _trial(_ALL_SUMS, by_row),
    "all 8:8 sums, by row": _trial(by_heads("all", (8, 8), "sums"), by_row),
    "kv 4:4 sums, by row": _trial(_KV_SUMS, by_row),
    "all, mean keys, threshold": _trial(mean_keys, threshold),
    "kv 4:4 and all 16:8, sums, threshold": _trial(larger(_KV_SUMS, by_heads("all", (16, 8), "sums")), threshold),
    "kv 4:4 max, spread probes": _trial(_KV, spread_counts),
    "kv 4:4 max, counts rise": _trial(_KV, functools.partial(changing_counts, power=0.5)),
    "kv 4:4 max, counts by length": _trial(_KV, functools.partial(changing_counts, power=1.0)),
    "kv 4:4 max, counts fall": _trial(_KV, functools.partial(changing_counts, power=-0.5)),
    "kv 4:4 max, no dense row": _trial(_KV, forced=(1, 2, 0)),
    "kv 4:4 max, last row by the probe": _trial(with_probe_row(_KV), forced=(1, 2, 0)),
    "kv 4:4 max, nothing forced": _trial(_KV, forced=(0, 1, 0)),
}
