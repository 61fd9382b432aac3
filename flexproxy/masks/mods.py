"""Masks that know their blocks: ordinary ``mask_mod`` functions, each with its structure attached.

Every function here is, or returns, a ``mask_mod(b, h, q_idx, kv_idx) -> bool`` for ``flex_attention`` and
``create_block_mask``. Besides, each carries a description in terms of NOTE [Clauses] (flexproxy/masks/clauses.py), from
which flexproxy tells none, partial and full blocks without evaluating tokens.

NOTE [Positions]
A mask is asked about positions. Without a shift these are the indices of the queries; a shift may move them before the
first key, where every mask here allows nothing, or behind the last one. No position passes 32 bits, in which compiled
kernels count: an offset is limited to 2**28 tokens either way, so that even nested shifts do not add up to 2**31.
Functions use nothing that the CuTe backend of ``flex_attention`` cannot compile: of torch 2.11 no minimum, no maximum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexproxy.config import MAX_BLOCK_SIZE
from flexproxy.masks.clauses import Clause, Labels, numbered
from flexproxy.masks.structure import (
    MaskMod,
    Structure,
    Table,
    all_of,
    any_of,
    attach,
    check_mask_mod,
    structure_of,
)
from flexproxy.ops.operators import capturable

MAX_OFFSET = 2**28  # tokens, see NOTE [Positions]
_MAX_LENGTH = 2**30  # of windows and prefixes; no sum of it and a position passes 32 bits


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """A query sees the keys up to its own index: ``q_idx >= kv_idx``, whatever ``b`` and ``h`` are."""
    return q_idx >= kv_idx


def _causal_clauses(position: Tensor, num_keys: int) -> tuple[Clause, ...]:
    return (Clause(torch.zeros_like(position), position + 1),)


def _at_start(default: int) -> int:
    return 0


attach(causal, Structure(_causal_clauses, position=_at_start))


def full(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Every query sees every key (non-causal attention), whatever ``b``, ``h``, ``q_idx`` and ``kv_idx`` are."""
    return (q_idx >= 0) & (kv_idx >= 0)


def _full_clauses(position: Tensor, num_keys: int) -> tuple[Clause, ...]:
    return (Clause(torch.zeros_like(position), torch.where(position >= 0, num_keys, 0).to(torch.int32)),)


attach(full, Structure(_full_clauses))


def sliding_window(window: int | Tensor) -> MaskMod:
    """A query sees the ``window`` most recent keys, itself among them: ``0 <= q_idx - kv_idx < window``.

    Args:
        window: tokens, at least 1. A new int recompiles a compiled ``flex_attention``; an int tensor (``[]``, on the
            device of the queries) does not.

    Raises:
        TypeError: not an int, nor a tensor of one integer.
        ValueError: an int below 1.
    """
    tables: tuple[Table, ...] = ()
    if isinstance(window, Tensor):
        if window.dim() != 0 or not _is_integer(window):
            raise TypeError(
                f"window: expected an int or an integer tensor of shape [], got {window.dtype} of shape "
                f"{list(window.shape)}; use window.reshape(()) or one mask for each window"
            )
        window = capturable(_signed(window))
        tables = (Table("window", window, False),)
    elif isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(
            f"window: expected an int or an integer tensor, got {window!r} of type {type(window).__name__}; "
            "pass the number of tokens as an int"
        )
    elif window < 1:
        raise ValueError(f"window: expected at least 1 token, got {window}; for no window use masks.causal")
    else:
        window = min(window, _MAX_LENGTH)

    def sliding_window_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < window)

    def clauses(position: Tensor, num_keys: int) -> tuple[Clause, ...]:
        size = window.clamp(0, _MAX_LENGTH).to(torch.int32) if isinstance(window, Tensor) else window
        return (Clause(position - size + 1, position + 1),)

    return attach(
        sliding_window_mask,
        Structure(clauses, position=_at_start, tables=tables, recipe=(sliding_window, (window,))),
    )


def document(document_ids: Tensor) -> MaskMod:
    """Both tokens lie in one document. Combine it with ``causal`` by ``and_masks``.

    Args:
        document_ids: integers ``[S]`` or ``[B, S]``, one for each position; the ids need not be sorted, and a document
            need not be contiguous. Padding has a negative id (-1) and is in no document.

    Raises:
        TypeError: not a tensor of integers.
        ValueError: not of one or two dimensions.
    """
    _check_table("document_ids", document_ids, "[S] or [B, S]", (1, 2), integer=True)
    # uint64 has more values than int64, and no id of it is negative: its ids are numbered.
    ids = numbered(document_ids.view(torch.int64))[0] if document_ids.dtype == torch.uint64 else _signed(document_ids)
    ids, last = _padded(ids, -1)
    per_sequence = ids.dim() == 2

    def document_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        place = _place(q_idx, last[b if per_sequence else (q_idx < 0).to(torch.int32)])
        of_query, of_key = (ids[b, place], ids[b, kv_idx]) if per_sequence else (ids[place], ids[kv_idx])
        return (of_query == of_key) & (of_query >= 0)

    table = Table("document_ids", ids, per_sequence)
    num_tokens = document_ids.shape[-1]
    return attach(document_mask, _of_labels(table, ids, num_tokens, True, (document, (ids[..., :num_tokens],))))


def padding(attention_mask: Tensor) -> MaskMod:
    """Both tokens are real. Rows of padding stay empty, and ``flex_attention`` gives them the output 0.

    Args:
        attention_mask: ``[B, S]``, bool or integer, 1 (or any value but 0) for a real token, as tokenizers give it;
            padding may stand left, right or anywhere. S counts keys: with a cache, the mask of cache and new tokens.

    Raises:
        TypeError: not a tensor of bools or integers.
        ValueError: not of two dimensions.
    """
    _check_table("attention_mask", attention_mask, "[B, S]", (2,), integer=False)
    real, last = _padded(attention_mask != 0, False)

    def padding_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return real[b, _place(q_idx, last[b])] & real[b, kv_idx]

    table, labels = Table("attention_mask", real, True), real.to(torch.int32) - 1
    num_tokens = attention_mask.shape[-1]
    return attach(padding_mask, _of_labels(table, labels, num_tokens, False, (padding, (real[:, :num_tokens],))))


def prefix_lm(prefix_lengths: Tensor) -> MaskMod:
    """Causal, or a key inside the prefix: prefix tokens see one another in both directions.

    Args:
        prefix_lengths: integers ``[B]``, tokens in the prefix of each sequence.

    Raises:
        TypeError: not a tensor of integers.
        ValueError: not of one dimension.
    """
    _check_table("prefix_lengths", prefix_lengths, "[B]", (1,), integer=True)
    lengths = capturable(_signed(prefix_lengths))

    def prefix_lm_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) | ((q_idx >= 0) & (kv_idx < lengths[b]))

    def clauses(position: Tensor, num_keys: int) -> tuple[Clause, ...]:
        prefix = lengths[:, None].clamp(0, _MAX_LENGTH).to(torch.int32)
        hi = torch.where(position >= 0, torch.maximum(position + 1, prefix), 0)
        return (Clause(torch.zeros_like(hi), hi),)

    tables = (Table("prefix_lengths", lengths, True),)
    return attach(prefix_lm_mask, Structure(clauses, position=_at_start, tables=tables, recipe=(prefix_lm, (lengths,))))


def shift(mask_mod: MaskMod, q_offset: int | Tensor) -> MaskMod:
    """``mask_mod(b, h, q_idx + q_offset, kv_idx)``: any mask, for queries that start at position ``q_offset``.

    For Sq < Skv (chunked prefill, prefix cache), where query 0 is not token 0. At a position before the first key, a
    mask of this module allows nothing; a function of yours is asked about negative positions.

    Args:
        mask_mod: one of these masks, or any other.
        q_offset: tokens before the first query: an int, or an integer tensor ``[]`` or ``[B]`` on the device of the
            queries, whose values are read here; a mask with other values needs no recompilation. At most 2**28 tokens
            either way: more count as so many.

    Raises:
        TypeError: ``mask_mod`` is not callable, or ``q_offset`` is neither an int nor a tensor of integers.
        ValueError: ``q_offset`` has more than one dimension.
    """
    check_mask_mod("mask_mod", mask_mod, "shift its mask_mod", "pass the mask first, the offset second")
    if isinstance(q_offset, Tensor):
        _check_table("q_offset", q_offset, "[] or [B]", (0, 1), integer=True)
        limited = _signed(q_offset).clamp(-MAX_OFFSET, MAX_OFFSET).to(torch.int32)
        return shifted(mask_mod, capturable(limited))
    if isinstance(q_offset, bool) or not isinstance(q_offset, int):
        raise TypeError(
            f"q_offset: expected an int or an integer tensor, got {q_offset!r} of type {type(q_offset).__name__}; "
            "pass the number of tokens before the first query as an int"
        )
    return shifted(mask_mod, max(-MAX_OFFSET, min(q_offset, MAX_OFFSET)))


def shifted(mask_mod: MaskMod, offset: int | Tensor) -> MaskMod:
    """``shift`` by an int, or int32 ``[]`` or ``[B]``, within MAX_OFFSET."""
    per_sequence = isinstance(offset, Tensor) and offset.dim() == 1

    def shift_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx + (offset[b] if per_sequence else offset), kv_idx)  # type: ignore[index]

    inner = structure_of(mask_mod)
    of_clauses, of_documents, of_position = inner.clauses, inner.documents, inner.position

    def moved(position: Tensor) -> Tensor:
        return position + (offset[:, None] if per_sequence else offset)  # type: ignore[index]

    def clauses(position: Tensor, num_keys: int) -> tuple[Clause, ...]:
        return of_clauses(moved(position), num_keys)  # type: ignore[misc]

    def documents(position: Tensor, num_keys: int) -> Labels:
        return of_documents(moved(position), num_keys)  # type: ignore[misc]

    def position(default: int) -> int | Tensor:
        return offset if of_position is None else of_position(0) + offset

    return attach(
        shift_mask,
        Structure(
            None if of_clauses is None else clauses,
            None if of_documents is None else documents,
            inner.packed,
            position,
            (*inner.tables, Table("q_offset", offset, per_sequence)) if isinstance(offset, Tensor) else inner.tables,
            (shift, (mask_mod, offset)),
        ),
    )


def and_masks(*masks: MaskMod) -> MaskMod:
    """A pair of tokens is allowed if every mask allows it.

    Unlike torch's function of this name, it keeps what each mask knows of its blocks and of its position, in a trace
    of ``torch.compile`` too.

    Args:
        masks: at least one; masks of this module, or functions of yours.

    Raises:
        TypeError: an argument is no ``mask_mod``.
        ValueError: no arguments.
    """
    _check_parts("and_masks", masks)

    def and_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = masks[0](b, h, q_idx, kv_idx)
        for part in masks[1:]:
            result = result & part(b, h, q_idx, kv_idx)
        return result

    return attach(and_mask, all_of([structure_of(part) for part in masks], (and_masks, masks)))


def or_masks(*masks: MaskMod) -> MaskMod:
    """A pair of tokens is allowed if any of the masks allows it. Arguments and errors are those of ``and_masks``.

    Where its queries stand it does not say (they are taken to stand at the end); ``shift`` does.
    """
    _check_parts("or_masks", masks)

    def or_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        result = masks[0](b, h, q_idx, kv_idx)
        for part in masks[1:]:
            result = result | part(b, h, q_idx, kv_idx)
        return result

    return attach(or_mask, any_of([structure_of(part) for part in masks], (or_masks, masks)))


def _check_parts(name: str, parts: tuple[Any, ...]) -> None:
    if not parts:
        raise ValueError(
            f"{name}: expected at least one mask, got none; for a mask that allows everything use masks.full"
        )
    for number, part in enumerate(parts):
        check_mask_mod(
            f"{name}, argument {number}",
            part,
            "pass its mask_mod, or combine BlockMasks with flexproxy.and_block_masks",
            f"pass masks one by one, for example {name}(masks.causal, masks.sliding_window(1024))",
        )


# ------------------------------------------------------------------------------------------------ tables


def _of_labels(
    table: Table, labels: Tensor, num_tokens: int, packed: bool, recipe: tuple[Any, tuple[Tensor]]
) -> Structure:
    """The structure of equal labels, ``[S]`` or ``[B, S]``, padded."""
    rows = labels if labels.dim() == 2 else labels[None]

    def documents(position: Tensor, num_keys: int) -> Labels:
        if num_tokens < num_keys:
            raise ValueError(
                f"{table.name}: expected a value for each of the {num_keys} keys, got {num_tokens}; give the mask of "
                "all keys, cached ones included"
            )
        batch, end = max(rows.shape[0], position.shape[0]), rows.shape[1] - 1
        place = torch.where((position < 0) | (position > end), end, position).to(torch.int64)
        return rows.expand(batch, -1).gather(1, place.expand(batch, -1)), rows[:, :num_keys]

    def clauses(position: Tensor, num_keys: int) -> tuple[Clause, ...]:
        everywhere = torch.zeros_like(position), torch.full_like(position, num_keys)
        return (Clause(*everywhere, *documents(position, num_keys)),)

    return Structure(clauses, documents, packed, tables=(table,), recipe=recipe)


def _padded(table: Tensor, value: int | bool) -> tuple[Tensor, Tensor]:
    """A copy of a table with padding at the end of the last dimension, and the place of its last entry.

    Compiled kernels look up the padding of a ragged last tile; queries outside of the table look up the last entry. Its
    place is a tensor, so that another length does not recompile a kernel: int32 ``[B]``, or ``[2]`` (alike) of a table
    ``[S]``, for the CuTe backend (torch 2.11) compiles no index that is always 0.
    """
    padding = MAX_BLOCK_SIZE - table.shape[-1] % MAX_BLOCK_SIZE
    padded = capturable(F.pad(table.detach(), (0, padding), value=value))
    number = 2 if table.dim() == 1 else table.shape[0]
    return padded, capturable(torch.full((number,), padded.shape[-1] - 1, dtype=torch.int32, device=table.device))


def _place(q_idx: Tensor, last: Tensor) -> Tensor:
    """Where in a padded table the entry of a query is, see NOTE [Positions]; ``last`` is the place of its last one."""
    return torch.where((q_idx < 0) | (q_idx > last), last, q_idx)


def _signed(x: Tensor) -> Tensor:
    """Integers of any dtype as int32 or int64; what is too large for int64 becomes its largest."""
    if x.dtype in (torch.int32, torch.int64):
        return x
    if x.dtype == torch.uint64:
        wrapped = x.view(torch.int64)
        return torch.where(wrapped < 0, torch.iinfo(torch.int64).max, wrapped)
    return x.to(torch.int64 if x.dtype == torch.uint32 else torch.int32)


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _check_table(name: str, value: Any, shape: str, dims: tuple[int, ...], integer: bool) -> None:
    kind = "integer" if integer else "bool or integer"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}; use torch.as_tensor")
    if not (_is_integer(value) or (not integer and value.dtype == torch.bool)):
        raise TypeError(
            f"{name}: expected a tensor of {kind} dtype, got {value.dtype}; convert it with .to(torch.int32)"
        )
    if value.dim() not in dims:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}; reshape it")
