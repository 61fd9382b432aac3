"""Triton kernels of stage 4: the rank of every block in its row, and how many blocks are forced."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.ops.kernels.launch import Options, launch, power_of_2
from flexproxy.ops.kernels.row_summary import COLUMNS, END, SINK

if TYPE_CHECKING:
    from flexproxy.stages.ranking import ForcedRule

MAX_SORTED = 2048  # blocks in a row that one program sorts; more take seconds to compile


@triton.jit
def _forced_range(offset, i, end, num_queries, local_blocks, block_size, log_block_size):
    """First and last forced local block of row i, as in ``stages.ranking.forced_blocks``; end: of the admissible."""
    start = i.to(tl.int64) * block_size
    first_query = offset + start
    last_query = offset + tl.minimum(start + block_size, num_queries) - 1
    # A shift rounds down also where the position is negative, a division does not.
    first = first_query >> log_block_size
    last = last_query >> log_block_size
    first = tl.where(last > end - 1, tl.minimum(first, end - 2), first) - (local_blocks - 1)
    return first, tl.minimum(last, end - 1)


NUMBERS = [
    "admissible_stride_b", "admissible_stride_h", "summary_stride_b", "summary_stride_h", "offset_stride_b",
    "num_queries", "num_k_blocks", "heads", "sink_blocks", "local_blocks", "block_size", "log_block_size",
]  # fmt: skip


@triton.jit
def _keys(
    scores_row, admissible_row, end, sink, position, num_queries, num_k_blocks, sink_blocks, local_blocks, block_size,
    log_block_size, i, j,
):  # fmt: skip
    """What the blocks of a row are ranked by: forced +inf, scored by score, unscored -2e38, inadmissible -inf."""
    inside = j < num_k_blocks
    score = tl.load(scores_row + j, mask=inside, other=0.0)
    some = tl.load(admissible_row + j, mask=inside, other=0) != 0
    first, last = _forced_range(position, i, end, num_queries, local_blocks, block_size, log_block_size)
    unscored = (score != score) | (score == float("-inf"))
    key = tl.where(unscored, -2e38, tl.maximum(score, -1e38))
    forced = ((j >= first) & (j <= last)) | ((j >= sink) & (j < sink + sink_blocks))
    key = tl.where(forced, float("inf"), key)
    return tl.where(some, key, float("-inf"))


@triton.jit
def _sort_row(
    scores_row, admissible_row, rank_row, end, sink, position, num_queries, num_k_blocks, sink_blocks, local_blocks,
    block_size, log_block_size, i,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Ranks of the first BLOCK_J blocks of a row: keys and indices sorted as one integer each."""
    j = tl.arange(0, BLOCK_J)
    key = _keys(
        scores_row, admissible_row, end, sink, position, num_queries, num_k_blocks, sink_blocks, local_blocks,
        block_size, log_block_size, i, j,
    )  # fmt: skip
    bits = tl.where(key == 0.0, 0.0, key).to(tl.int32, bitcast=True)  # one zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    # Of equal keys the lower index comes first; places beyond the row come last.
    packed = (ordered.to(tl.int64) << 32) | (BLOCK_J - 1 - j).to(tl.int64)
    packed = tl.sort(tl.where(j < num_k_blocks, packed, -0x7FFFFFFFFFFFFFFF), descending=True)
    index = BLOCK_J - 1 - (packed & 0xFFFFFFFF)
    tl.store(rank_row + index, j, mask=j < num_k_blocks)


@triton.jit(do_not_specialize=NUMBERS)
def _rank_kernel(
    scores, admissible, summary, offset, out,
    admissible_stride_b, admissible_stride_h, summary_stride_b, summary_stride_h, offset_stride_b,
    num_queries, num_k_blocks, heads, sink_blocks, local_blocks, block_size, log_block_size,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Ranks of one row. Behind its last admissible block all are equal and in order: that half needs no sorting."""
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    row = (bh * tl.num_programs(0) + i) * num_k_blocks
    scores_row, rank_row = scores + row, out + row
    admissible_row = admissible + b * admissible_stride_b + h * admissible_stride_h + i.to(tl.int64) * num_k_blocks
    columns = summary + b * summary_stride_b + h * summary_stride_h + i * COLUMNS
    end, sink = tl.load(columns + END), tl.load(columns + SINK)
    position = tl.load(offset + b * offset_stride_b)
    half: tl.constexpr = BLOCK_J // 2
    if end <= half:
        _sort_row(
            scores_row, admissible_row, rank_row, end, sink, position, num_queries, num_k_blocks, sink_blocks,
            local_blocks, block_size, log_block_size, i, half,
        )  # fmt: skip
        j = half + tl.arange(0, half)
        tl.store(rank_row + j, j, mask=j < num_k_blocks)
    else:
        _sort_row(
            scores_row, admissible_row, rank_row, end, sink, position, num_queries, num_k_blocks, sink_blocks,
            local_blocks, block_size, log_block_size, i, BLOCK_J,
        )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _keys_kernel(
    scores, admissible, summary, offset, out,
    admissible_stride_b, admissible_stride_h, summary_stride_b, summary_stride_h, offset_stride_b,
    num_queries, num_k_blocks, heads, sink_blocks, local_blocks, block_size, log_block_size,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    row = (bh * tl.num_programs(0) + i) * num_k_blocks
    scores_row = scores + row
    admissible_row = admissible + b * admissible_stride_b + h * admissible_stride_h + i.to(tl.int64) * num_k_blocks
    columns = summary + b * summary_stride_b + h * summary_stride_h + i * COLUMNS
    end, sink = tl.load(columns + END), tl.load(columns + SINK)
    position = tl.load(offset + b * offset_stride_b)
    for start in tl.range(0, num_k_blocks, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        key = _keys(
            scores_row, admissible_row, end, sink, position, num_queries, num_k_blocks, sink_blocks, local_blocks,
            block_size, log_block_size, i, j,
        )  # fmt: skip
        tl.store(out + row + j, key, mask=j < num_k_blocks)


def rank_blocks(scores: Tensor, admissible: Tensor, summary: Tensor, rule: ForcedRule) -> Tensor:
    """``flexproxy.stages.ranking.rank_blocks``."""
    offset, num_queries, block_size, sink_blocks, local_blocks = rule
    batch, proxies, num_q_blocks, num_k_blocks = scores.shape
    admissible, summary = admissible.contiguous(), summary.contiguous()
    rank = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    in_one = num_k_blocks <= MAX_SORTED
    keys = rank if in_one else torch.empty_like(scores)
    launch(
        _rank_kernel if in_one else _keys_kernel,
        (num_q_blocks, batch * proxies, 1),
        # A row takes one warp the least work, and two warps the least time: the former counts where rows are many.
        Options(warps=1 if rank.numel() > 2**21 else 2),
        scores=scores,
        admissible=admissible,
        summary=summary,
        offset=offset,
        out=keys,
        num_queries=num_queries,
        num_k_blocks=num_k_blocks,
        heads=proxies,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        block_size=block_size,
        log_block_size=block_size.bit_length() - 1,
        BLOCK_J=power_of_2(num_k_blocks, 16, MAX_SORTED),
    )
    if in_one:
        return rank
    # Some rows at a time, for the memory of the 64-bit indices.
    place = torch.arange(num_k_blocks, dtype=torch.int32, device=scores.device)
    rows = max(1, 2**26 // num_k_blocks)
    for part, out in zip(keys.flatten(0, 2).split(rows), rank.flatten(0, 2).split(rows), strict=True):
        order = part.argsort(dim=-1, descending=True, stable=True)
        out.scatter_(-1, order, place.expand_as(order))
    return rank


@triton.jit(do_not_specialize=[*NUMBERS, "num_q_blocks"])
def _forced_kernel(
    admissible, summary, offset, forced,
    admissible_stride_b, admissible_stride_h, summary_stride_b, summary_stride_h, offset_stride_b,
    num_queries, num_q_blocks, num_k_blocks, heads, sink_blocks, local_blocks, block_size, log_block_size,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """The most forced blocks that a row of one head has."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    position = tl.load(offset + b * offset_stride_b)
    columns = summary + b * summary_stride_b + h * summary_stride_h
    most = 0
    for start in tl.range(0, num_q_blocks, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        ok = i < num_q_blocks
        end = tl.load(columns + i * COLUMNS + END, mask=ok, other=0)
        sink = tl.load(columns + i * COLUMNS + SINK, mask=ok, other=0)
        first, last = _forced_range(position, i, end, num_queries, local_blocks, block_size, log_block_size)
        row = admissible + b * admissible_stride_b + h * admissible_stride_h + i.to(tl.int64) * num_k_blocks
        number = tl.zeros([BLOCK_I], tl.int32)
        for step in tl.range(0, sink_blocks):
            number += tl.load(row + sink + step, mask=ok & (sink + step < num_k_blocks), other=0).to(tl.int32)
        for step in tl.range(0, local_blocks + 2):
            j = first + step
            local = ok & (j <= last) & (j >= 0) & (j < num_k_blocks) & ((j < sink) | (j >= sink + sink_blocks))
            number += tl.load(row + j, mask=local, other=0).to(tl.int32)
        most = tl.maximum(most, tl.max(number))
    tl.store(forced + bh, most)


def forced_counts(admissible: Tensor, summary: Tensor, rule: ForcedRule) -> Tensor:
    """``flexproxy.stages.ranking.forced_counts``."""
    offset, num_queries, block_size, sink_blocks, local_blocks = rule
    admissible, summary = admissible.contiguous(), summary.contiguous()
    batch, heads = max(len(admissible), len(offset)), admissible.shape[1]
    forced = torch.empty(batch, heads, dtype=torch.int32, device=admissible.device)
    launch(
        _forced_kernel,
        (batch * heads, 1, 1),
        admissible=admissible,
        summary=summary,
        offset=offset,
        forced=forced,
        num_queries=num_queries,
        num_q_blocks=admissible.shape[2],
        num_k_blocks=admissible.shape[3],
        heads=heads,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        block_size=block_size,
        log_block_size=block_size.bit_length() - 1,
        BLOCK_I=256,
    )
    return forced
