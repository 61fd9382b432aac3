"""The method as a specification: dense, in double precision, a loop where a loop is clearest. Not fast, not for use.

Shares no arithmetic with the fast path, and is what the fast path is tested against. Follows the paper (arXiv
2509.24745); what the paper leaves open is marked [ours]. ``allowed`` is always the caller's mask for token pairs.
"""

from __future__ import annotations

import bisect
import itertools
import math

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from flexproxy.masks.structure import MaskMod

Groups = list[list[int]]


def token_mask(mask_mod: MaskMod, batch: int, heads: int, num_queries: int, num_keys: int, device: str) -> Tensor:
    """The mask for token pairs: bool ``[B, Hq, Sq, Skv]``."""
    mask: Tensor = create_mask(mask_mod, batch, heads, num_queries, num_keys, device=device)
    return mask.expand(batch, heads, num_queries, num_keys)


def listed(allowed: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    """The lists of a caller's BlockMask are part of its mask [ours]. blocks: bool ``[B, Hq, Nq, Nk]``."""
    rows, columns = (torch.arange(length) // block_size for length in allowed.shape[-2:])
    return allowed & blocks[:, :, rows[:, None], columns]


def classify(allowed: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Blocks with any allowed pair, and with all pairs existing and allowed: bool ``[B, Hq, Nq, Nk]`` each."""
    num_queries, num_keys = allowed.shape[-2:]
    padded = torch.zeros(
        *allowed.shape[:2],
        -(-num_queries // block_size) * block_size,
        -(-num_keys // block_size) * block_size,
        dtype=torch.int32,
    )
    padded[..., :num_queries, :num_keys] = allowed
    pairs = reduce(padded, "b h (i x) (j y) -> b h i j", "sum", x=block_size, y=block_size)
    return pairs > 0, pairs == block_size**2


def groups_of(num_proxies: int, num_q_heads: int) -> Groups:
    """Query heads of each proxy: equal runs of consecutive heads."""
    size = num_q_heads // num_proxies
    return [list(range(p * size, (p + 1) * size)) for p in range(num_proxies)]


def key_groups(groups: Groups, num_q_heads: int, num_kv_heads: int) -> Groups:
    """Key heads that the query heads of each group use, each once."""
    return [sorted({head * num_kv_heads // num_q_heads for head in heads}) for heads in groups]


def pool_heads(x: Tensor, groups: Groups, stride: int) -> Tensor:
    """Mean of each group's heads at the first token of every window of ``stride``: ``[B, P, ceil(S / stride), D]``."""
    sampled = x[:, :, torch.arange(0, x.shape[2], stride)].double()
    return torch.stack([sampled[:, heads].mean(1) for heads in groups], 1).to(x.dtype)


def outlying_queries(q: Tensor, valid: Tensor, window: int, neighbours: int = 128) -> Tensor:
    """The query of every window farthest from the mean of its valid neighbours: int64 ``[B, P, windows]``. [ours]

    q ``[B, P, Sq, D]``, valid ``[B, P, Sq]``. Neighbours: those in the same ``neighbours`` tokens. Equals go to the
    first; then come distances that are not a number; then queries that are not valid.
    """
    batch, proxies, length, _ = q.shape
    windows = [range(start, min(start + window, length)) for start in range(0, length, window)]
    chosen = torch.zeros(batch, proxies, len(windows), dtype=torch.int64)
    for b in range(batch):
        for p in range(proxies):
            for n, tokens in enumerate(windows):
                first = tokens[0] // neighbours * neighbours
                around = [t for t in range(first, min(first + neighbours, length)) if valid[b, p, t]]
                mean = q[b, p, around].double().mean(0)
                candidates = [t for t in tokens if valid[b, p, t]]
                distance = {t: float((q[b, p, t].double() - mean).square().sum()) for t in candidates}
                numbers = [t for t in candidates if not math.isnan(distance[t])]
                chosen[b, p, n] = max(numbers, key=distance.__getitem__) if numbers else (candidates or tokens)[0]
    return chosen


def block_scores(q: Tensor, k: Tensor, allowed: Tensor, cell: tuple[int, int], scale: float) -> Tensor:
    """Largest log-probability of the sampled pairs of each block pair: fp64 ``[B, P, Nq, Nk]``, -inf where none.

    q ``[B, P, Mq, D]``, k ``[B, P, Mk, D]``, allowed ``[B, P, Mq, Mk]``; ``cell``: sampled queries and keys a block.
    """
    scores = scale * torch.einsum("bpqd,bpkd->bpqk", q.double(), k.double())
    scores = scores.masked_fill(~allowed, -math.inf)
    log_probability = torch.log_softmax(scores, -1).masked_fill(~allowed, -math.inf)
    num_queries, num_keys = allowed.shape[-2:]
    x, y = cell
    padded = log_probability.new_full((*allowed.shape[:2], -(-num_queries // x) * x, -(-num_keys // y) * y), -math.inf)
    padded[..., :num_queries, :num_keys] = log_probability
    return reduce(padded, "b p (i x) (j y) -> b p i j", "max", x=x, y=y)


def labels_of(allowed: Tensor, known: bool) -> tuple[Tensor, Tensor]:
    """Sequences where the mask has no documents [ours]: int ``[B, Sq]`` and ``[B, Skv]``, the label 0; -1 is none.

    Every key is of the sequence, or, where nothing is ``known`` of the mask, every key that some query of a head sees.
    """
    batch, _, num_queries, num_keys = allowed.shape
    seen = torch.ones(batch, num_keys, dtype=torch.bool) if known else allowed.any(1).any(1)
    return torch.zeros(batch, num_queries, dtype=torch.int64), torch.where(seen, 0, -1)


def sinks(allowed: Tensor, q_label: Tensor, k_label: Tensor, block_size: int) -> Tensor:
    """The first block of every row's sequence [ours]: int ``[B, H, Nq]``; Nk where no query of the row has one.

    Labels: int ``[B, Sq]``, ``[B, Skv]``; negative is none. Of the valid queries of a row, the first sequence counts.
    """
    batch, heads, num_queries, num_keys = allowed.shape
    num_blocks = -(-num_keys // block_size)
    first = torch.full((batch, heads, -(-num_queries // block_size)), num_blocks)
    for b in range(batch):
        labels = k_label[b].tolist()
        for h in range(heads):
            for query in allowed[b, h].any(-1).nonzero().flatten().tolist():
                label = int(q_label[b, query])
                if label >= 0 and label in labels:
                    row = first[b, h, query // block_size]
                    row.clamp_(max=labels.index(label) // block_size)
    return first


def probe_masses(q: Tensor, k: Tensor, allowed: Tensor, block_size: int, scale: float) -> Tensor:
    """Mass of every key block over the last ``block_size`` valid queries of each sequence: fp64 ``[B, Hq, Nk]``.

    Of a document: with ``allowed`` for its own queries alone.
    """
    batch, num_q_heads = q.shape[:2]
    num_blocks = -(-k.shape[2] // block_size)
    masses = torch.zeros(batch, num_q_heads, num_blocks * block_size, dtype=torch.float64)
    for b in range(batch):
        for h in range(num_q_heads):
            rows = allowed[b, h].any(-1).nonzero().flatten()[-block_size:]
            if len(rows):
                key_head = h * k.shape[1] // num_q_heads
                scores = scale * q[b, h, rows].double() @ k[b, key_head].double().T
                probability = scores.masked_fill(~allowed[b, h, rows], -math.inf).softmax(-1)
                masses[b, h, : k.shape[2]] = probability.mean(0)
    return reduce(masses, "b h (j y) -> b h j", "sum", y=block_size)


def budgets(
    masses: Tensor, gamma: float, min_budget: int, max_budget: int | None, block_size: int, forced: Tensor
) -> Tensor:
    """Blocks that each head keeps: int ``[B, Hq]``. forced ``[B, Hq]``: most forced blocks of a row [ours].

    Of a document [ours]: with the masses of the blocks that hold its keys.
    """
    batch, num_heads, num_blocks = masses.shape
    counts = torch.zeros(batch, num_heads, dtype=torch.int32)
    for b in range(batch):
        for h in range(num_heads):
            total, needed = 0.0, 0
            for mass in masses[b, h].sort(descending=True).values.tolist():
                total, needed = total + mass, needed + 1
                if total >= gamma:
                    break
            if gamma == 1.0:
                needed = num_blocks
            needed = max(needed, math.ceil(min_budget / block_size))
            if max_budget is not None:
                needed = min(needed, max_budget // block_size)
            counts[b, h] = min(max(needed, int(forced[b, h])), num_blocks)
    return counts


def last_rows(allowed: Tensor, q_label: Tensor, block_size: int, number: int) -> Tensor:
    """The last ``number`` rows of blocks of every sequence [ours], by valid queries: bool ``[B, H, Nq]``.

    Rows without a query of the sequence are none of its. q_label: int ``[B, Sq]``; negative is no sequence.
    """
    batch, heads, num_queries = allowed.shape[:3]
    last = torch.zeros(batch, heads, -(-num_queries // block_size), dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            valid = allowed[b, h].any(-1)
            for label in set(q_label[b].tolist()) - set(range(-num_queries, 0)):
                rows = (valid & (q_label[b] == label)).nonzero().flatten() // block_size
                if len(rows):
                    last[b, h, rows[rows > rows[-1] - number]] = True
    return last


def row_counts(count: dict[int, Tensor], q_label: Tensor, dense: Tensor, num_k_blocks: int, block_size: int) -> Tensor:
    """Blocks that each row keeps [ours]: int32 ``[B, Hq, Nq]``.

    A row has the counts of its documents, by label ``[B, Hq]``, in sum; dense rows ``[B, Hq, Nq]`` have Nk.
    q_label: int ``[B, Hq, Sq]``; negative is none.
    """
    counts = torch.zeros(dense.shape, dtype=torch.int32)
    for b, h, i in itertools.product(*map(range, dense.shape)):
        for label in set(q_label[b, h, i * block_size : (i + 1) * block_size].tolist()):
            if label >= 0:
                counts[b, h, i] += count[label][b, h]
    return torch.where(dense, num_k_blocks, counts.clamp(max=num_k_blocks)).to(torch.int32)


def forced(
    offset: list[int], admissible: Tensor, sink: Tensor, num_queries: int, block_size: int, sink_blocks: int, local: int
) -> Tensor:
    """Forced blocks [ours], where they are admissible: bool ``[B, H, Nq, Nk]``, as ``admissible``.

    Query i of sequence b stands at key position i + offset[b]. Where that is past what the row may see, the queries of
    the row stand in the last two blocks that it may see, or before. sink: int ``[B, H, Nq]`` of ``sinks``.
    """
    result = torch.zeros_like(admissible)
    for b in range(admissible.shape[0]):
        for h in range(admissible.shape[1]):
            for i in range(admissible.shape[2]):
                seen = admissible[b, h, i].nonzero().flatten().tolist()
                if not seen:
                    continue
                queries = range(i * block_size, min((i + 1) * block_size, num_queries))
                own = [(query + offset[b]) // block_size for query in queries]
                first, last = min(own), max(own)
                if last > seen[-1]:
                    first, last = min(first, seen[-1] - 1), seen[-1]
                begin = int(sink[b, h, i])
                for j in seen:
                    result[b, h, i, j] = first - local < j <= last or begin <= j < begin + sink_blocks
    return result


def rank_blocks(scores: Tensor, admissible: Tensor, forced: Tensor) -> Tensor:
    """Rank of every block in its row: int32 ``[B, P, Nq, Nk]``.

    The order [ours]: forced, scored by score, unscored, inadmissible; equals by index.
    """
    rank = torch.zeros(scores.shape, dtype=torch.int32)
    for b in range(scores.shape[0]):
        for p in range(scores.shape[1]):
            for i in range(scores.shape[2]):
                row = scores[b, p, i].tolist()

                def place(j: int, b: int = b, p: int = p, i: int = i, row: list[float] = row) -> tuple[int, float, int]:
                    if not admissible[b, p, i, j]:
                        return 3, 0.0, j
                    if forced[b, p, i, j]:
                        return 0, 0.0, j
                    return (2, 0.0, j) if row[j] == -math.inf else (1, -row[j], j)

                for r, j in enumerate(sorted(range(len(row)), key=place)):
                    rank[b, p, i, j] = r
    return rank


def walk(rank: Tensor, admissible: Tensor, forced: Tensor) -> list[int]:
    """The blocks that a row of a head may see, in the order in which it keeps them: its own forced ones first [ours].

    rank, admissible, forced: ``[Nk]`` of the row; the rank is that of its proxy.
    """
    own = admissible.nonzero().flatten().tolist()
    return sorted(own, key=lambda j: (not forced[j], int(rank[j])))


def select(rank: Tensor, count: Tensor, groups: Groups, admissible: Tensor, forced: Tensor) -> Tensor:
    """The blocks that every head keeps: bool ``[B, Hq, Nq, Nk]``.

    A head walks the ranking of its proxy over its own admissible blocks, and keeps ``count [B, Hq, Nq]`` of them. Where
    the heads of a proxy see the same blocks: admissible & (rank < count).
    """
    selected = torch.zeros_like(admissible)
    for proxy, heads in enumerate(groups):
        for b, h, i in itertools.product(range(len(rank)), heads, range(rank.shape[2])):
            own = walk(rank[b, proxy, i], admissible[b, h, i], forced[b, h, i])
            selected[b, h, i, own[: int(count[b, h, i])]] = True
    return selected


def share(
    scores: Tensor, rank: Tensor, groups: Groups, admissible: Tensor, forced: Tensor, dense: Tensor, total: list[int],
    bounds: tuple[int, int | None],
) -> Tensor:  # fmt: skip
    """Blocks that each row keeps where all rows of a sequence share ``total`` by their scores [ours]: int32
    ``[B, Hq, Nq]``; dense rows ``[B, Hq, Nq]`` have Nk.

    As it walks, a row has its first blocks in any case: the least of the bounds, its head's most forced ones, one. Of
    the rest up to the most, it has those whose scores reach the threshold of the sequence, in steps of 1/64 from 0 to
    -64. That is where the sequence keeps nearest to its total; of two as near, the fewer.
    """
    counts = torch.zeros_like(dense, dtype=torch.int32)
    least, most = bounds[0], rank.shape[-1] if bounds[1] is None else bounds[1]

    def steps(score: float) -> int:
        return 4095 if math.isnan(score) else 1 + math.floor(min(max(-64 * score, 0.0), 4094.0))

    for b in range(len(rank)):
        rows: dict[tuple[int, int], list[int]] = {}
        for p, heads in enumerate(groups):
            for h, i in itertools.product(heads, range(rank.shape[2])):
                own = walk(rank[b, p, i], admissible[b, h, i], forced[b, h, i])
                most_forced, row = int(forced[b, h].sum(-1).max()), scores[b, p, i].tolist()
                first = len(own) if dense[b, h, i] else max(least, most_forced, 1)
                rows[h, i] = [0] * len(own[:first]) + [steps(row[j]) for j in own[first : max(most, most_forced)]]
        every = sorted(itertools.chain(*rows.values()))
        last = min([0, *every], key=lambda step, b=b: abs(bisect.bisect(every, step) - total[b]))  # type: ignore[misc]
        for (h, i), row in rows.items():
            counts[b, h, i] = sum(step <= last for step in row)
    return torch.where(dense, rank.shape[-1], counts).to(torch.int32)


def attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Dense attention under a mask of token pairs, fp64 ``[B, Hq, Sq, D]``; rows without an allowed key are 0."""
    size = q.shape[1] // k.shape[1]
    k, v = (repeat(x.double(), "b h s d -> b (h g) s d", g=size) for x in (k, v))
    scores = (scale * q.double() @ rearrange(k, "b h s d -> b h d s")).masked_fill(~allowed, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v
