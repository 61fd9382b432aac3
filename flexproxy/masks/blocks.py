"""Which blocks a mask admits.

NOTE [Two routes]
A mask with clauses (NOTE [Clauses]) is classified by counting, and its tokens are evaluated from the clauses wherever
they are needed. Any other ``mask_mod`` is evaluated once over all token pairs, in chunks of rows; what the estimator
needs of it later is kept as one bit for each *sampled* pair, 1/(8 query stride * key stride) byte a pair. Where the
sampled queries depend on their values, the mask is evaluated at these once more, for every sequence and proxy.

Shapes: ``Bm`` is 1 or B and ``Hm`` is 1 or Hq, where 1 means that the mask does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from flexproxy.masks.clauses import ClauseStack, dense_labels, inclusion_exclusion, stack, unstack
from flexproxy.masks.sampled import MergeHeads, SampledMask, evaluate, evaluated_elements, pack_bits
from flexproxy.masks.structure import MaskMod
from flexproxy.ops import row_summary
from flexproxy.ops.operators import Output, Size, operator
from flexproxy.ops.tensors import pad_to_multiple

CHUNK_ELEMENTS, TABLE_ELEMENTS = 2**23, 2**26  # of the largest temporaries of counting


class Admissible(NamedTuple):
    """What a mask admits, by blocks and by rows.

    any:   bool ``[Bm, Hm, Nq, Nk]``, some token pair of the block pair is allowed.
    full:  bool ``[Bm, Hm, Nq, Nk]``, all block_size x block_size token pairs exist and are allowed.
    valid: bool ``[Bm, Hm, Sq]``, the query has an allowed key.
    """

    any: Tensor
    full: Tensor
    valid: Tensor


@operator(lambda a: ((*a.any_.shape[:3], row_summary.COLUMNS), torch.int32))
def summarize_rows(any_: Tensor, full: Tensor, sequence: Tensor) -> Tensor:
    """What each row of blocks holds: int32 ``[b, h, Nq, 7]``, in the columns of ``flexproxy.ops.row_summary``.

    sequence: int32 ``[b, h, Nq, 2]`` of ``sequence_rows``.
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
            *sequence.unbind(-1),
        ],
        -1,
    ).to(torch.int32)


def first_blocks(any_: Tensor) -> Tensor:
    """The first block that a query of any row and head may see: int32 ``[b]``; Nk where there is none."""
    num_blocks = any_.shape[-1]
    block = torch.arange(num_blocks, dtype=torch.int32, device=any_.device)
    return torch.where(any_.any(2).any(1), block, num_blocks).amin(-1)


# ------------------------------------------------------------------------------------------------ by counting


def _admissible(a: Any) -> list[Output]:
    _, batch, num_queries = a.clauses.lo.shape
    blocks = batch, 1, -(-num_queries // a.block_size), -(-a.num_keys // a.block_size)
    return [(blocks, torch.bool), (blocks, torch.bool), ((batch, 1, num_queries), torch.bool)]


@operator(_admissible)
def classify_clauses(clauses: ClauseStack, num_keys: Size, block_size: int) -> Admissible:
    """Classify the blocks of a union of clauses, exactly, at a cost of Sq * Nk (not Sq * Skv).

    By counting the keys of each block that a query may see.
    """
    return _count(clauses, None, num_keys, block_size)


def _valid(a: Any) -> Output:
    return (max(a.clauses.lo.shape[1], len(a.listed)), a.listed.shape[1], a.clauses.lo.shape[2]), torch.bool


@operator(_valid, has_kernel=False)
def valid_queries(clauses: ClauseStack, listed: Tensor, num_keys: Size, block_size: int) -> Tensor:
    """Whether each query may see a key in some listed block: bool ``[b, h, Sq]``. listed: bool ``[b, h, Nq, Nk]``."""
    return _count(clauses, listed, num_keys, block_size).valid


def _count(clauses: ClauseStack, listed: Tensor | None, num_keys: int, block_size: int) -> Admissible:
    """``classify_clauses``; with ``listed``, ``valid`` is that of ``valid_queries``."""
    terms, signs = inclusion_exclusion(unstack(clauses))
    terms = tuple(
        t if t.q_label is None or t.k_label is None else t._replace(**_dense(t.q_label, t.k_label)) for t in terms
    )
    lo, hi, q_label, k_label = stack(terms)
    # Labels need a table of labels x blocks, Skv * Nk entries: some blocks at a time.
    span = num_keys if k_label is None else max(1, TABLE_ELEMENTS // (lo.shape[1] * num_keys)) * block_size
    any_: list[Tensor] = []
    full: list[Tensor] = []
    valid: list[Tensor] = []
    for start in range(0, num_keys, span):
        stop = min(start + span, num_keys)
        labels = None if k_label is None else k_label[..., start:stop]
        part = ClauseStack((lo - start).clamp(min=0), (hi - start).clamp(max=stop - start), q_label, labels)
        some = None if listed is None else listed[..., start // block_size : -(-stop // block_size)]
        parts = _count_span(part, some, signs, stop - start, num_keys, block_size)
        for whole, of_span in zip((any_, full, valid), parts, strict=True):
            whole.append(of_span)
    return Admissible(torch.cat(any_, -1), torch.cat(full, -1), torch.stack(valid).any(0))


def _dense(q_label: Tensor, k_label: Tensor) -> dict[str, Tensor]:
    q_dense, k_dense = dense_labels(q_label, k_label)
    return {"q_label": q_dense, "k_label": k_dense}


def _count_span(
    terms: ClauseStack, listed: Tensor | None, signs: Sequence[int], num_keys: int, num_labels: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``classify_clauses`` for some of the keys, whose positions count from the first of them."""
    lo, hi, q_label, k_label = terms
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
        seen = (count > 0)[:, None]
        if listed is not None:
            own = torch.arange(rows.start, rows.stop, device=lo.device) // block_size
            seen = seen & listed[:, :, own]
        valid.append(seen.any(-1))
        padded_count = pad_to_multiple(count, -2, block_size, 0)
        count = rearrange(padded_count, "b (q_block row) block -> b q_block row block", row=block_size)
        any_.append((count > 0).any(2))
        full.append((count == block_size).all(2))
    return torch.cat(any_, 1)[:, None], torch.cat(full, 1)[:, None], torch.cat(valid, 2)


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


def classify_by_evaluation(
    mask_mod: MaskMod,
    shape: tuple[int, int, int, int],
    block_size: int,
    strides: tuple[int, int],
    merge_heads: MergeHeads,
    device: torch.device,
) -> tuple[Admissible, SampledMask]:
    """Classify any mask by evaluating it, some rows of blocks at a time, and keep its sampled pairs.

    shape: batch, heads, Sq and Skv; the first two are 1 where the mask does not depend on them.

    Returns:
        Admissible, and the mask at every ``strides[0]``-th query and ``strides[1]``-th key, by bits.
    """
    batch, heads, num_queries, num_keys = shape
    rows_per_chunk = max(1, evaluated_elements(device) // (batch * heads * num_keys * block_size)) * block_size
    any_, full, valid, bits = [], [], [], []
    for chunk in range(-(-num_queries // rows_per_chunk)):  # of the number of pieces: tracing fixes what is iterated
        start = chunk * rows_per_chunk
        rows = min(rows_per_chunk, num_queries - start)
        piece = batch, heads, rows, num_keys
        mask = evaluate(mask_mod, piece, lambda b, h, row, key, start=start: row + start, device)  # type: ignore[misc]
        valid.append(mask.any(-1))
        bits.append(pack_bits(merge_heads(mask[:, :, :: strides[0], :: strides[1]])))
        padded = pad_to_multiple(pad_to_multiple(mask, -1, block_size, False), -2, block_size, False)
        blocks = padded.unflatten(3, (-1, block_size)).unflatten(2, (-1, block_size))
        any_.append(blocks.any(5).any(3))
        full.append(blocks.all(5).all(3))
    admissible = Admissible(torch.cat(any_, 2), torch.cat(full, 2), torch.cat(valid, 2))
    return admissible, SampledMask(bits=torch.cat(bits, 2))


def confined(mask_mod: MaskMod, listed: Tensor, block_size: int) -> MaskMod:
    """A mask in some blocks alone. listed: bool ``[1 or B, 1 or Hq, Nq, Nk]``."""
    per_sequence, per_head = (size > 1 for size in listed.shape[:2])
    # Indexed by tensors alone: torch 2.5 cannot vmap an index that has numbers, too.
    table = listed if per_head else listed[:, 0]
    table = table if per_sequence else table[0]

    def confined_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        own = [index for index, counts in ((b, per_sequence), (h, per_head)) if counts]
        place = (*own, q_idx // block_size, kv_idx // block_size)
        return mask_mod(b, h, q_idx, kv_idx) & table[place]

    return confined_mask


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
