"""Triton kernels that classify blocks by clauses (NOTE [Clauses]), and that summarize rows of blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.ops import row_summary
from flexproxy.ops.kernels.launch import Options, launch, power_of_2
from flexproxy.ops.kernels.row_summary import COLUMNS, DENSE, END, FIRST, FULL_END, FULL_FIRST, NUMBER, SINK
from flexproxy.ops.tensors import pad_to_multiple

if TYPE_CHECKING:
    from flexproxy.masks.clauses import ClauseStack


@triton.jit
def _keys_in_union(
    lo, hi, first, last, row_label_at, row_ok, q_label, key_label_at, key_label, clause_stride, label_stride,
    NUM_CLAUSES: tl.constexpr, HAS_LABELS: tl.constexpr,
):  # fmt: skip
    """How many of the keys first .. last - 1 (which have one label) the union of clauses allows to each row."""
    count = tl.zeros_like(row_label_at + first).to(tl.int32)
    for subset in tl.static_range(1, 2**NUM_CLAUSES):  # inclusion and exclusion
        begin = tl.zeros_like(count) + first
        end = tl.zeros_like(count) + last
        sign = -1
        for c in tl.static_range(NUM_CLAUSES):
            if (subset >> c) % 2 == 1:
                sign = -sign
                begin = tl.maximum(begin, tl.load(lo + row_label_at + c * clause_stride, mask=row_ok, other=0))
                end = tl.minimum(end, tl.load(hi + row_label_at + c * clause_stride, mask=row_ok, other=0))
                if HAS_LABELS:
                    row_label = tl.load(q_label + row_label_at + c * clause_stride, mask=row_ok, other=-1)
                    same = (row_label == tl.load(key_label + key_label_at + c * label_stride)) & (row_label >= 0)
                    end = tl.where(same, end, begin)
        count += sign * tl.maximum(end - begin, 0)
    return count


NUMBERS = ["lo_stride_c", "k_label_stride_c", "lowest_stride_c", "num_queries", "num_keys", "num_k_blocks"]


@triton.jit(do_not_specialize=[name for name in NUMBERS if not name.startswith(("k_label", "lowest"))])
def _intervals_kernel(
    lo, hi, any_, full, valid, lo_stride_c, num_queries, num_keys, num_k_blocks,
    NUM_CLAUSES: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Clauses without labels: one row of blocks."""
    i = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    row = i * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    row_ok = row < num_queries
    at = b * num_queries + row
    begin, end = num_keys, 0
    full_begin, full_end = num_keys, 0  # keys that one clause allows to every row
    seen = row < 0
    for c in tl.static_range(NUM_CLAUSES):
        first = tl.maximum(tl.load(lo + at + c * lo_stride_c, mask=row_ok, other=0), 0)
        last = tl.minimum(tl.load(hi + at + c * lo_stride_c, mask=row_ok, other=0), num_keys)
        begin = tl.minimum(begin, tl.min(tl.where(row_ok, first, num_keys)))
        end = tl.maximum(end, tl.max(last))
        full_begin, full_end = tl.max(first), tl.min(last)  # 0 where there is no row
        seen |= last > first
    tl.store(valid + at, seen, mask=row_ok)
    # Nothing before begin and behind end, everything between full_begin and full_end: counted is only in between.
    full_begin, full_end = tl.minimum(full_begin, end), tl.maximum(full_end, full_begin)
    out = (b * tl.num_programs(0) + i) * num_k_blocks
    for start in tl.range(0, num_k_blocks, BLOCK_W):
        j = start + tl.arange(0, BLOCK_W)
        whole = (j * BLOCK_SIZE >= full_begin) & ((j + 1) * BLOCK_SIZE <= full_end)
        tl.store(any_ + out + j, whole, mask=j < num_k_blocks)
        tl.store(full + out + j, whole, mask=j < num_k_blocks)
    tl.debug_barrier()  # some of these are written again
    left = begin // BLOCK_SIZE
    left_end = tl.minimum(tl.cdiv(full_begin, BLOCK_SIZE), num_k_blocks)
    right = tl.maximum(full_end // BLOCK_SIZE, left_end)
    right_end = tl.minimum(tl.cdiv(end, BLOCK_SIZE), num_k_blocks)
    chunks = tl.cdiv(tl.maximum(left_end - left, 0), BLOCK_J)
    for chunk in tl.range(0, chunks + tl.cdiv(tl.maximum(right_end - right, 0), BLOCK_J)):
        start = tl.where(chunk < chunks, left + chunk * BLOCK_J, right + (chunk - chunks) * BLOCK_J)
        stop = tl.where(chunk < chunks, left_end, right_end)
        j = start + tl.arange(0, BLOCK_J)
        first_key = (j * BLOCK_SIZE)[None, :]
        last_key = tl.minimum(first_key + BLOCK_SIZE, num_keys)
        count = _keys_in_union(
            lo, hi, first_key, last_key, at[:, None], row_ok[:, None], lo, 0, lo, lo_stride_c, 0, NUM_CLAUSES, False
        )
        tl.store(any_ + out + j, tl.max(count, 0) > 0, mask=j < stop)
        tl.store(full + out + j, tl.min(count, 0) == BLOCK_SIZE, mask=j < stop)


@triton.jit(do_not_specialize=NUMBERS)
def _labels_kernel(
    lo, hi, q_label, k_label, lowest, highest, any_, full, valid,
    lo_stride_c, k_label_stride_c, lowest_stride_c, num_queries, num_keys, num_k_blocks,
    NUM_CLAUSES: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Clauses with labels: one row of blocks. Tokens are compared only in blocks of keys with several labels.

    lowest, highest: int64 ``[C, b, Nk]``, of the labels in each block of keys.
    """
    i = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    row = i * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    row_ok = row < num_queries
    at = b * num_queries + row
    seen = row < 0
    out = (b * tl.num_programs(0) + i) * num_k_blocks
    for j in tl.range(0, num_k_blocks):
        first = j * BLOCK_SIZE
        last = tl.minimum(first + BLOCK_SIZE, num_keys)
        relevant = False
        uniform = True
        for c in tl.static_range(NUM_CLAUSES):
            row_label = tl.load(q_label + at + c * lo_stride_c, mask=row_ok, other=-1)
            low = tl.load(lowest + c * lowest_stride_c + b * num_k_blocks + j)
            high = tl.load(highest + c * lowest_stride_c + b * num_k_blocks + j)
            begin = tl.load(lo + at + c * lo_stride_c, mask=row_ok, other=0)
            end = tl.load(hi + at + c * lo_stride_c, mask=row_ok, other=0)
            reaches = (begin < last) & (end > first) & (row_label >= low) & (row_label <= high) & (row_label >= 0)
            relevant |= tl.max(reaches.to(tl.int32)) > 0
            uniform &= low == high
        some = False
        all_ = False
        if relevant:
            if uniform:
                count = _keys_in_union(
                    lo, hi, first, last, at, row_ok, q_label, b * num_k_blocks + j, lowest, lo_stride_c,
                    lowest_stride_c, NUM_CLAUSES, True,
                )  # fmt: skip
            else:
                count = tl.zeros([BLOCK_SIZE], tl.int32)
                for start in tl.range(0, BLOCK_SIZE, BLOCK_K):
                    key = first + start + tl.arange(0, BLOCK_K)
                    ok = (row < 0)[:, None] & (key < 0)[None, :]
                    for c in tl.static_range(NUM_CLAUSES):
                        row_label = tl.load(q_label + at + c * lo_stride_c, mask=row_ok, other=-1)
                        key_label = tl.load(
                            k_label + c * k_label_stride_c + b * num_keys + key, mask=key < num_keys, other=-2
                        )
                        begin = tl.load(lo + at + c * lo_stride_c, mask=row_ok, other=0)
                        end = tl.load(hi + at + c * lo_stride_c, mask=row_ok, other=0)
                        same = (row_label[:, None] == key_label[None, :]) & (row_label >= 0)[:, None]
                        ok |= same & (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
                    count += tl.sum(ok.to(tl.int32), 1)
            seen |= count > 0
            some = tl.max(count) > 0
            all_ = tl.min(count) == BLOCK_SIZE
        tl.store(any_ + out + j, some)
        tl.store(full + out + j, all_)
    tl.store(valid + at, seen, mask=row_ok)


def classify_clauses(clauses: ClauseStack, num_keys: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """``flexproxy.masks.blocks.classify_clauses``."""
    lo, hi, q_label, k_label = clauses
    num_clauses, batch, num_queries = lo.shape
    num_q_blocks, num_k_blocks = -(-num_queries // block_size), -(-num_keys // block_size)
    any_ = torch.empty(batch, 1, num_q_blocks, num_k_blocks, dtype=torch.bool, device=lo.device)
    full = torch.empty_like(any_)
    valid = torch.empty(batch, 1, num_queries, dtype=torch.bool, device=lo.device)
    lo, hi = lo.contiguous(), hi.contiguous()
    if q_label is None or k_label is None:
        launch(
            _intervals_kernel,
            (num_q_blocks, batch, 1),
            lo=lo,
            hi=hi,
            any_=any_,
            full=full,
            valid=valid,
            num_queries=num_queries,
            num_keys=num_keys,
            num_k_blocks=num_k_blocks,
            NUM_CLAUSES=num_clauses,
            BLOCK_SIZE=block_size,
            BLOCK_W=power_of_2(num_k_blocks, 16, 1024),
            BLOCK_J=max(2, min(16, 8192 // block_size)),
        )
        return any_, full, valid
    q_label, k_label = q_label.contiguous(), k_label.contiguous()
    # A ragged last block has several labels, the padding's among them: there tokens are compared.
    by_block = pad_to_multiple(k_label, -1, block_size, -1).unflatten(-1, (-1, block_size))
    lowest, highest = by_block.amin(-1), by_block.amax(-1)
    launch(
        _labels_kernel,
        (num_q_blocks, batch, 1),
        lo=lo,
        hi=hi,
        q_label=q_label,
        k_label=k_label,
        lowest=lowest,
        highest=highest,
        any_=any_,
        full=full,
        valid=valid,
        num_queries=num_queries,
        num_keys=num_keys,
        num_k_blocks=num_k_blocks,
        NUM_CLAUSES=num_clauses,
        BLOCK_SIZE=block_size,
        BLOCK_K=max(16, min(block_size, 8192 // block_size)),
    )
    return any_, full, valid


@triton.jit(do_not_specialize=["num_k_blocks"])
def _summary_kernel(any_, full, sequence, summary, num_k_blocks, BLOCK_J: tl.constexpr):
    """One row of blocks."""
    row = tl.program_id(0).to(tl.int64)
    first, end, number = num_k_blocks, 0, 0
    full_first, full_end = num_k_blocks, num_k_blocks
    for start in tl.range(0, num_k_blocks, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        some = tl.load(any_ + row * num_k_blocks + j, mask=j < num_k_blocks, other=0) != 0
        all_ = tl.load(full + row * num_k_blocks + j, mask=j < num_k_blocks, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(some, j, num_k_blocks)))
        end = tl.maximum(end, tl.max(tl.where(some, j + 1, 0)))
        number += tl.sum(some.to(tl.int32))
        full_first = tl.minimum(full_first, tl.min(tl.where(all_, j, num_k_blocks)))
        after = (j > full_first) & (all_ == 0)
        full_end = tl.minimum(full_end, tl.min(tl.where(after, tl.minimum(j, num_k_blocks), num_k_blocks)))
    at = summary + row * COLUMNS
    tl.store(at + FIRST, first)
    tl.store(at + END, end)
    tl.store(at + FULL_FIRST, full_first)
    tl.store(at + FULL_END, full_end)
    tl.store(at + NUMBER, number)
    tl.store(at + SINK, tl.load(sequence + row * 2))
    tl.store(at + DENSE, tl.load(sequence + row * 2 + 1))


def summarize_rows(any_: Tensor, full: Tensor, sequence: Tensor) -> Tensor:
    """``flexproxy.masks.blocks.summarize_rows``."""
    any_, full, sequence = any_.contiguous(), full.contiguous(), sequence.contiguous()
    summary = torch.empty(*any_.shape[:3], row_summary.COLUMNS, dtype=torch.int32, device=any_.device)
    rows, num_k_blocks = any_.shape[:3].numel(), any_.shape[3]
    launch(
        _summary_kernel,
        (rows, 1, 1),
        Options(warps=1),
        any_=any_,
        full=full,
        sequence=sequence,
        summary=summary,
        num_k_blocks=num_k_blocks,
        BLOCK_J=power_of_2(num_k_blocks, 16, 1024),
    )
    return summary
