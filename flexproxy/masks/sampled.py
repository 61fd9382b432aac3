"""A mask at some queries and some keys: what the estimator needs to know of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from flexproxy.masks.clauses import allowed
from flexproxy.masks.structure import MaskMod
from flexproxy.ops.compat import in_a_mode
from flexproxy.ops.operators import capturable
from flexproxy.ops.tensors import pad_to_multiple

MergeHeads = Callable[[Tensor], Tensor]
"""From bool ``[b, heads, ...]`` to ``[b, P or 1, ...]``: whether any head of a group has it."""

QueryIndex = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From (b, h, row, kv_idx) to the index of the query."""


class SampledMask(NamedTuple):
    """The mask at some queries (sampled, probed or all) and some keys, by clauses (NOTE [Clauses]) or by bits.

    lo, hi: int32 ``[C, b, queries]``. q_label: ``[C, b, queries]``, k_label: ``[C, b, keys]``, or both None.
    bits:   uint8 ``[b, heads, queries, ceil(keys / 8)]``, little end first, where the mask has no clauses.
    listed: bool ``[b, h, Nq, Nk]``, the blocks to which the lists of a caller's BlockMask confine it; None for all.
    """

    lo: Tensor | None = None
    hi: Tensor | None = None
    q_label: Tensor | None = None
    k_label: Tensor | None = None
    bits: Tensor | None = None
    listed: Tensor | None = None

    def every(self, q_stride: int | None, k_stride: int) -> SampledMask:
        """The clauses at every ``q_stride``-th query (None for all of them) and every ``k_stride``-th key."""

        def take(part: Tensor | None, stride: int | None) -> Tensor | None:
            return None if part is None else part[..., ::stride]

        lo, hi, q_label = (take(part, q_stride) for part in (self.lo, self.hi, self.q_label))
        return SampledMask(lo, hi, q_label, take(self.k_label, k_stride), self.bits, self.listed)

    def at(self, queries: Tensor) -> SampledMask:
        """The clauses, which are those of all queries, at some queries of each head. Bits are left as they are.

        queries: int64 ``[b, heads, m]``; ``b`` is that of the clauses, or theirs is 1.

        Returns:
            Clauses with heads: ``[C, b, heads, m]``, and ``[C, b, 1, keys]`` of the keys.
        """

        def take(part: Tensor | None) -> Tensor | None:
            if part is None:
                return None
            index = queries.expand(part.shape[0], *queries.shape)
            return part[:, :, None].expand(-1, *queries.shape[:2], -1).gather(-1, index)

        k_label = None if self.k_label is None else self.k_label[:, :, None]
        return self._replace(lo=take(self.lo), hi=take(self.hi), q_label=take(self.q_label), k_label=k_label)

    def listed_at(self, queries: Tensor, block_size: int) -> SampledMask:
        """With a row of ``listed`` for each of some queries, int64 ``[b, heads, m]``, instead of for each block."""
        if self.listed is None:
            return self
        shape = torch.broadcast_shapes(self.listed.shape[:2], queries.shape[:2])
        rows = (queries // block_size).expand(*shape, -1)[..., None].expand(-1, -1, -1, self.listed.shape[3])
        return self._replace(listed=self.listed.expand(*shape, -1, -1).gather(2, rows))

    def pairs(self, queries: Tensor, slots: Tensor, keys: Tensor, block_size: int) -> Tensor:
        """At some queries of each head, and some keys: bool ``[b, heads, m, n]``; clauses are those of all.

        queries, slots: int64 ``[b, heads, m]``, their places in the clauses, and in the bits. keys: int64 ``[b, n]``.
        """
        b, h = (torch.arange(size, device=keys.device) for size in queries.shape[:2])
        b, h, key = b[:, None, None, None], h[:, None, None], keys[:, None, None]
        if self.bits is not None:
            byte = self.bits.expand(*queries.shape[:2], -1, -1)[b, h, slots[..., None], key // 8]
            return (byte >> (key % 8).to(torch.uint8)) & 1 != 0
        lo, hi, q_label, k_label, _, listed = self.at(queries)
        if lo is None or hi is None:
            raise AttributeError("this SampledMask has neither clauses nor bits")
        if k_label is not None:
            index = keys[:, None].expand(len(k_label), -1, -1, -1)
            k_label = k_label.expand(-1, len(keys), -1, -1).gather(-1, index)
        ok = allowed(lo, hi, q_label, k_label, key)
        if listed is not None:
            listed = listed.expand(*queries.shape[:2], -1, -1)
            ok &= listed[b, h, queries[..., None] // block_size, key // block_size]
        return ok

    def reach(self, rows: slice, num_keys: int, key_step: int = 1) -> tuple[slice, slice]:
        """Keys of which some of these queries may see some, and keys of which they all see all; either may be empty.

        Known without evaluating pairs where the mask has clauses, and on a CPU, where looking at them costs no wait.
        Elsewhere these are all keys and none. Rows and keys are as in ``chunk``.
        """
        every, none = slice(0, num_keys), slice(0, 0)
        if self.lo is None or self.hi is None or self.lo.device.type != "cpu" or in_a_mode():
            return every, none
        lo, hi = self.lo[..., rows], self.hi[..., rows]

        def keys(begin: Tensor, end: Tensor) -> slice:
            first, last = (min(max(0, -(-int(x) // key_step)), num_keys) for x in (begin, end))
            return slice(first, max(first, last))

        single = len(lo) == 1 and self.q_label is None and self.listed is None
        return keys(lo.amin(), hi.amax()), keys(lo.amax(), hi.amin()) if single else none

    def chunk(self, rows: slice, keys: slice, key_step: int = 1, cell: tuple[int, int] = (1, 1)) -> Tensor:
        """Some of the queries and keys, as bool ``[b, heads, rows, keys]``; key n is at position n * key_step.

        ``keys.start`` must be a multiple of 8. cell: queries and keys of a block of ``listed``.
        """
        if self.bits is not None:
            packed = self.bits[:, :, rows, keys.start // 8 : -(-keys.stop // 8), None]
            shifts = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
            return ((packed >> shifts) & 1).bool().flatten(-2)[..., : keys.stop - keys.start]
        if self.lo is None or self.hi is None:
            raise AttributeError("this SampledMask has neither clauses nor bits")
        position = torch.arange(keys.start, keys.stop, dtype=torch.int32, device=self.lo.device) * key_step
        q_part = self.q_label[..., rows] if self.q_label is not None else None
        k_part = self.k_label[..., keys] if self.k_label is not None else None
        ok = allowed(self.lo[..., rows], self.hi[..., rows], q_part, k_part, position)
        ok = ok if self.lo.dim() == 4 else ok[:, None]
        if self.listed is None:
            return ok
        row = torch.arange(rows.start, rows.stop, device=ok.device) // cell[0]
        key = torch.arange(keys.start, keys.stop, device=ok.device) // cell[1]
        return ok & self.listed[:, :, row[:, None], key]


def uncertain(keys: slice, certain: slice) -> list[slice]:
    """The keys beside those that are certainly seen: before them and after them, where there are any."""
    if max(keys.start, certain.start) >= min(keys.stop, certain.stop):
        return [keys]
    sides = slice(keys.start, certain.start), slice(certain.stop, keys.stop)
    return [side for side in sides if side.start < side.stop]


def pack_bits(mask: Tensor) -> Tensor:
    """bool ``[..., n]`` to uint8 ``[..., ceil(n / 8)]``, little end first."""
    padded: Tensor = pad_to_multiple(mask, -1, 8, False).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(-1, dtype=torch.uint8)


def evaluated_at(
    mask_mod: MaskMod, queries: Tensor, num_keys: int, stride: int = 1, merge_heads: MergeHeads | None = None
) -> SampledMask:
    """A mask by bits, at some queries ``[b, h, m]`` (int64) of each head and every ``stride``-th key."""
    queries = capturable(queries)

    def query(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return queries[b, h, row]

    return evaluate_bits(mask_mod, (*queries.shape, num_keys), query, queries.device, stride, merge_heads)


def evaluate_bits(
    mask_mod: MaskMod,
    shape: tuple[int, int, int, int],
    query: QueryIndex,
    device: torch.device,
    stride: int = 1,
    merge_heads: MergeHeads | None = None,
) -> SampledMask:
    """``evaluate`` by bits, at every ``stride``-th key."""
    batch, heads, number, num_keys = shape
    rows_per_chunk = max(1, evaluated_elements(device) // (batch * heads * num_keys))

    def piece(start: int) -> Tensor:
        def q_index(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            return query(b, h, row + start, key)

        rows = min(rows_per_chunk, number - start)
        mask = evaluate(mask_mod, (batch, heads, rows, num_keys), q_index, device)[..., ::stride]
        return pack_bits(mask if merge_heads is None else merge_heads(mask))

    first, pieces = piece(0), -(-number // rows_per_chunk)
    if pieces == 1:
        return SampledMask(bits=first)
    bits = first.new_empty(*first.shape[:2], number, first.shape[3])  # all pieces beside it would take it twice
    bits[:, :, :rows_per_chunk] = first
    for chunk in range(1, pieces):
        start = chunk * rows_per_chunk
        bits[:, :, start : start + rows_per_chunk] = piece(start)
    return SampledMask(bits=bits)


def evaluate(
    mask_mod: MaskMod,
    shape: tuple[int, int, int, int],
    q_index: QueryIndex,
    device: torch.device,
) -> Tensor:
    """Evaluate a mask at chosen queries and all keys: bool ``[batch, heads, rows, Skv]``, which is ``shape``."""

    def at_rows(b: Tensor, h: Tensor, row: Tensor, kv_idx: Tensor) -> Tensor:
        allowed: Any = mask_mod(b, h, q_index(b, h, row, kv_idx), kv_idx)
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            kind = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
            raise TypeError(f"mask_mod: expected a bool tensor as its result, got {kind}; use a comparison")
        result: Tensor = allowed & (row >= 0)  # a mask may ignore its arguments
        return result

    mask: Tensor = create_mask(at_rows, *shape, device=device)
    return mask


def evaluated_elements(device: torch.device) -> int:
    """Token pairs to evaluate at once: few on a CPU, for memory; on a GPU and in a trace more, for fewer steps."""
    if torch.compiler.is_compiling():
        return 2**28
    return 2**23 if device.type == "cpu" else 2**27
