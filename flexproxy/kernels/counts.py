"""Triton kernels of stage 3: how many blocks each head keeps, for a given gamma or for the gamma of a density."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.kernels.rank import broadcast_strides

CANDIDATES = 128  # of one program


@triton.jit
def _clip(count, forced, min_blocks, max_blocks, num_blocks):
    return tl.minimum(tl.maximum(tl.minimum(tl.maximum(count, min_blocks), max_blocks), forced), num_blocks)


@triton.jit(do_not_specialize=["num_q_blocks", "num_k_blocks"])
def _kept_kernel(
    summary, kept, num_q_blocks, num_k_blocks, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr
):  # fmt: skip
    """Blocks that a head keeps with count c: the sum over its rows of min(c, admissible blocks); int64, c to Nk."""
    bh = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.int64)
    for start in tl.range(0, num_q_blocks, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        number = tl.load(summary + (bh * num_q_blocks + i) * 5 + 4, mask=i < num_q_blocks, other=0)
        total += tl.sum(tl.minimum(number[None, :], c[:, None]), 1).to(tl.int64)
    tl.store(kept + bh * (num_k_blocks + 1) + c, total, mask=c <= num_k_blocks)


@triton.jit
def _mean_density(
    gamma, cumulative, kept, forced, b, kept_stride_b, kept_stride_h, forced_stride_b, forced_stride_h, num_k_blocks,
    min_blocks, max_blocks, HEADS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Mean over heads of kept / admissible blocks for some values of gamma: fp64."""
    total = tl.zeros_like(gamma).to(tl.float64)
    for h in tl.range(0, HEADS):
        row = cumulative + (b * HEADS + h) * num_k_blocks
        # How many of the ascending values are below gamma.
        low = tl.zeros_like(gamma).to(tl.int32)
        high = low + num_k_blocks
        for _ in tl.static_range(STEPS):
            middle = (low + high) // 2
            below = tl.load(row + middle, mask=middle < high, other=float("inf")) < gamma
            low, high = tl.where(below & (middle < high), middle + 1, low), tl.where(below, high, middle)
        forced_at = forced + b * forced_stride_b + h * forced_stride_h
        count = _clip(low + 1, tl.load(forced_at), min_blocks, max_blocks, num_k_blocks)
        table = kept + b * kept_stride_b + h * kept_stride_h
        admissible = tl.maximum(tl.load(table + num_k_blocks), 1).to(tl.float64)
        total += tl.load(table + count).to(tl.float64) / admissible
    return total / HEADS


@triton.jit(do_not_specialize=["num_k_blocks", "min_blocks", "max_blocks", "density"])
def _candidates_kernel(
    cumulative, kept, forced, best_distance, best_gamma,
    kept_stride_b, kept_stride_h, forced_stride_b, forced_stride_h,
    num_k_blocks, min_blocks, max_blocks, density,
    HEADS: tl.constexpr, STEPS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The best of some candidates for gamma: counts change only at the values of ``cumulative``; inf is everything."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * CANDIDATES + tl.arange(0, CANDIDATES)
    number = HEADS * num_k_blocks
    gamma = tl.load(cumulative + b * number + n, mask=n < number, other=float("inf"))
    mean = _mean_density(
        gamma, cumulative, kept, forced, b, kept_stride_b, kept_stride_h, forced_stride_b, forced_stride_h,
        num_k_blocks, min_blocks, max_blocks, HEADS, STEPS,
    )  # fmt: skip
    distance = tl.abs(mean - density)
    least = tl.min(distance)
    out = b * tl.num_programs(0) + tl.program_id(0)
    tl.store(best_distance + out, least)
    tl.store(best_gamma + out, tl.min(tl.where(distance == least, gamma, float("inf"))))


@triton.jit(do_not_specialize=["num_k_blocks", "min_blocks", "max_blocks", "num_candidates", "gamma"])
def _counts_kernel(
    cumulative, forced, best_distance, best_gamma, count, forced_stride_b, forced_stride_h,
    num_k_blocks, min_blocks, max_blocks, num_candidates, gamma,
    HEADS: tl.constexpr, FIND_GAMMA: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // HEADS, bh % HEADS
    limit = gamma
    if FIND_GAMMA:
        n = tl.arange(0, BLOCK_N)
        distance = tl.load(best_distance + b * num_candidates + n, mask=n < num_candidates, other=float("inf"))
        value = tl.load(best_gamma + b * num_candidates + n, mask=n < num_candidates, other=float("inf"))
        limit = tl.min(tl.where(distance == tl.min(distance), value, float("inf")))
    number = 1
    for start in tl.range(0, num_k_blocks, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        value = tl.load(cumulative + bh * num_k_blocks + j, mask=j < num_k_blocks, other=float("inf"))
        number += tl.sum(((value < limit) & (j < num_k_blocks)).to(tl.int32))
    most = tl.load(forced + b * forced_stride_b + h * forced_stride_h)
    tl.store(count + bh, _clip(number, most, min_blocks, max_blocks, num_k_blocks))


def count_blocks(
    masses: Tensor, summary: Tensor, forced: Tensor, gamma: float, density: float | None, min_blocks: int,
    max_blocks: int,
) -> Tensor:  # fmt: skip
    """``flexproxy.budget.count_blocks``."""
    batch, heads, num_k_blocks = masses.shape
    cumulative = masses.sort(dim=-1, descending=True).values.cumsum(-1)
    count = torch.empty(batch, heads, dtype=torch.int32, device=masses.device)
    best_distance = best_gamma = None
    programs = 0
    if density is not None:
        summary = summary.contiguous()
        kept = torch.empty(*summary.shape[:2], num_k_blocks + 1, dtype=torch.int64, device=masses.device)
        _kept_kernel[(-(-(num_k_blocks + 1) // 64), summary.shape[0] * summary.shape[1])](
            summary, kept, summary.shape[2], num_k_blocks, BLOCK_C=64, BLOCK_I=64, num_warps=4
        )
        programs = -(-(heads * num_k_blocks + 1) // CANDIDATES)  # one more, for inf
        best_distance = torch.empty(batch, programs, dtype=torch.float64, device=masses.device)
        best_gamma = torch.empty(batch, programs, dtype=torch.float32, device=masses.device)
        _candidates_kernel[(programs, batch)](
            cumulative, kept, forced, best_distance, best_gamma, *broadcast_strides(kept), *broadcast_strides(forced),
            num_k_blocks, min_blocks, max_blocks, density,
            HEADS=heads, STEPS=num_k_blocks.bit_length(), CANDIDATES=CANDIDATES, num_warps=4,
        )  # fmt: skip
    _counts_kernel[(batch * heads,)](
        cumulative, forced, best_distance, best_gamma, count, *broadcast_strides(forced),
        num_k_blocks, min_blocks, max_blocks, programs, gamma,
        HEADS=heads, FIND_GAMMA=density is not None, BLOCK_J=min(1024, max(16, triton.next_power_of_2(num_k_blocks))),
        BLOCK_N=triton.next_power_of_2(max(16, programs)), num_warps=4,
    )  # fmt: skip
    return count
