"""Which blocks, and which sampled tokens, a mask admits.

NOTE [Two routes]
A mask with clauses (NOTE [Clauses]) is classified by counting, and its tokens are evaluated from the clauses wherever
they are needed. Any other ``mask_mod`` is evaluated once over all token pairs, in chunks of rows; what the estimator
needs of it later is kept as one bit for each *sampled* pair, 1/(8 query stride * key stride) byte a pair. Where the
sampled queries depend on their values, the mask is evaluated at these once more, for every sequence and proxy.

Shapes: ``Bm`` is 1 or B and ``Hm`` is 1 or Hq, where 1 means that the mask does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from flexproxy.masks.clauses import ClauseStack, allowed, dense_labels, inclusion_exclusion, stack, unstack
from flexproxy.ops.operators import Output, Size, capturable, operator
from flexproxy.ops.tensors import pad_to_multiple

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

CHUNK_ELEMENTS, TABLE_ELEMENTS = 2**23, 2**26  # of the largest temporaries of counting


def _evaluated_elements(device: torch.device) -> int:
    """Token pairs to evaluate at once: few on a CPU, for memory; on a GPU and in a trace more, for fewer steps."""
    if torch.compiler.is_compiling():
        return 2**28
    return 2**23 if device.type == "cpu" else 2**27


class Admissible(NamedTuple):
    """What a mask admits, by blocks and by rows.

    any:   bool ``[Bm, Hm, Nq, Nk]``, some token pair of the block pair is allowed.
    full:  bool ``[Bm, Hm, Nq, Nk]``, all block_size x block_size token pairs exist and are allowed.
    valid: bool ``[Bm, Hm, Sq]``, the query has an allowed key.
    """

    any: Tensor
    full: Tensor
    valid: Tensor


class SampledMask(NamedTuple):
    """The mask at some rows (sampled or probed queries) and some keys, by clauses or by bits.

    clauses: with ``[C, b, rows]`` and, for labels of keys, ``[C, b, keys]``; None if ``bits`` holds the mask. Where the
        rows are given by their index, the clauses are those of all queries.
    bits:    uint8 ``[b, heads, rows, ceil(keys / 8)]``, little end first; None if ``clauses`` hold it.
    """

    clauses: ClauseStack | None
    bits: Tensor | None

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """lo, hi, q_label, k_label, bits: as operators take them."""
        return (*(self.clauses or (None, None, None, None)), self.bits)


def clauses_at(
    queries: Tensor, lo: Tensor | None, hi: Tensor | None, q_label: Tensor | None, k_label: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Clauses of all queries, at some queries of each head: with heads, as ``mask_chunk`` takes them.

    queries: int64 ``[b, heads, m]``; ``b`` is that of the clauses, or theirs is 1.
    """

    def at(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        index = queries.expand(part.shape[0], *queries.shape)
        return part[:, :, None].expand(-1, *queries.shape[:2], -1).gather(-1, index)

    return at(lo), at(hi), at(q_label), None if k_label is None else k_label[:, :, None]


def mask_chunk(
    lo: Tensor | None,
    hi: Tensor | None,
    q_label: Tensor | None,
    k_label: Tensor | None,
    bits: Tensor | None,
    rows: slice,
    keys: slice,
    key_step: int,
) -> Tensor:
    """The rows and keys of a SampledMask as bool ``[b, heads, rows, keys]``; key n is at position n * key_step.

    ``keys.start`` must be a multiple of 8. Clauses may have heads, ``[C, b, heads, rows]`` and ``[C, b, 1, keys]``.
    """
    if bits is not None:
        packed = bits[:, :, rows, keys.start // 8 : -(-keys.stop // 8), None]
        shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
        return ((packed >> shifts) & 1).bool().flatten(-2)[..., : keys.stop - keys.start]
    assert lo is not None
    assert hi is not None
    position = torch.arange(keys.start, keys.stop, dtype=torch.int32, device=lo.device) * key_step
    q_part = q_label[..., rows] if q_label is not None else None
    k_part = k_label[..., keys] if k_label is not None else None
    ok = allowed(lo[..., rows], hi[..., rows], q_part, k_part, position)
    return ok if lo.dim() == 4 else ok[:, None]


def pack_bits(mask: Tensor) -> Tensor:
    """bool ``[..., n]`` to uint8 ``[..., ceil(n / 8)]``, little end first."""
    padded: Tensor = pad_to_multiple(mask, -1, 8, False).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(-1, dtype=torch.uint8)


@operator(lambda a: ((*a.any_.shape[:3], 5), torch.int32))
def summarize_rows(any_: Tensor, full: Tensor) -> Tensor:
    """What each row of blocks holds: int32 ``[b, h, Nq, 5]``.

    The first admissible block and one more than the last (Nk and 0 where there is none); the first full block and the
    first after it that is not full (Nk and Nk where there is none); the number of admissible blocks.
    """
    num_blocks = any_.shape[-1]
    block = torch.arange(num_blocks, dtype=torch.int32, device=any_.device)
    full_first = torch.where(full, block, num_blocks).amin(-1)
    after = (block > full_first[..., None]) & ~full
    return torch.stack(
        [
            torch.where(any_, block, num_blocks).amin(-1),
            torch.where(any_, block + 1, 0).amax(-1),
            full_first,
            torch.where(after, block, num_blocks).amin(-1),
            any_.sum(-1),
        ],
        -1,
    ).to(torch.int32)


# ------------------------------------------------------------------------------------------------ by counting


def classify_clauses(clauses: ClauseStack, num_keys: int, block_size: int) -> Admissible:
    """Classify the blocks of a union of clauses, exactly, at a cost of Sq * Nk (not Sq * Skv)."""
    return Admissible(*classify_union(*clauses, num_keys, block_size))


def _classified(a: Any) -> list[Output]:
    _, batch, num_queries = a.lo.shape
    blocks = batch, 1, -(-num_queries // a.block_size), -(-a.num_keys // a.block_size)
    return [(blocks, torch.bool), (blocks, torch.bool), ((batch, 1, num_queries), torch.bool)]


@operator(_classified)
def classify_union(
    lo: Tensor, hi: Tensor, q_label: Tensor | None, k_label: Tensor | None, num_keys: Size, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """any, full and valid of Admissible, of a ClauseStack, by counting the keys of each block that a query may see."""
    clauses = ClauseStack(lo, hi, q_label, k_label)
    terms, signs = inclusion_exclusion(unstack(clauses))
    terms = tuple(
        t if t.q_label is None or t.k_label is None else t._replace(**_dense(t.q_label, t.k_label)) for t in terms
    )
    lo, hi, q_label, k_label = stack(terms)
    _, batch, _ = lo.shape
    # Labels need a table of labels x blocks, Skv * Nk entries: some blocks at a time.
    span = num_keys if k_label is None else max(1, TABLE_ELEMENTS // (batch * num_keys)) * block_size
    any_: list[Tensor] = []
    full: list[Tensor] = []
    valid: list[Tensor] = []
    for start in range(0, num_keys, span):
        stop = min(start + span, num_keys)
        labels = None if k_label is None else k_label[..., start:stop]
        ends = (lo - start).clamp(min=0), (hi - start).clamp(max=stop - start)
        parts = _count_span(*ends, q_label, labels, signs, stop - start, num_keys, block_size)
        for whole, part in zip((any_, full, valid), parts, strict=True):
            whole.append(part)
    return torch.cat(any_, -1), torch.cat(full, -1), torch.stack(valid).any(0)


def _dense(q_label: Tensor, k_label: Tensor) -> dict[str, Tensor]:
    q_dense, k_dense = dense_labels(q_label, k_label)
    return {"q_label": q_dense, "k_label": k_dense}


def _count_span(
    lo: Tensor,
    hi: Tensor,
    q_label: Tensor | None,
    k_label: Tensor | None,
    signs: Sequence[int],
    num_keys: int,
    num_labels: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``classify_union`` for some of the keys, whose positions count from the first of them."""
    _, batch, num_queries = lo.shape
    num_blocks = -(-num_keys // block_size)
    tables: list[Tensor | None] = [None] * len(signs)
    padded = None
    if k_label is not None:
        tables = [_keys_by_label_and_block(label, num_labels, block_size) for label in k_label]
        padded = pad_to_multiple(k_label, -1, block_size, -1)
    any_, full, valid = [], [], []
    rows_per_chunk = max(1, CHUNK_ELEMENTS // (batch * num_blocks * block_size)) * block_size
    for start in range(0, num_queries, rows_per_chunk):
        rows = slice(start, min(start + rows_per_chunk, num_queries))
        count = lo.new_zeros(batch, rows.stop - start, num_blocks)
        for m, sign in enumerate(signs):
            labels = None if q_label is None or padded is None else (q_label[m, :, rows], padded[m])
            count += sign * _count_keys(lo[m, :, rows], hi[m, :, rows], labels, tables[m], num_keys, block_size)
        valid.append((count > 0).any(-1))
        padded_count = pad_to_multiple(count, -2, block_size, 0)
        count = rearrange(padded_count, "b (q_block row) block -> b q_block row block", row=block_size)
        any_.append((count > 0).any(2))
        full.append((count == block_size).all(2))
    return torch.cat(any_, 1)[:, None], torch.cat(full, 1)[:, None], torch.cat(valid, 1)[:, None]


def _keys_by_label_and_block(k_label: Tensor, num_labels: int, block_size: int) -> Tensor:
    """How many keys of each label each block has: int32 ``[b, labels, Nk]``, from dense labels ``[b, Skv]``."""
    batch, num_keys = k_label.shape
    num_blocks = -(-num_keys // block_size)
    block = torch.arange(num_keys, device=k_label.device) // block_size
    cell = k_label.clamp(min=0) * num_blocks + block
    table = torch.zeros(batch, num_labels * num_blocks, dtype=torch.int32, device=k_label.device)
    return table.scatter_add_(1, cell, (k_label >= 0).to(torch.int32)).view(batch, num_labels, num_blocks)


def _count_keys(
    lo: Tensor, hi: Tensor, labels: tuple[Tensor, Tensor] | None, table: Tensor | None, num_keys: int, block_size: int
) -> Tensor:
    """Keys that one clause allows to each query in each block: int32 ``[b, rows, Nk]``.

    labels: of the queries ``[b, rows]``, and of the keys, padded to whole blocks; table: of these keys.
    """
    first = torch.arange(0, num_keys, block_size, dtype=torch.int32, device=lo.device)
    last = (first + block_size).clamp(max=num_keys)
    count = (torch.minimum(hi[..., None], last) - torch.maximum(lo[..., None], first)).clamp(min=0)
    if labels is None or table is None:
        return count
    q_label, k_label = labels
    # Inside the interval the table has the count. Its two ends lie in two blocks, where the tokens are compared.
    rows_of_table = q_label.clamp(min=0)[..., None].expand(-1, -1, len(first))
    inside = torch.where(count == last - first, table.gather(1, rows_of_table), 0)
    for end in (lo, hi - 1):
        block = (end // block_size).clamp(0, len(first) - 1).to(torch.int64)[..., None]
        position = block * block_size + torch.arange(block_size, device=lo.device)  # [b, rows, block_size]
        label = k_label.gather(1, position.flatten(1)).view_as(position)
        same = (label == q_label[..., None]) & (position >= lo[..., None]) & (position < hi[..., None])
        inside.scatter_(-1, block, same.sum(-1, keepdim=True, dtype=torch.int32))
    return torch.where((q_label >= 0)[..., None], inside, 0)


# ------------------------------------------------------------------------------------------------ by evaluation


def evaluate(
    mask_mod: MaskMod,
    batch: int,
    heads: int,
    q_index: Callable[[Tensor, Tensor, Tensor], Tensor],
    rows: int,
    num_keys: int,
    device: torch.device,
) -> Tensor:
    """Evaluate a mask at chosen queries and all keys: bool ``[batch, heads, rows, Skv]``.

    q_index: from (b, h, row) to the index of the query.
    """

    def at_rows(b: Tensor, h: Tensor, row: Tensor, kv_idx: Tensor) -> Tensor:
        allowed: Any = mask_mod(b, h, q_index(b, h, row), kv_idx)
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            kind = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
            raise TypeError(f"mask_mod: expected a bool tensor as its result, got {kind}; use a comparison")
        result: Tensor = allowed & (row >= 0)  # a mask may ignore its arguments
        return result

    mask: Tensor = create_mask(at_rows, batch, heads, rows, num_keys, device=device)
    return mask


def classify_by_evaluation(
    mask_mod: MaskMod,
    batch: int,
    heads: int,
    num_queries: int,
    num_keys: int,
    block_size: int,
    strides: tuple[int, int],
    merge_heads: Callable[[Tensor], Tensor],
    device: torch.device,
) -> tuple[Admissible, Tensor]:
    """Classify any mask by evaluating it, some rows of blocks at a time, and keep its sampled pairs.

    merge_heads: from bool ``[b, heads, ...]`` to ``[b, P or 1, ...]``, whether any head of a group allows it.

    Returns:
        Admissible, and the bits ``[batch, P or 1, sampled queries, ...]`` of a SampledMask.
    """
    rows_per_chunk = max(1, _evaluated_elements(device) // (batch * heads * num_keys * block_size)) * block_size
    any_, full, valid, bits = [], [], [], []
    for chunk in range(-(-num_queries // rows_per_chunk)):  # of the number of pieces: tracing fixes what is iterated
        start = chunk * rows_per_chunk
        rows = min(rows_per_chunk, num_queries - start)
        mask = evaluate(mask_mod, batch, heads, lambda b, h, row, start=start: row + start, rows, num_keys, device)  # type: ignore[misc]
        valid.append(mask.any(-1))
        bits.append(pack_bits(merge_heads(mask[:, :, :: strides[0], :: strides[1]])))
        padded = pad_to_multiple(pad_to_multiple(mask, -1, block_size, False), -2, block_size, False)
        blocks = padded.unflatten(3, (-1, block_size)).unflatten(2, (-1, block_size))
        any_.append(blocks.any(5).any(3))
        full.append(blocks.all(5).all(3))
    return Admissible(torch.cat(any_, 2), torch.cat(full, 2), torch.cat(valid, 2)), torch.cat(bits, 2)


def whole_blocks(
    mask_mod: MaskMod, admissible: Tensor, full: Tensor, lengths: tuple[int, int], block_size: int
) -> Tensor:
    """Blocks of which every pair that exists is allowed: bool ``[Bm, Hm, Nq, Nk]``.

    Away from the ragged ends these are the full blocks; a last row or column of less than block_size tokens has none.
    There the mask is evaluated, as if the last token were repeated to fill the block.
    """
    num_queries, num_keys = lengths
    batch, heads, num_q_blocks, num_k_blocks = full.shape

    def full_from(first_query: int, first_key: int, rows: int, columns: int) -> Tensor:
        def repeated(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            query, key = (q_idx + first_query).clamp(max=num_queries - 1), (kv_idx + first_key).clamp(max=num_keys - 1)
            return mask_mod(b, h, query, key)

        shape = batch, heads, rows * block_size, columns * block_size, block_size, (block_size, block_size)
        return classify_by_evaluation(repeated, *shape, lambda mask: mask, full.device)[0].full

    if num_queries % block_size:
        row = full_from((num_q_blocks - 1) * block_size, 0, 1, num_k_blocks)
        full = torch.cat([full[:, :, :-1], row], 2)
    if num_keys % block_size:
        column = full_from(0, (num_k_blocks - 1) * block_size, num_q_blocks, 1)
        full = torch.cat([full[..., :-1], column], 3)
    return full & admissible


def bits_at(
    mask_mod: MaskMod,
    queries: Tensor,
    num_keys: int,
    stride: int = 1,
    merge_heads: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The mask at some queries and every stride-th key, as bits of a SampledMask.

    queries: int64 ``[b, h, m]``. merge_heads: as in ``classify_by_evaluation``.
    """
    batch, heads, number = queries.shape
    queries = capturable(queries)
    rows_per_chunk = max(1, _evaluated_elements(queries.device) // (batch * heads * num_keys))

    def piece(start: int) -> Tensor:
        def q_index(b: Tensor, h: Tensor, row: Tensor) -> Tensor:
            return queries[b, h, row + start]

        rows = min(rows_per_chunk, number - start)
        mask = evaluate(mask_mod, batch, heads, q_index, rows, num_keys, queries.device)[..., ::stride]
        return pack_bits(mask if merge_heads is None else merge_heads(mask))

    first, pieces = piece(0), -(-number // rows_per_chunk)
    if pieces == 1:
        return first
    bits = first.new_empty(*first.shape[:2], number, first.shape[3])  # all pieces beside it would take it twice
    bits[:, :, :rows_per_chunk] = first
    for chunk in range(1, pieces):
        start = chunk * rows_per_chunk
        bits[:, :, start : start + rows_per_chunk] = piece(start)
    return bits


class _Tracked(Tensor):
    """A tensor whose results are of its own class: shows whether a function's result depends on it."""


def depends_on(mask_mod: MaskMod, device: torch.device) -> tuple[bool, bool]:
    """Whether a mask depends on the batch index and on the head; True where that cannot be told."""
    if torch.compiler.is_compiling():
        return True, True
    result = []
    for tracked in range(2):
        # One element instead of none: an index of no dimension would be read by the host.
        arguments = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(4)]
        try:
            arguments[tracked] = arguments[tracked].as_subclass(_Tracked)
            result.append(isinstance(mask_mod(*arguments), _Tracked))
        except Exception:  # the mask is the caller's code; evaluating it for real shows what is wrong with it
            # (and torch 2.5 makes no subclass of a tensor that a dispatch mode has seen)
            result.append(True)
    return result[0], result[1]
