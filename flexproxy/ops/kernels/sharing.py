"""Triton kernels of stage 3 with one budget for a sequence: a histogram of its scores, a threshold, and counts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.ops.kernels.launch import Options, launch, power_of_2
from flexproxy.ops.kernels.row_summary import COLUMNS, DENSE, END, NUMBER
from flexproxy.ops.tensors import BINS_PER_UNIT, NUM_BINS

COPIES = 8  # of a histogram, so that fewer programs wait for one another

NUMBERS = [
    "summary_stride_b", "summary_stride_h", "forced_stride_b", "forced_stride_h", "num_k_blocks", "heads", "proxies",
    "min_blocks", "max_blocks",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _shared_counts_kernel(
    scores, rank, proxy_of, summary, forced, threshold, histogram, count,
    summary_stride_b, summary_stride_h, forced_stride_b, forced_stride_h, num_k_blocks, heads, proxies, min_blocks,
    max_blocks,
    COUNT: tl.constexpr, COPIES: tl.constexpr, NUM_BINS: tl.constexpr, BINS_PER_UNIT: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """One row of blocks: into the histogram, or the count by the threshold."""
    program = tl.program_id(0)
    num_q_blocks = tl.num_programs(0) // heads
    i, h = (program // heads).to(tl.int64), program % heads
    b = tl.program_id(1).to(tl.int64)
    columns = summary + b * summary_stride_b + h * summary_stride_h + i * COLUMNS
    number = tl.load(columns + NUMBER)
    dense = tl.load(columns + DENSE) != 0
    most_forced = tl.load(forced + b * forced_stride_b + h * forced_stride_h)
    least = tl.minimum(number, tl.where(dense, number, tl.maximum(most_forced, tl.maximum(min_blocks, 1))))
    most = tl.minimum(number, tl.where(dense, number, tl.maximum(most_forced, max_blocks)))
    end = tl.where(least < most, tl.load(columns + END), 0)
    row = ((b * proxies + tl.load(proxy_of + h)) * num_q_blocks + i) * num_k_blocks
    bins = histogram + (b * COPIES + program % COPIES) * NUM_BINS
    last = 0
    if COUNT:
        last = tl.load(threshold + b)
    taken = least
    for start in tl.range(0, end, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        place = tl.load(rank + row + j, mask=j < end, other=num_k_blocks)
        ok = (place >= least) & (place < most)
        score = tl.load(scores + row + j, mask=ok, other=0.0) * -BINS_PER_UNIT
        score = tl.where(score == score, score, NUM_BINS)
        own = tl.minimum(tl.maximum(score, 0.0), NUM_BINS - 2).to(tl.int32) + 1
        if COUNT:
            taken += tl.sum((ok & (own <= last)).to(tl.int32))
        else:
            tl.atomic_add(bins + own, tl.full([BLOCK_J], 1, tl.int32), mask=ok, sem="relaxed")
    if COUNT:
        tl.store(count + (b * heads + h) * num_q_blocks + i, tl.where(dense, num_k_blocks, taken))
    else:
        tl.atomic_add(bins, least, sem="relaxed")


@triton.jit
def _threshold_kernel(histogram, total, threshold, COPIES: tl.constexpr, NUM_BINS: tl.constexpr):
    """The last bin with which one sequence keeps nearest to its total; the first of equals."""
    b = tl.program_id(0).to(tl.int64)
    bin = tl.arange(0, NUM_BINS)
    number = tl.zeros([NUM_BINS], tl.int64)
    for copy in tl.static_range(COPIES):
        number += tl.load(histogram + (b * COPIES + copy) * NUM_BINS + bin)
    distance = tl.abs(tl.cumsum(number, 0) - tl.load(total + b))
    tl.store(threshold + b, tl.min(tl.where(distance == tl.min(distance), bin, NUM_BINS)))


def shared_counts(
    scores: Tensor, rank: Tensor, proxy_of: Tensor, summary: Tensor, forced: Tensor, total: Tensor, min_blocks: int,
    max_blocks: int,
) -> Tensor:  # fmt: skip
    """``flexproxy.stages.sharing.shared_counts``."""
    batch, proxies, num_q_blocks, num_k_blocks = scores.shape
    heads = len(proxy_of)
    scores, rank, summary = scores.contiguous(), rank.contiguous(), summary.contiguous()
    histogram = torch.zeros(batch, COPIES, NUM_BINS, dtype=torch.int32, device=scores.device)
    threshold = torch.empty(batch, dtype=torch.int32, device=scores.device)
    count = torch.empty(batch, heads, num_q_blocks, dtype=torch.int32, device=scores.device)

    def over_rows(counts: bool) -> None:
        launch(
            _shared_counts_kernel,
            (num_q_blocks * heads, batch, 1),
            Options(warps=2),
            scores=scores,
            rank=rank,
            proxy_of=proxy_of,
            summary=summary,
            forced=forced,
            threshold=threshold,
            histogram=histogram,
            count=count,
            num_k_blocks=num_k_blocks,
            heads=heads,
            proxies=proxies,
            min_blocks=min_blocks,
            max_blocks=max_blocks,
            COUNT=counts,
            COPIES=COPIES,
            NUM_BINS=NUM_BINS,
            BINS_PER_UNIT=BINS_PER_UNIT,
            BLOCK_J=power_of_2(num_k_blocks, 16, 512),
        )

    over_rows(counts=False)
    launch(
        _threshold_kernel,
        (batch, 1, 1),
        histogram=histogram,
        total=total,
        threshold=threshold,
        COPIES=COPIES,
        NUM_BINS=NUM_BINS,
    )
    over_rows(counts=True)
    return count
