"""One pass over all keys: for every row of queries and every block of keys, the largest logit or the log-sum-exp.

NOTE [One pass]
The scores need the largest logit of each key block beside the log-sum-exp of the whole row, the budgets the log-sum-exp
of each block. Both come from one pass over the logits: the values by block go to a buffer
``[b * h, row blocks, columns, rows of a block]``, the log-sum-exp of each run of keys to another,
``[b * h, splits, rows]``, and a second, memory-bound kernel combines the two, which reads the values of a row block in
one piece. All of them are in base 2: a GPU has no other exponential.

A block of more keys than the tile has is several columns. A row tile visits the keys that any of its rows may see, and
evaluates the mask only outside of the run of keys that all of its rows see.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.ops import compat
from flexproxy.ops.kernels.launch import Launched, Options, launch, power_of_2
from flexproxy.ops.kernels.row_summary import COLUMNS, END, FIRST, FULL_END, FULL_FIRST

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # triton before 3.3
    TensorDescriptor = None
if TYPE_CHECKING:
    from flexproxy.masks.sampled import SampledMask

LOG2_E = math.log2(math.e)
# Enough programs to fill a GPU twice. Where there would be fewer, each takes fewer steps than its tile says, at least
# MIN_STEPS.
MANY_PROGRAMS, MIN_STEPS = 512, 4
MAX_ROUNDED = 2**24  # numbers, of 4 bytes


class Tile(NamedTuple):
    """The work of one program: rows, keys of a step, steps of a split, warps, pipeline stages, whether TMA loads the
    keys, and the most registers of a thread (None leaves it to the compiler)."""

    rows: int
    keys: int
    steps: int
    warps: int
    stages: int
    tma: bool = False
    registers: int | None = None


@triton.jit
def _allowed(
    lo, hi, q_label, k_label, bits, listed, clause_row, bits_row, listed_row, row_ok, key, key_ok,
    clause_stride, label_stride, label_stride_k, label_at, key_step, k_cell,
    NUM_CLAUSES: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_LISTED: tl.constexpr,
):  # fmt: skip
    """The mask of a tile. See NOTE [Clauses]; without clauses the mask is one bit for each pair.

    listed: the blocks to which lists confine the clauses.
    """
    both = row_ok[:, None] & key_ok[None, :]
    if NUM_CLAUSES == 0:
        byte = tl.load(bits + bits_row[:, None] + (key // 8)[None, :], mask=both, other=0)
        return ((byte >> (key % 8)[None, :].to(tl.uint8)) & 1) != 0
    ok = both & (key < 0)[None, :]
    position = (key * key_step)[None, :]
    for c in tl.static_range(NUM_CLAUSES):
        at = clause_row + c * clause_stride
        first = tl.load(lo + at, mask=row_ok, other=0)
        last = tl.load(hi + at, mask=row_ok, other=0)
        inside = (position >= first[:, None]) & (position < last[:, None])
        if HAS_LABELS:
            row_label = tl.load(q_label + at, mask=row_ok, other=-1)
            key_label = tl.load(k_label + label_at + c * label_stride + key * label_stride_k, mask=key_ok, other=-2)
            inside &= (row_label[:, None] == key_label[None, :]) & (row_label >= 0)[:, None]
        ok |= inside & both
    if HAS_LISTED:
        ok &= tl.load(listed + listed_row[:, None] + (key // k_cell)[None, :], mask=both, other=0) != 0
    return ok


@triton.jit
def _reach(summary, summary_row, row_ok, num_keys, k_cell):
    """Keys that some row may see, and a run of keys that all rows see: begin, end, full_begin, full_end."""
    at = summary + summary_row * COLUMNS
    begin = tl.min(tl.where(row_ok, tl.load(at + FIRST, mask=row_ok, other=0) * k_cell, num_keys))
    end = tl.max(tl.load(at + END, mask=row_ok, other=0)) * k_cell
    full_begin = tl.max(tl.load(at + FULL_FIRST, mask=row_ok, other=0)) * k_cell
    full_end = tl.min(tl.where(row_ok, tl.load(at + FULL_END, mask=row_ok, other=0) * k_cell, num_keys))
    return begin, tl.minimum(end, num_keys), full_begin, tl.minimum(full_end, num_keys)


@triton.jit
def _step(
    queries, k, keys_at, batch, kv_head, values_at, key_stride, dim_stride, values_stride,
    lo, hi, q_label, k_label, bits, listed, clause_row, bits_row, listed_row, row_ok, clause_stride, label_stride,
    label_stride_k, label_at, tile, num_keys, num_columns, key_step, k_cell, head_dim, scale_log2, largest, total,
    MASKED: tl.constexpr, POSITIVE: tl.constexpr, SUMS: tl.constexpr, NUM_CLAUSES: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_LISTED: tl.constexpr, COLUMN: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of keys: writes its columns, returns the running maximum and sum of the rows."""
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if TMA:  # zeros beyond the end
        keys = tl.reshape(k.load([batch, kv_head, tile * BLOCK_N, 0]), [BLOCK_N, BLOCK_D]).T
    else:
        dim = tl.arange(0, BLOCK_D)
        at = k + keys_at + key[None, :].to(tl.int64) * key_stride + dim[:, None] * dim_stride  # [D, N]
        if MASKED:
            keys = tl.load(at, mask=(key < num_keys)[None, :] & (dim < head_dim)[:, None], other=0.0)
        elif WHOLE_D:
            keys = tl.load(at)
        else:
            keys = tl.load(at, mask=(dim < head_dim)[:, None], other=0.0)
    logits = tl.dot(queries, keys, input_precision="ieee")  # [M, N]
    scale = scale_log2
    if not POSITIVE:  # the largest logit is not that of the largest product
        logits *= scale_log2
        scale = 1.0
    if MASKED:
        ok = _allowed(
            lo, hi, q_label, k_label, bits, listed, clause_row, bits_row, listed_row, row_ok, key, key < num_keys,
            clause_stride, label_stride, label_stride_k, label_at, key_step, k_cell, NUM_CLAUSES, HAS_LABELS,
            HAS_LISTED,
        )  # fmt: skip
        # A maximum drops NaN: a block of NaN and -inf would look like one that no query sees.
        logits = tl.where(logits == logits, logits, float("inf"))
        logits = tl.where(ok, logits, float("-inf"))
    C: tl.constexpr = BLOCK_N // COLUMN
    by_column = tl.max(tl.reshape(logits, [logits.shape[0], C, COLUMN]), 2)  # [M, C]
    row_max = tl.max(by_column, 1) * scale
    new_largest = tl.maximum(largest, row_max)  # never -inf, for rows that see nothing: -inf - -inf is NaN
    # The sum of a column stands alone: under the maximum of all tiles it could vanish.
    base = tl.maximum(row_max, -3e38) if SUMS else new_largest
    weights = tl.exp2(logits * scale - base[:, None])
    # Summed over what a thread holds of a row, and only in the end across threads.
    tile_sum = tl.sum(tl.reshape(weights, [logits.shape[0], BLOCK_N // 8, 8]), 1)  # [M, 8]
    if SUMS:
        if C > 1:
            value = base[:, None] + tl.log2(tl.sum(tl.reshape(weights, [logits.shape[0], C, COLUMN]), 2))
        else:
            value = (base + tl.log2(tl.sum(tile_sum, 1)))[:, None]
        tile_sum *= tl.exp2(base - new_largest)[:, None]
    else:
        value = by_column * scale
    column = tile * C + tl.arange(0, C)
    where = values_at[:, None] + column[None, :].to(tl.int64) * values_stride
    tl.store(where, value, mask=row_ok[:, None] & (column < num_columns)[None, :])
    return new_largest, total * tl.exp2(largest - new_largest)[:, None] + tile_sum


NUMBERS = [
    "row_index_stride_b", "row_index_stride_h", "lo_stride_c", "lo_stride_b", "lo_stride_s",
    "k_label_stride_c", "k_label_stride_b", "k_label_stride_s", "bits_stride_b", "bits_stride_h", "bits_stride_s",
    "listed_stride_b", "listed_stride_h", "listed_stride_r", "summary_stride_b", "summary_stride_h", "first_row",
    "num_rows", "num_keys", "num_columns", "rows_in_buffer", "steps", "heads", "group", "key_step", "q_cell", "k_cell",
    "listed_cell", "head_dim", "scale_log2",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _block_logits_kernel(
    q, k, row_index, lo, hi, q_label, k_label, bits, listed, summary, values, partial,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d, k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    row_index_stride_b, row_index_stride_h, lo_stride_c, lo_stride_b, lo_stride_s,
    k_label_stride_c, k_label_stride_b, k_label_stride_s, bits_stride_b, bits_stride_h, bits_stride_s,
    listed_stride_b, listed_stride_h, listed_stride_r, summary_stride_b, summary_stride_h,
    first_row, num_rows, num_keys, num_columns, rows_in_buffer, steps, heads, group, key_step, q_cell, k_cell,
    listed_cell, head_dim, scale_log2,
    HAS_INDEX: tl.constexpr, POSITIVE: tl.constexpr, SUMS: tl.constexpr,
    NUM_CLAUSES: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_LISTED: tl.constexpr, COLUMN: tl.constexpr,
    BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // heads, bh % heads
    in_buffer = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = first_row + in_buffer
    row_ok = (in_buffer < rows_in_buffer) & (row < num_rows)
    source = row.to(tl.int64)
    if HAS_INDEX:
        source = tl.load(row_index + b * row_index_stride_b + h * row_index_stride_h + row, mask=row_ok, other=-1)
        row_ok &= source >= 0
        source = tl.maximum(source, 0)
    dim = tl.arange(0, BLOCK_D)
    queries = tl.load(
        q + b * q_stride_b + h * q_stride_h + source[:, None] * q_stride_s + dim[None, :] * q_stride_d,
        mask=row_ok[:, None] & (dim < head_dim)[None, :],
        other=0.0,
    )
    clause_row = b * lo_stride_b + source * lo_stride_s
    bits_row = b * bits_stride_b + h * bits_stride_h + row.to(tl.int64) * bits_stride_s
    listed_row = b * listed_stride_b + h * listed_stride_h + (row // listed_cell).to(tl.int64) * listed_stride_r
    row_block = source // (k_cell * key_step) if HAS_INDEX else (row // q_cell).to(tl.int64)
    begin, end, full_begin, full_end = _reach(
        summary + b * summary_stride_b + h * summary_stride_h, row_block, row_ok, num_keys, k_cell
    )
    first = tl.maximum(begin // BLOCK_N, split * steps)
    last = tl.maximum(tl.minimum(tl.cdiv(end, BLOCK_N), (split + 1) * steps), first)
    full_first = tl.minimum(tl.maximum(tl.cdiv(full_begin, BLOCK_N), first), last)
    full_last = tl.maximum(tl.minimum(full_end // BLOCK_N, last), full_first)

    batch, kv_head = b.to(tl.int32), (h // group).to(tl.int32)
    keys_at = b * k_stride_b + (h // group) * k_stride_h
    buffer_block = bh * tl.cdiv(rows_in_buffer, q_cell) + in_buffer // q_cell
    values_at = values + buffer_block * num_columns * q_cell + in_buffer % q_cell
    label_at = b * k_label_stride_b
    largest = tl.full([BLOCK_M], -3e38, tl.float32)
    total = tl.zeros([BLOCK_M, 8], tl.float32)
    for tile in tl.range(full_first, full_last):
        largest, total = _step(
            queries, k, keys_at, batch, kv_head, values_at, k_stride_s, k_stride_d, q_cell,
            lo, hi, q_label, k_label, bits, listed, clause_row, bits_row, listed_row, row_ok, lo_stride_c,
            k_label_stride_c, k_label_stride_s, label_at, tile, num_keys, num_columns, key_step, k_cell, head_dim,
            scale_log2, largest, total,
            False, POSITIVE, SUMS, NUM_CLAUSES, HAS_LABELS, HAS_LISTED, COLUMN, BLOCK_N, BLOCK_D, WHOLE_D, TMA,
        )  # fmt: skip
    for n in tl.range(0, last - first - (full_last - full_first), num_stages=1):
        tile = first + n
        tile = tl.where(tile < full_first, tile, tile + (full_last - full_first))
        largest, total = _step(
            queries, k, keys_at, batch, kv_head, values_at, k_stride_s, k_stride_d, q_cell,
            lo, hi, q_label, k_label, bits, listed, clause_row, bits_row, listed_row, row_ok, lo_stride_c,
            k_label_stride_c, k_label_stride_s, label_at, tile, num_keys, num_columns, key_step, k_cell, head_dim,
            scale_log2, largest, total,
            True, POSITIVE, SUMS, NUM_CLAUSES, HAS_LABELS, HAS_LISTED, COLUMN, BLOCK_N, BLOCK_D, WHOLE_D, TMA,
        )  # fmt: skip
    if SUMS:  # columns that no row may see
        nothing = tl.full([BLOCK_M, BLOCK_N // COLUMN], float("-inf"), tl.float32)
        for n in tl.range(0, steps - (last - first), num_stages=1):
            tile = split * steps + n
            tile = tl.where(tile < first, tile, tile + (last - first))
            column = tile * (BLOCK_N // COLUMN) + tl.arange(0, BLOCK_N // COLUMN)
            where = values_at[:, None] + column[None, :].to(tl.int64) * q_cell
            tl.store(where, nothing, mask=row_ok[:, None] & (column < num_columns)[None, :])
    lse = largest + tl.log2(tl.sum(total, 1))
    partial_at = partial + (bh * tl.num_programs(1) + split) * rows_in_buffer + in_buffer
    tl.store(partial_at, lse, mask=in_buffer < rows_in_buffer)


@triton.jit
def combine_splits(partial_at, splits, stride, ok, BLOCK_S: tl.constexpr):
    """Log-sum-exps of some rows from those of their splits, which lie ``stride`` apart; -inf where not ok."""
    split = tl.arange(0, BLOCK_S)
    largest = tl.full(partial_at.shape, -3e38, tl.float32)
    total = tl.zeros(partial_at.shape, tl.float32)
    for start in tl.range(0, splits, BLOCK_S):
        at = partial_at[None, :] + (start + split)[:, None].to(tl.int64) * stride
        part = tl.load(at, mask=(start + split < splits)[:, None] & ok[None, :], other=float("-inf"))
        new_largest = tl.maximum(largest, tl.max(part, 0))
        # A maximum drops NaN, a sum keeps it.
        total = total * tl.exp2(largest - new_largest) + tl.sum(tl.exp2(part - new_largest[None, :]), 0)
        largest = new_largest
    return largest + tl.log2(total)


class BlockLogits(NamedTuple):
    """values: fp32 ``[B, H, row blocks, columns, q_cell]``. partial: log-sum-exps, fp32 ``[B, H, splits, rows]``."""

    values: Tensor
    partial: Tensor
    launched: Launched | None


def block_logits(
    q: Tensor,
    k: Tensor,
    mask: SampledMask,
    tile: Tile,
    scale: float,
    *,
    rows: slice,
    q_cell: int,
    k_cell: int,
    summary: Tensor,
    key_step: int = 1,
    row_index: Tensor | None = None,
    sums: bool = False,
    out: BlockLogits | None = None,
) -> BlockLogits:
    """Largest logits, or log-sum-exps, of blocks, and those of rows. See NOTE [One pass].

    Args:
        q, k: ``[B, H, rows, D]`` (or, with ``row_index``, ``[B, H, Sq, D]``) and ``[B, h, keys, D]``, any strides.
        mask: at these queries and keys; with ``row_index`` its clauses are those of all queries, and ``listed`` has a
            row for each of these where ``sums`` are asked for.
        scale: of the logits.
        rows: which of the rows.
        q_cell, k_cell: rows, and keys, per block. key_step: tokens from one key to the next.
        summary: int32 ``[b, h, blocks, 7]`` of ``summarize_rows``: of blocks of ``q_cell`` rows, with ``row_index`` of
            the blocks of q, which have as many tokens as those of keys.
        row_index: int64 ``[b, h, rows]``, the rows' places in q, -1 for none.
        sums: log-sum-exps of the blocks instead of their largest logits.
        out: the result of a call of the same shapes, to be written over.
    """
    lo, hi, q_label, k_label, bits, listed = mask
    batch, heads, _, head_dim = q.shape
    num_keys = k.shape[2]
    block_d = power_of_2(head_dim, 16, 256)
    column = min(k_cell, tile.keys)
    num_columns = -(-num_keys // column)
    number = rows.stop - rows.start
    row_tiles, key_tiles = -(-number // tile.rows), -(-num_keys // tile.keys)
    # The probes are last queries, which see most keys; under a causal mask half of the other programs see nothing.
    programs = MANY_PROGRAMS if sums else 2 * MANY_PROGRAMS
    steps = min(tile.steps, max(MIN_STEPS, key_tiles * row_tiles * batch * heads // programs))
    splits = -(-key_tiles // steps)
    if out is None:
        row_blocks = -(-number // q_cell)
        shape = batch, heads, row_blocks, num_columns, q_cell
        count = math.prod(shape)
        # Rounded up, so that the graphs of many lengths, which share their memory, find room where others had theirs.
        taken = max(count, power_of_2(count, 1, MAX_ROUNDED))
        values = torch.empty(taken, dtype=torch.float32, device=q.device)[:count].view(shape)
        partial = torch.empty(batch, heads, splits, number, dtype=torch.float32, device=q.device)
    else:
        values, partial, _ = out
    descriptor = _descriptor(k, [1, 1, tile.keys, block_d]) if tile.tma else None
    launched = launch(
        _block_logits_kernel,
        (row_tiles, splits, batch * heads),
        Options(tile.warps, tile.stages, tile.registers),
        q=q,
        k=descriptor or k,
        row_index=row_index,
        lo=lo,
        hi=hi,
        q_label=q_label,
        k_label=k_label,
        bits=bits,
        listed=listed,
        summary=summary,
        values=values,
        partial=partial,
        first_row=rows.start,
        num_rows=rows.stop,
        num_keys=num_keys,
        num_columns=num_columns,
        rows_in_buffer=number,
        steps=steps,
        heads=heads,
        group=heads // k.shape[1],
        key_step=key_step,
        q_cell=q_cell,
        k_cell=k_cell,
        listed_cell=1 if sums else q_cell,
        head_dim=head_dim,
        scale_log2=scale * LOG2_E,
        HAS_INDEX=row_index is not None,
        POSITIVE=scale > 0,
        SUMS=sums,
        NUM_CLAUSES=0 if lo is None else lo.shape[0],
        HAS_LABELS=q_label is not None,
        HAS_LISTED=listed is not None,
        COLUMN=column,
        BLOCK_D=block_d,
        WHOLE_D=head_dim == block_d,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        TMA=descriptor is not None,
    )
    return BlockLogits(values, partial, launched)


@functools.cache
def has_tma(device: torch.device) -> bool:
    """Whether the device can load tiles with TMA: Hopper and later, and the interpreter."""
    return device.type != "cuda" or compat.capability(device) >= (9, 0)


def _descriptor(x: Tensor, block: list[int]) -> Any:
    """A descriptor for TMA; None where the device has none, or the layout does not fit."""
    strides = x.stride()
    aligned = all(stride * x.element_size() % 16 == 0 for stride in strides[:-1])
    if TensorDescriptor is None or not has_tma(x.device):
        return None
    if strides[-1] != 1 or not aligned or x.data_ptr() % 16:
        return None
    return TensorDescriptor(x, list(x.shape), list(strides), block)
