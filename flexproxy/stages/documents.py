"""Stage 3 for packed documents: each has the budget that it would have alone (ours, not the paper's).

NOTE [Documents in order]
Keys are put in order by document, and in a document by position: there a document is one run of keys, and so is each of
its *parts*, the keys that it has in one block. Its probes are its last ``block_size`` valid queries. They stand in the
same order, one document behind the other, so the probes that a tile of keys needs are one run, too. A document in one
block keeps it, and needs no probes. How many there are of anything, only the device knows: every tensor is as long as
it can be, Sq for probes, Skv for keys, parts and documents, and Skv is the number of a document that does not exist.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flexproxy.masks.clauses import dense_labels
from flexproxy.masks.sampled import SampledMask
from flexproxy.ops import row_summary
from flexproxy.ops.operators import Output, Size, operator
from flexproxy.ops.tensors import pad_to_multiple


class Documents(NamedTuple):
    """Where the documents of a mask lie; int64 but for ``counts``. See NOTE [Documents in order].

    key_order:      ``[b, Skv]``, the keys in order; behind them those of no document.
    key_document:   ``[b, Skv]``, the documents of these, ascending.
    key_begin:      ``[b, Skv + 1]``, where in that order the keys of each document begin.
    part_document:  ``[b, Skv]``, the document of each part.
    part_key:       ``[b, Skv + 1]``, where in the order of keys each part begins.
    part_begin:     ``[b, Skv + 1]``, the first part of each document.
    probes:         ``[b, h, Sq]``, which queries are probes, in order; behind them 0.
    probe_document: ``[b, h, Sq]``, the documents of these.
    probe_begin:    ``[b, h, Skv + 1]``, the first probe of each document.
    row_document:   ``[b, Nq, block_size]``, the document of every query.
    counts:         bool ``[b, h, Nq, block_size]``, the query is the first valid one of its document in its row.
    """

    key_order: Tensor
    key_document: Tensor
    key_begin: Tensor
    part_document: Tensor
    part_key: Tensor
    part_begin: Tensor
    probes: Tensor
    probe_document: Tensor
    probe_begin: Tensor
    row_document: Tensor
    counts: Tensor


def _shapes(a: Any) -> list[Output]:
    (b, h, num_queries), num_keys, size = a.valid.shape, a.k_label.shape[1], a.block_size
    b = max(b, a.q_label.shape[0], a.k_label.shape[0])
    keys, begins, probes = (b, num_keys), (b, num_keys + 1), (b, h, num_queries)
    blocks = -(-num_queries // size), size
    shapes = [keys, keys, begins, keys, begins, begins, probes, probes, (b, h, num_keys + 1), (b, *blocks)]
    return [*((shape, torch.int64) for shape in shapes), ((b, h, *blocks), torch.bool)]


@operator(_shapes, has_kernel=False)
def order_documents(valid: Tensor, q_label: Tensor, k_label: Tensor, block_size: int) -> Documents:
    """Find the documents.

    Args:
        valid: bool ``[b, h, Sq]``, the query has an allowed key.
        q_label, k_label: integers ``[b, Sq]`` and ``[b, Skv]``, equal within a document, negative in none.
        block_size: tokens per block.
    """
    num_queries, num_keys = valid.shape[2], k_label.shape[1]
    q_label, k_label = (torch.where(x < 0, num_keys, x) for x in dense_labels(q_label, k_label))
    batch, heads = max(len(valid), len(q_label)), valid.shape[1]
    q_label, k_label = q_label.expand(batch, -1), k_label.expand(batch, -1)
    number = torch.arange(num_keys + 1, device=valid.device)

    def begins(ordered: Tensor) -> Tensor:
        return torch.searchsorted(ordered, number.expand(*ordered.shape[:-1], -1).contiguous())

    key_document, key_order = k_label.sort(dim=-1, stable=True)
    new_document, new_block = (
        x.diff(dim=-1, prepend=x[:, :1] - 1) != 0 for x in (key_document, key_order // block_size)
    )
    part = (new_document | new_block & (key_document < num_keys)).cumsum(-1) - 1
    part_key = begins(part)
    part_document = key_document.gather(1, part_key[:, :-1].clamp(max=num_keys - 1))
    part_document = torch.where(part_key[:, :-1] < num_keys, part_document, num_keys)
    part_begin = begins(part_document)

    q_document = torch.where(valid, q_label[:, None], num_keys)
    ordered, order = q_document.sort(dim=-1, stable=True)
    q_begin = begins(ordered)
    num_probes = torch.where((part_begin.diff() > 1)[:, None], q_begin.diff().clamp(max=block_size), 0)
    probe_begin = F.pad(num_probes.cumsum(-1), (1, 0))
    row = torch.arange(num_queries, device=valid.device).expand(batch, heads, -1).contiguous()
    probe_document = torch.searchsorted(probe_begin[..., 1:].contiguous(), row, right=True)
    behind = (q_begin - probe_begin).gather(2, (probe_document + 1).clamp(max=num_keys))
    probes = order.gather(2, (row + behind).clamp(max=num_queries - 1))
    probes = torch.where(probe_document < num_keys, probes, 0)

    new_document, new_block = (x.diff(dim=-1, prepend=x[..., :1] - 1) != 0 for x in (ordered, order // block_size))
    counts = torch.zeros_like(valid.expand(batch, -1, -1), memory_format=torch.contiguous_format)
    counts.scatter_(2, order, (new_document | new_block) & (ordered < num_keys))
    row_document, counts = (
        pad_to_multiple(x, -1, block_size, 0).unflatten(-1, (-1, block_size)) for x in (q_label, counts)
    )
    return Documents(
        key_order, key_document, begins(key_document), part_document, part_key, part_begin, probes, probe_document,
        probe_begin, row_document.contiguous(), counts.contiguous(),
    )  # fmt: skip


def first_probes(documents: Documents) -> Tensor:
    """The first probe of the document of every key, as the keys stand: int64 ``[b, h, Skv]``."""
    order, document = (x[:, None].expand(-1, documents.probes.shape[1], -1) for x in documents[:2])
    return torch.empty_like(order, memory_format=torch.contiguous_format).scatter_(
        2, order, documents.probe_begin.gather(2, document)
    )


@operator(lambda a: ((*a.q.shape[:2], a.k.shape[2]), torch.float32))
def document_masses(
    q: Tensor, k: Tensor, mask: SampledMask, documents: Documents, block_size: int, scale: float
) -> Tensor:
    """Cumulative masses: of the heaviest parts of its document, down to each part: fp32 ``[B, Hq, Skv]``.

    In any order in a document. The mass of a part is the mean probability of its keys, over the probes of its document;
    NaN counts as no mass. What is behind the last part is arbitrary.

    Args:
        q, k: all queries ``[B, Hq, Sq, D]`` and keys ``[B, Hkv, Skv, D]``.
        mask: by clauses at every query and key; or by bits, at the probes of its own document for each key.
        documents, block_size: as in ``order_documents``.
        scale: factor of the scores.
    """
    shape = batch, num_heads, num_queries = q.shape[:3]
    num_keys = k.shape[2]
    tile = block_size if may_look(q) else max(16, min(block_size, CHUNK_ELEMENTS // shape.numel()))
    log_total = q.new_full((batch, num_heads, 2 * num_queries), -torch.inf, dtype=torch.float32)
    masses = log_total.new_empty(batch, num_heads, num_keys)
    for is_second in (False, True):
        for start in range(0, num_keys, tile):
            row, number, logits = _tile(q, k, mask, documents, slice(start, start + tile), block_size, scale)
            row = row.expand(batch, num_heads, -1)
            total = log_total.gather(2, row)
            if is_second:
                probability = (logits - total[..., None]).exp_().masked_fill_(logits == -torch.inf, 0.0)
                masses[..., start : start + tile] = (probability / number[..., None]).sum(2)
            else:
                log_total.scatter_(2, row, torch.logaddexp(total, logits.logsumexp(-1)))
        log_total.masked_fill_(log_total == torch.inf, torch.nan)
    masses = F.pad(masses.nan_to_num_(0.0).cumsum(-1, dtype=torch.float64), (1, 0))
    masses = masses.gather(2, documents.part_key[:, None].expand(batch, num_heads, -1)).diff(dim=-1)
    document = documents.part_document[:, None]
    masses = masses.gather(2, (4 * document - masses).argsort(dim=-1))
    before = F.pad(masses.cumsum(-1), (1, 0))
    first = documents.part_begin.gather(1, documents.part_document)[:, None]
    return (before[..., 1:] - before.gather(2, first.expand_as(masses))).to(torch.float32)


CHUNK_ELEMENTS = 2**28  # logits of a tile that takes every probe


def may_look(x: Tensor) -> bool:
    """Whether a tile may take the probes that it needs alone: a GPU would have to wait to know, and takes them all."""
    return x.device.type == "cpu"


def _tile(
    q: Tensor, k: Tensor, mask: SampledMask, documents: Documents, keys: slice, block_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of some keys and their probes, fp32 ``[B, Hq, m, keys]``; -inf where the mask does not allow the pair.

    Before them, which of the probes these are, ``[b, h, m]``, and how many their documents have. Some may be none.
    """
    key, document = documents.key_order[:, keys], documents.key_document[:, keys]
    begin, probe_document = documents.probe_begin, documents.probe_document
    num_queries, last = probe_document.shape[2], begin.shape[2] - 1
    ends = torch.stack([document[:, 0], (document[:, -1] + 1).clamp(max=last)], -1)
    first, end = begin.gather(2, ends[:, None].expand(-1, begin.shape[1], -1)).split(1, -1)
    width = max(1, int((end - first).amax())) if may_look(q) else num_queries
    row = first + torch.arange(width, device=q.device)
    place = row.clamp(max=num_queries - 1)
    query, own = documents.probes.gather(2, place), probe_document.gather(2, place)
    own = torch.where(row < end, own, last + 1)
    of_document = own.clamp(max=last - 1)
    slot, number = row - begin.gather(2, of_document), begin.diff().gather(2, of_document).clamp(min=1)
    ok = own[..., None] == document[:, None, None]
    ok = ok & mask.pairs(query, slot.clamp(0, block_size - 1), key, block_size)

    def take(x: Tensor, index: Tensor) -> Tensor:
        return x.gather(2, index[..., None].expand(*x.shape[:2], -1, x.shape[3])).float()

    queries, keys_ = take(q, query), take(k, key[:, None])
    logits = queries.unflatten(1, (k.shape[1], -1)).flatten(2, 3) @ keys_.mT
    logits = logits.unflatten(2, (-1, width)).flatten(1, 2).mul_(scale)
    return row, number, logits.masked_fill_(~ok, -torch.inf)


@operator(lambda a: ((*a.cumulative.shape[:2], a.summary.shape[2]), torch.int32), has_kernel=False)
def document_counts(
    cumulative: Tensor, documents: Documents, summary: Tensor, gamma: float, density: float | None, forced: Tensor,
    min_blocks: int, max_blocks: Size,
) -> Tensor:  # fmt: skip
    """How many blocks every row of a head keeps: int32 ``[B, Hq, Nq]``; dense rows keep Nk.

    Each row has the counts of its documents in sum, and no document a count above the number of its blocks.

    Args:
        cumulative: fp32 ``[B, Hq, Skv]`` of ``document_masses``.
        summary, gamma, density, forced, min_blocks, max_blocks: as in ``flexproxy.stages.budget.count_blocks``; a gamma
            of inf is every block.
    """
    num_keys = cumulative.shape[2]
    batch, num_heads, num_rows = *cumulative.shape[:2], summary.shape[2]
    num_blocks = -(-num_keys // documents.row_document.shape[2])
    number, dense = summary[..., row_summary.NUMBER], summary[..., row_summary.DENSE] != 0
    begin = documents.part_begin[:, None]
    row_document = documents.row_document.flatten(1).clamp(max=num_keys - 1)[:, None].expand(batch, num_heads, -1)

    def rows(limit: float | Tensor) -> Tensor:
        below = F.pad((cumulative < limit).cumsum(-1, dtype=torch.int32), (1, 0))
        count = below.gather(2, begin.expand(batch, num_heads, -1)).diff(dim=-1) + 1
        count = torch.maximum(count.clamp(min_blocks, max_blocks), forced[..., None])
        count = torch.minimum(count, begin.diff(dim=-1)).gather(2, row_document).unflatten(2, (num_rows, -1))
        count = torch.where(documents.counts, count, 0).sum(-1).clamp(max=num_blocks)
        return torch.where(dense, num_blocks, count).to(torch.int32)

    if density is None:
        return rows(gamma)
    # The least gamma that keeps enough, by bisection over the floats up to 2, which are in the order of their bits.
    low = torch.zeros(batch, 1, 1, dtype=torch.int32, device=cumulative.device)
    high = torch.full_like(low, 2**30)

    def density_of(bits: Tensor) -> Tensor:
        kept = torch.minimum(number, rows(bits.view(torch.float32))).sum(-1, dtype=torch.float64)
        return (kept / number.sum(-1).clamp(min=1)).mean(-1)[:, None, None]

    for _ in range(31):
        middle = (low + high) // 2
        enough = density_of(middle) >= density
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    below = (high - 1).clamp(min=0)
    is_nearer = (density_of(below) - density).abs() <= (density_of(high) - density).abs()
    return rows(torch.where(is_nearer, below, high).view(torch.float32))
