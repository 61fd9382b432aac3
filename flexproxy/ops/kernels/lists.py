"""Triton kernel of stages 5 and 6: the blocks of every head, as a map and as ascending lists. See NOTE [Lists]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.ops.kernels.launch import Options, launch, power_of_2

Lists = tuple[Tensor, Tensor, Tensor, Tensor]
NUMBERS = [
    "rank_stride_b", "rank_stride_h", "admissible_stride_b", "admissible_stride_h", "full_stride_b", "full_stride_h",
    "num_k_blocks", "heads",
]  # fmt: skip


@triton.jit
def _kept_blocks(rank_row, kept_row, admissible_row, full_row, count, j, num_k_blocks, FROM_RANK: tl.constexpr):
    """Which of the blocks j are kept, and which of those are full: 0 or 1."""
    inside = j < num_k_blocks
    if FROM_RANK:
        some = tl.load(admissible_row + j, mask=inside, other=0) != 0
        kept = some & (tl.load(rank_row + j, mask=inside, other=0) < count)
    else:
        kept = tl.load(kept_row + j, mask=inside, other=0) != 0
    full = kept & (tl.load(full_row + j, mask=inside, other=0) != 0)
    return kept.to(tl.int32), full.to(tl.int32)


@triton.jit(do_not_specialize=NUMBERS)
def _lists_kernel(
    rank, count, proxy_of, admissible, kept, full, partial_number, partial_index, full_number, full_index,
    rank_stride_b, rank_stride_h, admissible_stride_b, admissible_stride_h, full_stride_b, full_stride_h,
    num_k_blocks, heads,
    FROM_RANK: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Lists of one row of blocks: kept blocks in ascending order, zeros behind them. Heads share the rank of a row."""
    i = (tl.program_id(0) // heads).to(tl.int64)
    h = tl.program_id(0) % heads
    b = tl.program_id(1).to(tl.int64)
    row = (b * heads + h) * (tl.num_programs(0) // heads) + i
    rank_row = rank
    limit = 0
    admissible_row = admissible
    kept_row = kept + row * num_k_blocks
    if FROM_RANK:
        limit = tl.load(count + row)
        rank_row = rank + b * rank_stride_b + tl.load(proxy_of + h) * rank_stride_h + i * num_k_blocks
        admissible_row = admissible + b * admissible_stride_b + h * admissible_stride_h + i * num_k_blocks
    full_row = full + b * full_stride_b + h * full_stride_h + i * num_k_blocks
    before_partial, before_full = 0, 0
    for start in tl.range(0, num_k_blocks, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        some, whole = _kept_blocks(rank_row, kept_row, admissible_row, full_row, limit, j, num_k_blocks, FROM_RANK)
        partial = some - whole
        if FROM_RANK:
            tl.store(kept_row + j, some != 0, mask=j < num_k_blocks)
        # Both running sums in one: neither reaches 2^16 in a chunk.
        both = tl.cumsum(partial + (whole << 16), 0)
        partial_place = before_partial + (both & 0xFFFF) - 1
        full_place = before_full + (both >> 16) - 1
        tl.store(partial_index + row * num_k_blocks + partial_place, j, mask=partial != 0)
        tl.store(full_index + row * num_k_blocks + full_place, j, mask=whole != 0)
        before_partial += tl.sum(partial)
        before_full += tl.sum(whole)
    tl.store(partial_number + row, before_partial)
    tl.store(full_number + row, before_full)
    for start in tl.range(0, num_k_blocks, BLOCK_J):  # behind the lists
        column = start + tl.arange(0, BLOCK_J)
        nothing = tl.zeros([BLOCK_J], tl.int32)
        at = row * num_k_blocks + column
        tl.store(partial_index + at, nothing, mask=(column >= before_partial) & (column < num_k_blocks))
        tl.store(full_index + at, nothing, mask=(column >= before_full) & (column < num_k_blocks))


def _launch(
    rank: Tensor | None,
    count: Tensor | None,
    proxy_of: Tensor | None,
    admissible: Tensor | None,
    kept: Tensor,
    full: Tensor,
) -> Lists:
    batch, heads, num_q_blocks, num_k_blocks = kept.shape
    numbers = [torch.empty(batch, heads, num_q_blocks, dtype=torch.int32, device=kept.device) for _ in range(2)]
    indices = [torch.empty(kept.shape, dtype=torch.int32, device=kept.device) for _ in range(2)]
    full = full.contiguous()
    block_j = power_of_2(num_k_blocks, 16, 512)
    launch(
        _lists_kernel,
        (num_q_blocks * heads, batch, 1),
        Options(warps=2),
        rank=rank,
        count=count,
        proxy_of=proxy_of,
        admissible=admissible,
        kept=kept,
        full=full,
        partial_number=numbers[0],
        partial_index=indices[0],
        full_number=numbers[1],
        full_index=indices[1],
        num_k_blocks=num_k_blocks,
        heads=heads,
        FROM_RANK=rank is not None,
        BLOCK_J=block_j,
    )
    return numbers[0], indices[0], numbers[1], indices[1]


def block_lists(kept: Tensor, full: Tensor) -> Lists:
    """``flexproxy.stages.lists.block_lists``."""
    return _launch(None, None, None, None, kept.contiguous(), full)


def selected_lists(
    rank: Tensor, count: Tensor, proxy_of: Tensor, admissible: Tensor, full: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``flexproxy.selection.selected_lists``."""
    kept = torch.empty(rank.shape[0], count.shape[1], *rank.shape[2:], dtype=torch.bool, device=rank.device)
    return kept, *_launch(rank.contiguous(), count.contiguous(), proxy_of, admissible.contiguous(), kept, full)
