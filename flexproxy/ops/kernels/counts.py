"""Triton kernels of stage 3: how many blocks each head keeps, for a given gamma or for the gamma of a density."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.ops.kernels.launch import launch, power_of_2, strides

CANDIDATES = 128  # of one program
HEADS = 8  # searched at once: each step waits for memory


@triton.jit(do_not_specialize=["num_k_blocks"])
def _cumulative_kernel(masses, cumulative, num_k_blocks, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr):
    """Mass of the heaviest blocks down to each of BLOCK_J blocks, at the place of its rank; equals by index."""
    row = tl.program_id(1).to(tl.int64) * num_k_blocks
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    mass = tl.load(masses + row + j, mask=j < num_k_blocks, other=0.0)
    place = tl.zeros([BLOCK_J], tl.int32)
    total = mass
    for start in tl.range(0, num_k_blocks, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        other = tl.load(masses + row + r, mask=r < num_k_blocks, other=-1.0)[:, None]  # before nothing
        ahead = (other > mass[None, :]) | ((other == mass[None, :]) & (r[:, None] < j[None, :]))
        place += tl.sum(ahead.to(tl.int32), 0)
        total += tl.sum(tl.where(ahead, other, 0.0), 0)
    tl.store(cumulative + row + place, total, mask=j < num_k_blocks)


@triton.jit
def _clip(count, forced, min_blocks, max_blocks, num_blocks):
    return tl.minimum(tl.maximum(tl.minimum(tl.maximum(count, min_blocks), max_blocks), forced), num_blocks)


@triton.jit(do_not_specialize=["num_q_blocks", "num_k_blocks"])
def _kept_kernel(summary, kept, num_q_blocks, num_k_blocks, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr):
    """Blocks that a head keeps with count c: the sum over its rows of min(c, admissible blocks); int64, c to Nk."""
    bh = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.int64)
    for start in tl.range(0, num_q_blocks, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        number = tl.load(summary + (bh * num_q_blocks + i) * 5 + 4, mask=i < num_q_blocks, other=0)
        total += tl.sum(tl.minimum(number[None, :], c[:, None]), 1).to(tl.int64)
    tl.store(kept + bh * (num_k_blocks + 1) + c, total, mask=c <= num_k_blocks)


NUMBERS = [
    "kept_stride_b", "kept_stride_h", "forced_stride_b", "forced_stride_h", "num_k_blocks", "min_blocks", "max_blocks",
    "heads", "search_steps", "density",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _candidates_kernel(
    cumulative, kept, forced, best_distance, best_gamma,
    kept_stride_b, kept_stride_h, forced_stride_b, forced_stride_h, num_k_blocks, min_blocks, max_blocks, heads,
    search_steps, density,
    CANDIDATES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The best of some candidates for gamma: counts change only at the values of ``cumulative``; inf is everything."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * CANDIDATES + tl.arange(0, CANDIDATES)
    gamma = tl.load(cumulative + b * heads * num_k_blocks + n, mask=n < heads * num_k_blocks, other=float("inf"))
    mean = tl.zeros([CANDIDATES], tl.float64)
    for start in tl.range(0, heads, HEADS):
        h = start + tl.arange(0, HEADS)
        ok = h < heads
        row = cumulative + (b * heads + h)[None, :] * num_k_blocks
        low = tl.zeros([CANDIDATES, HEADS], tl.int32)
        high = tl.where(ok, num_k_blocks, 0)[None, :] + low
        for _ in tl.range(0, search_steps):  # how many of the ascending values are below gamma
            middle = (low + high) // 2
            open_ = middle < high
            below = open_ & (tl.load(row + middle, mask=open_, other=0.0) < gamma[:, None])
            low = tl.where(below, middle + 1, low)
            high = tl.where(below, high, middle)
        most = tl.load(forced + b * forced_stride_b + h * forced_stride_h, mask=ok, other=0)
        count = _clip(low + 1, most[None, :], min_blocks, max_blocks, num_k_blocks)
        table = kept + b * kept_stride_b + h * kept_stride_h
        admissible = tl.maximum(tl.load(table + num_k_blocks, mask=ok, other=0), 1).to(tl.float64)
        number = tl.load(table[None, :] + count, mask=ok[None, :], other=0).to(tl.float64)
        mean += tl.sum(number / admissible[None, :], 1)
    distance = tl.abs(mean / heads - density)
    least = tl.min(distance)
    out = b * tl.num_programs(0) + tl.program_id(0)
    tl.store(best_distance + out, least)
    tl.store(best_gamma + out, tl.min(tl.where(distance == least, gamma, float("inf"))))


@triton.jit(do_not_specialize=[*NUMBERS[2:8], "num_candidates", "gamma"])
def _counts_kernel(
    cumulative, forced, best_distance, best_gamma, count,
    forced_stride_b, forced_stride_h, num_k_blocks, min_blocks, max_blocks, heads, num_candidates, gamma,
    FIND_GAMMA: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    lane = tl.arange(0, BLOCK_J)
    limit = gamma
    if FIND_GAMMA:
        least = tl.full([], float("inf"), tl.float64)
        for start in tl.range(0, num_candidates, BLOCK_J):
            n = b * num_candidates + start + lane
            ok = start + lane < num_candidates
            distance = tl.load(best_distance + n, mask=ok, other=float("inf"))
            candidate = tl.load(best_gamma + n, mask=ok, other=float("inf"))
            nearest = tl.min(distance)
            smallest = tl.min(tl.where(distance == nearest, candidate, float("inf")))
            # The parts are not in order of gamma: of equally near ones the smaller counts.
            limit = tl.where(nearest < least, smallest, tl.where(nearest == least, tl.minimum(limit, smallest), limit))
            least = tl.minimum(least, nearest)
    number = 1
    for start in tl.range(0, num_k_blocks, BLOCK_J):
        ok = start + lane < num_k_blocks
        value = tl.load(cumulative + bh * num_k_blocks + start + lane, mask=ok, other=float("inf"))
        number += tl.sum((ok & (value < limit)).to(tl.int32))
    most = tl.load(forced + b * forced_stride_b + h * forced_stride_h)
    tl.store(count + bh, _clip(number, most, min_blocks, max_blocks, num_k_blocks))


def count_blocks(
    masses: Tensor,
    summary: Tensor,
    forced: Tensor,
    gamma: float,
    density: float | None,
    min_blocks: int,
    max_blocks: int,
) -> Tensor:
    """``flexproxy.stages.budget.count_blocks``."""
    batch, heads, num_k_blocks = masses.shape
    cumulative = torch.empty_like(masses)
    block_j = power_of_2(num_k_blocks, 16, 64)
    grid = -(-num_k_blocks // block_j), batch * heads, 1
    launch(_cumulative_kernel, grid, (masses, cumulative), (num_k_blocks,), (block_j, 64))
    count = torch.empty(batch, heads, dtype=torch.int32, device=masses.device)
    best_distance = best_gamma = None
    programs = 0
    if density is not None:
        summary = summary.contiguous()
        kept = torch.empty(*summary.shape[:2], num_k_blocks + 1, dtype=torch.int64, device=masses.device)
        grid = -(-(num_k_blocks + 1) // 64), summary.shape[0] * summary.shape[1], 1
        launch(_kept_kernel, grid, (summary, kept), (summary.shape[2], num_k_blocks), (64, 64))
        programs = -(-(heads * num_k_blocks + 1) // CANDIDATES)  # one more, for inf
        best_distance = torch.empty(batch, programs, dtype=torch.float64, device=masses.device)
        best_gamma = torch.empty(batch, programs, dtype=torch.float32, device=masses.device)
        launch(
            _candidates_kernel,
            (programs, batch, 1),
            (cumulative, kept, forced, best_distance, best_gamma),
            (
                *strides(kept, 2), *strides(forced, 2), num_k_blocks, min_blocks, max_blocks, heads,
                num_k_blocks.bit_length(), density,
            ),
            (CANDIDATES, HEADS),
        )  # fmt: skip
    launch(
        _counts_kernel,
        (batch * heads, 1, 1),
        (cumulative, forced, best_distance, best_gamma, count),
        (*strides(forced, 2), num_k_blocks, min_blocks, max_blocks, heads, programs, gamma),
        (density is not None, 256),
    )
    return count
