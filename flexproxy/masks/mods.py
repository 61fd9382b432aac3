"""Masks that know their blocks: ordinary ``mask_mod`` functions, each with its structure attached.

Every function here is, or returns, a ``mask_mod(b, h, q_idx, kv_idx) -> bool`` for ``flex_attention``,
``create_block_mask``, ``and_masks`` and ``or_masks``. Besides, each carries a description in terms of NOTE [Clauses]
(flexproxy/masks/clauses.py), from which flexproxy tells none, partial and full blocks without evaluating tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from flexproxy.config import MAX_BLOCK_SIZE
from flexproxy.masks.clauses import MAX_CLAUSES, Clause, intersect
from flexproxy.ops.operators import capturable

__all__ = ["causal", "document", "full", "padding", "prefix_lm", "shift", "sliding_window"]

MaskMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Table(NamedTuple):
    """A tensor that a mask looks up, by the name of its argument. per_sequence: its first dimension is the batch."""

    name: str
    value: Tensor
    per_sequence: bool


@dataclass(frozen=True)
class Structure:
    """What flexproxy knows of a mask besides its function.

    clauses: from the positions of the queries, int32 ``[b, Sq]``, and Skv, to the clauses whose union is the mask
        (if there are more than MAX_CLAUSES, to any MAX_CLAUSES + 1); None if the mask has to be evaluated.
    offset: what must be added to a query's index to get its position among the keys: an int, an int tensor (``[]`` or
        ``[B]``), or None if the mask does not say, as no mask of torch's ``and_masks`` / ``or_masks`` does.
    tables: the tensors that the mask looks up.
    """

    clauses: Callable[[Tensor, int], tuple[Clause, ...]] | None
    offset: int | Tensor | None
    tables: tuple[Table, ...] = ()


_INT32_MAX = 2**31 - 1
_UNKNOWN = Structure(None, None)


def _attach(mask_mod: MaskMod, structure: Structure) -> MaskMod:
    mask_mod.structure = structure  # type: ignore[attr-defined]
    return mask_mod


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """A query sees the keys up to its own index: ``q_idx >= kv_idx``."""
    return q_idx >= kv_idx


def _causal_clauses(position: Tensor, num_keys: int) -> tuple[Clause, ...]:
    return (Clause(torch.zeros_like(position), position + 1),)


_attach(causal, Structure(_causal_clauses, 0))


def full(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Every query sees every key (non-causal attention)."""
    return (q_idx >= 0) & (kv_idx >= 0)


def _full_clauses(position: Tensor, num_keys: int) -> tuple[Clause, ...]:
    return (Clause(torch.zeros_like(position), torch.full_like(position, num_keys)),)


_attach(full, Structure(_full_clauses, None))


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
        window = capturable(window)
        tables = (Table("window", window, False),)
    elif isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(
            f"window: expected an int or an integer tensor, got {window!r} of type {type(window).__name__}; "
            "pass the number of tokens as an int"
        )
    elif window < 1:
        raise ValueError(f"window: expected at least 1 token, got {window}; for no window use masks.causal")

    def sliding_window_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < window)

    def clauses(position: Tensor, num_keys: int) -> tuple[Clause, ...]:
        size = window.to(torch.int64).clamp(max=_INT32_MAX) if isinstance(window, Tensor) else min(window, _INT32_MAX)
        return (Clause((position - size + 1).to(torch.int32), position + 1),)

    return _attach(sliding_window_mask, Structure(clauses, 0, tables))


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
    num_tokens = document_ids.shape[-1]
    if document_ids.dtype == torch.uint8:  # has no -1
        document_ids = document_ids.to(torch.int32)
    ids = _padded(document_ids, -1)
    if ids.dim() == 1:

        def document_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (ids[q_idx] == ids[kv_idx]) & (ids[q_idx] >= 0)
    else:

        def document_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (ids[b, q_idx] == ids[b, kv_idx]) & (ids[b, q_idx] >= 0)

    tables = (Table("document_ids", ids, ids.dim() == 2),)
    return _attach(document_mask, Structure(_label_clauses("document_ids", ids, num_tokens), None, tables))


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
    num_tokens = attention_mask.shape[-1]
    real = _padded(attention_mask != 0, False)

    def padding_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return real[b, q_idx] & real[b, kv_idx]

    labels = real.to(torch.int32) - 1
    tables = (Table("attention_mask", real, True),)
    return _attach(padding_mask, Structure(_label_clauses("attention_mask", labels, num_tokens), None, tables))


def prefix_lm(prefix_lengths: Tensor) -> MaskMod:
    """Causal, or a key inside the prefix: prefix tokens see one another in both directions.

    Args:
        prefix_lengths: integers ``[B]``, tokens in the prefix of each sequence.

    Raises:
        TypeError: not a tensor of integers.
        ValueError: not of one dimension.
    """
    _check_table("prefix_lengths", prefix_lengths, "[B]", (1,), integer=True)
    lengths = capturable(prefix_lengths)

    def prefix_lm_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) | (kv_idx < lengths[b])

    def clauses(position: Tensor, num_keys: int) -> tuple[Clause, ...]:
        prefix = lengths[:, None].to(torch.int64).clamp(max=_INT32_MAX).to(torch.int32)
        hi = torch.maximum(position + 1, prefix)
        return (Clause(torch.zeros_like(hi), hi),)

    return _attach(prefix_lm_mask, Structure(clauses, 0, (Table("prefix_lengths", lengths, True),)))


def shift(mask_mod: MaskMod, q_offset: int | Tensor) -> MaskMod:
    """``mask_mod(b, h, q_idx + q_offset, kv_idx)``: any mask, for queries that start at position ``q_offset``.

    For Sq < Skv (chunked prefill, prefix cache), where query 0 is not token 0.

    Args:
        mask_mod: one of these masks, or any other.
        q_offset: tokens before the first query: an int, or an integer tensor ``[]`` or ``[B]`` on the device of the
            queries, which may change without a recompilation.

    Raises:
        TypeError: ``mask_mod`` is not callable, or ``q_offset`` is neither an int nor a tensor of integers.
        ValueError: ``q_offset`` has more than one dimension.
    """
    if not callable(mask_mod):
        raise TypeError(
            f"mask_mod: expected a function of (b, h, q_idx, kv_idx), got {type(mask_mod).__name__}; pass the mask "
            "first, the offset second"
        )
    if isinstance(q_offset, Tensor):
        _check_table("q_offset", q_offset, "[] or [B]", (0, 1), integer=True)
        offset: int | Tensor = capturable(q_offset)
    elif isinstance(q_offset, bool) or not isinstance(q_offset, int):
        raise TypeError(
            f"q_offset: expected an int or an integer tensor, got {q_offset!r} of type {type(q_offset).__name__}; "
            "pass the number of tokens before the first query as an int"
        )
    else:
        offset = q_offset
    per_sequence = isinstance(offset, Tensor) and offset.dim() == 1

    if per_sequence:

        def shift_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return mask_mod(b, h, q_idx + offset[b], kv_idx)  # type: ignore[index]
    else:

        def shift_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return mask_mod(b, h, q_idx + offset, kv_idx)

    inner = structure_of(mask_mod)
    inner_clauses = inner.clauses
    shifted: Callable[[Tensor, int], tuple[Clause, ...]] | None = None
    if inner_clauses is not None:

        def shifted(position: Tensor, num_keys: int) -> tuple[Clause, ...]:
            step = offset[:, None] if per_sequence else offset  # type: ignore[index]
            return inner_clauses((position + step).to(torch.int32), num_keys)

    own = (Table("q_offset", offset, per_sequence),) if isinstance(offset, Tensor) else ()
    nothing = inner.offset is None or (isinstance(inner.offset, int) and inner.offset == 0)
    total = offset if nothing else offset + inner.offset  # type: ignore[operator]
    return _attach(shift_mask, Structure(shifted, total, inner.tables + own))


def structure_of(mask_mod: MaskMod) -> Structure:
    """The structure of one of these masks, or of torch's ``and_masks`` / ``or_masks`` of some; else nothing known."""
    structure = getattr(mask_mod, "structure", None)
    if isinstance(structure, Structure):
        return structure
    # Inside a compiled region dynamo shows the closure wrongly, or not at all: there the mask is evaluated.
    name = getattr(mask_mod, "__name__", "")
    if name not in ("and_mask", "or_mask") or torch.compiler.is_compiling():
        return _UNKNOWN
    closure = getattr(mask_mod, "__closure__", None)
    if closure is None or mask_mod.__module__ != "torch.nn.attention.flex_attention":
        return _UNKNOWN
    parts = tuple(structure_of(part) for part in closure[0].cell_contents)
    tables = tuple(table for part in parts for table in part.tables)
    if any(part.clauses is None for part in parts):
        return Structure(None, None, tables)

    def clauses(position: Tensor, num_keys: int) -> tuple[Clause, ...]:
        terms = [part.clauses(position, num_keys)[: MAX_CLAUSES + 1] for part in parts if part.clauses is not None]
        if name == "or_mask":
            return tuple(clause for term in terms for clause in term)
        product: tuple[Clause, ...] = _full_clauses(position, num_keys)
        for term in terms:
            product = tuple(intersect(x, y) for x in product for y in term)[: MAX_CLAUSES + 1]
        return product

    return Structure(clauses, None, tables)


def clauses_of(
    structure: Structure, num_queries: int, num_keys: int, device: torch.device
) -> tuple[Clause, ...] | None:
    """The clauses of a mask for queries 0 .. Sq - 1, which may reach beyond the keys; None if it must be evaluated."""
    if structure.clauses is None:
        return None
    index = torch.arange(num_queries, dtype=torch.int32, device=device)[None]
    clauses = structure.clauses(index, num_keys)
    if not 0 < len(clauses) <= MAX_CLAUSES:
        return None
    return clauses


def _label_clauses(name: str, table: Tensor, num_tokens: int) -> Callable[[Tensor, int], tuple[Clause, ...]]:
    """Clauses of a table of labels ``[S]`` or ``[B, S]``, padded: everywhere, equal labels."""
    labels = table if table.dim() == 2 else table[None]

    def clauses(position: Tensor, num_keys: int) -> tuple[Clause, ...]:
        if num_tokens < num_keys:
            raise ValueError(
                f"{name}: expected a value for each of the {num_keys} keys, got {num_tokens}; give the mask of all "
                "keys, cached ones included"
            )
        batch = max(labels.shape[0], position.shape[0])
        place = position.clamp(0, labels.shape[1] - 1).to(torch.int64).expand(batch, -1)
        everywhere = _full_clauses(position, num_keys)[0]
        return (everywhere._replace(q_label=labels.expand(batch, -1).gather(1, place), k_label=labels[:, :num_keys]),)

    return clauses


def _padded(table: Tensor, value: int | bool) -> Tensor:
    """Pad the last dimension: compiled kernels look up the padding of a ragged last tile, of shifted queries too."""
    padding = -table.shape[-1] % MAX_BLOCK_SIZE + MAX_BLOCK_SIZE
    return capturable(F.pad(table.detach(), (0, padding), value=value))  # always a copy


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
