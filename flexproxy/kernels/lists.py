"""Triton kernel of stages 5 and 6: the blocks of every head, as a map and as ascending lists. See NOTE [Lists]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.kernels.rank import broadcast_strides

Lists = tuple[Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _kept_blocks(
    rank_row, kept_row, admissible_row, full_row, count, j, num_k_blocks,
    FROM_RANK: tl.constexpr,
):  # fmt: skip
    """Which of the blocks j are kept, and which of those are full."""
    inside = j < num_k_blocks
    if FROM_RANK:
        some = tl.load(admissible_row + j, mask=inside, other=0) != 0
        kept = some & (tl.load(rank_row + j, mask=inside, other=2147483647) < count)
    else:
        kept = tl.load(kept_row + j, mask=inside, other=0) != 0
    return kept, kept & (tl.load(full_row + j, mask=inside, other=0) != 0)


@triton.jit
def _store_list(index, listed, j, num_k_blocks, before, total):
    """Listed blocks in ascending order, those not listed behind: all columns are written."""
    position = before + tl.cumsum(listed, 0) - listed
    place = tl.where(listed != 0, position, total + j - position)
    tl.store(index + place, j, mask=j < num_k_blocks)


@triton.jit(do_not_specialize=["num_k_blocks"])
def _lists_kernel(
    rank, count, proxy_of, admissible, kept, full, partial_number, partial_index, full_number, full_index,
    rank_stride_b, rank_stride_h, admissible_stride_b, admissible_stride_h, full_stride_b, full_stride_h,
    num_k_blocks,
    HEADS: tl.constexpr, FROM_RANK: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row = (b * HEADS + h) * tl.num_programs(0) + i
    rank_row = rank
    limit = 0
    admissible_row = admissible
    kept_row = kept + row * num_k_blocks
    if FROM_RANK:
        proxy = tl.load(proxy_of + h)
        limit = tl.load(count + b * HEADS + h)
        rank_row = rank + b * rank_stride_b + proxy * rank_stride_h + i * num_k_blocks
        admissible_row = admissible + b * admissible_stride_b + h * admissible_stride_h + i * num_k_blocks
    full_row = full + b * full_stride_b + h * full_stride_h + i * num_k_blocks
    total_kept, total_full = 0, 0
    for start in tl.range(0, num_k_blocks, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        some, all_ = _kept_blocks(rank_row, kept_row, admissible_row, full_row, limit, j, num_k_blocks, FROM_RANK)
        total_kept += tl.sum(some.to(tl.int32))
        total_full += tl.sum(all_.to(tl.int32))
    tl.store(partial_number + row, total_kept - total_full)
    tl.store(full_number + row, total_full)
    before_kept, before_full = 0, 0
    for start in tl.range(0, num_k_blocks, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        some, all_ = _kept_blocks(rank_row, kept_row, admissible_row, full_row, limit, j, num_k_blocks, FROM_RANK)
        if FROM_RANK:
            tl.store(kept_row + j, some, mask=j < num_k_blocks)
        whole = all_.to(tl.int32)
        partial = some.to(tl.int32) - whole
        at = row * num_k_blocks
        _store_list(partial_index + at, partial, j, num_k_blocks, before_kept - before_full, total_kept - total_full)
        _store_list(full_index + at, whole, j, num_k_blocks, before_full, total_full)
        before_kept += tl.sum(some.to(tl.int32))
        before_full += tl.sum(whole)


def _launch(
    rank: Tensor | None, count: Tensor | None, proxy_of: Tensor | None, admissible: Tensor | None, kept: Tensor,
    full: Tensor,
) -> Lists:  # fmt: skip
    batch, heads, num_q_blocks, num_k_blocks = kept.shape
    number = torch.empty(2, batch, heads, num_q_blocks, dtype=torch.int32, device=kept.device)
    partial_index = torch.empty(kept.shape, dtype=torch.int32, device=kept.device)
    full_index = torch.empty(kept.shape, dtype=torch.int32, device=kept.device)
    full = full.contiguous()
    _lists_kernel[(num_q_blocks, heads, batch)](
        rank, count, proxy_of, admissible, kept, full, number[0], partial_index, number[1], full_index,
        *(broadcast_strides(rank) if rank is not None else (0, 0)),
        *(broadcast_strides(admissible) if admissible is not None else (0, 0)),
        *broadcast_strides(full), num_k_blocks,
        HEADS=heads, FROM_RANK=rank is not None, BLOCK_J=min(1024, max(16, triton.next_power_of_2(num_k_blocks))),
        num_warps=4,
    )  # fmt: skip
    return number[0], partial_index, number[1], full_index


def block_lists(kept: Tensor, full: Tensor) -> Lists:
    """``flexproxy.block_mask.block_lists``."""
    return _launch(None, None, None, None, kept.contiguous(), full)


def selected_lists(
    rank: Tensor, count: Tensor, proxy_of: Tensor, admissible: Tensor, full: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``flexproxy.selection.selected_lists``."""
    shape = rank.shape[0], count.shape[1], *rank.shape[2:]
    kept = torch.empty(shape, dtype=torch.bool, device=rank.device)
    lists = _launch(rank.contiguous(), count.contiguous(), proxy_of, admissible.contiguous(), kept, full)
    return kept, *lists
