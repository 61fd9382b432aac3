"""Triton kernels of stage 3: probes, the probability mass of every key block (NOTE [One pass]), and counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.ops.kernels.block_logits import BlockLogits, block_logits, combine_splits
from flexproxy.ops.kernels.launch import launch, power_of_2
from flexproxy.ops.kernels.row_summary import COLUMNS, DENSE, NUMBER
from flexproxy.ops.kernels.tiles import masses_tile

if TYPE_CHECKING:
    from flexproxy.masks.sampled import SampledMask

# A program searches for some candidates in some heads at once, for each step waits for memory.
SEARCHES, MAX_HEADS = 1024, 32


@triton.jit(do_not_specialize=["length"])
def _last_valid_kernel(valid, index, length, PROBES: tl.constexpr, BLOCK: tl.constexpr):
    """The last PROBES valid queries of one sequence and head, read from the end."""
    bh = tl.program_id(0).to(tl.int64)
    found = 0
    stop = length
    while (found < PROBES) & (stop > 0):
        query = stop - 1 - tl.arange(0, BLOCK)
        ok = tl.load(valid + bh * length + query, mask=query >= 0, other=0).to(tl.int32)
        slot = PROBES - (found + tl.cumsum(ok, 0))
        tl.store(index + bh * PROBES + slot, query.to(tl.int64), mask=(ok != 0) & (slot >= 0))
        found += tl.sum(ok)
        stop -= BLOCK
    for start in tl.static_range(0, PROBES, 16):
        slot = start + tl.arange(0, 16)
        tl.store(index + bh * PROBES + slot, tl.full([16], -1, tl.int64), mask=slot < PROBES - found)


def last_valid_queries(valid: Tensor, number: int) -> Tensor:
    """``flexproxy.stages.budget.last_valid_queries``."""
    valid = valid.contiguous()
    index = torch.empty(*valid.shape[:2], number, dtype=torch.int64, device=valid.device)
    launch(
        _last_valid_kernel,
        (valid.shape[0] * valid.shape[1], 1, 1),
        valid=valid,
        index=index,
        length=valid.shape[2],
        PROBES=number,
        BLOCK=1024,
    )
    return index


MASSES_NUMBERS = [
    "probes_stride_b", "probes_stride_h", "num_probes", "num_columns", "num_k_blocks", "splits", "heads",
]  # fmt: skip


@triton.jit(do_not_specialize=MASSES_NUMBERS)
def _masses_kernel(
    values, partial, probes, masses,
    probes_stride_b, probes_stride_h, num_probes, num_columns, num_k_blocks, splits, heads,
    PER_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Masses of BLOCK_J key blocks: the mean over the probes of exp(value - lse); NaN counts as 0."""
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    mass = tl.zeros([BLOCK_J], tl.float32)
    number = 0
    for start in tl.range(0, num_probes, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        probe = tl.load(probes + b * probes_stride_b + h * probes_stride_h + row, mask=row < num_probes, other=-1)
        present = probe >= 0
        number += tl.sum(present.to(tl.int32))
        lse = combine_splits(partial + bh * splits * num_probes + row, splits, num_probes, present, 16)
        for c in tl.static_range(PER_BLOCK):
            column = j.to(tl.int64) * PER_BLOCK + c
            value = tl.load(
                values + (bh * num_columns + column[:, None]) * num_probes + row[None, :],
                mask=(column < num_columns)[:, None] & present[None, :],
                other=float("-inf"),
            )
            mass += tl.sum(tl.where(present[None, :], tl.exp2(value - lse[None, :]), 0.0), 1)
    mass = mass / tl.maximum(number, 1).to(tl.float32)
    tl.store(masses + bh * num_k_blocks + j, tl.where(mass == mass, mass, 0.0), mask=j < num_k_blocks)


def block_masses(
    q: Tensor, k: Tensor, probes: Tensor, mask: SampledMask, summary: Tensor, block_size: int, scale: float
) -> Tensor:
    """``flexproxy.stages.budget.block_masses``."""
    logits = probe_logits(q, k, probes, mask, summary, block_size, scale)
    return masses_of_logits(logits, probes, block_size, q)


def probe_logits(
    q: Tensor,
    k: Tensor,
    probes: Tensor,
    mask: SampledMask,
    summary: Tensor,
    block_size: int,
    scale: float,
    out: BlockLogits | None = None,
) -> BlockLogits:
    """The part of ``block_masses`` that reads q and k: ``block_logits`` of the probes; out: an earlier result."""
    return block_logits(
        q,
        k,
        mask if mask.listed is None else mask.listed_at(probes.clamp(min=0), block_size),
        masses_tile(q.dtype, q.shape[3], q.device, block_size),
        scale,
        rows=slice(0, probes.shape[2]),
        q_cell=probes.shape[2],
        k_cell=block_size,
        row_index=probes,
        summary=summary,
        sums=True,
        out=out,
    )


def masses_of_logits(logits: BlockLogits, probes: Tensor, block_size: int, like: Tensor) -> Tensor:
    """``block_masses`` from the ``probe_logits`` of queries like these: of their dtype, head dimension and device."""
    values, partial, _ = logits
    batch, heads, _, num_columns, num_probes = values.shape
    per_block = -(-block_size // masses_tile(like.dtype, like.shape[3], like.device, block_size).keys)
    num_k_blocks = -(-num_columns // per_block)
    masses = torch.empty(batch, heads, num_k_blocks, dtype=torch.float32, device=values.device)
    block_m = min(num_probes, 128)
    block_j = 4096 // block_m
    launch(
        _masses_kernel,
        (-(-num_k_blocks // block_j), batch * heads, 1),
        values=values,
        partial=partial,
        probes=probes,
        masses=masses,
        num_probes=num_probes,
        num_columns=num_columns,
        num_k_blocks=num_k_blocks,
        splits=partial.shape[2],
        heads=heads,
        PER_BLOCK=per_block,
        BLOCK_M=block_m,
        BLOCK_J=block_j,
    )
    return masses


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
    """Blocks that a head keeps with count c: min(c, admissible blocks) of each row, all of dense ones; int64."""
    bh = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.int64)
    for start in tl.range(0, num_q_blocks, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        columns = summary + (bh * num_q_blocks + i) * COLUMNS
        number = tl.load(columns + NUMBER, mask=i < num_q_blocks, other=0)
        dense = tl.load(columns + DENSE, mask=i < num_q_blocks, other=0) != 0
        limit = tl.where(dense, num_k_blocks, 0)[None, :] + c[:, None]
        total += tl.sum(tl.minimum(number[None, :], limit), 1).to(tl.int64)
    tl.store(kept + bh * (num_k_blocks + 1) + c, total, mask=c <= num_k_blocks)


CANDIDATES_NUMBERS = [
    "kept_stride_b", "kept_stride_h", "forced_stride_b", "forced_stride_h", "num_k_blocks", "min_blocks", "max_blocks",
    "heads", "search_steps", "density",
]  # fmt: skip


@triton.jit(do_not_specialize=CANDIDATES_NUMBERS)
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


COUNTS_NUMBERS = [
    "summary_stride_b", "summary_stride_h", *CANDIDATES_NUMBERS[2:8], "num_q_blocks", "num_candidates", "gamma",
]  # fmt: skip


@triton.jit(do_not_specialize=COUNTS_NUMBERS)
def _counts_kernel(
    cumulative, summary, forced, best_distance, best_gamma, count,
    summary_stride_b, summary_stride_h, forced_stride_b, forced_stride_h, num_k_blocks, min_blocks, max_blocks, heads,
    num_q_blocks, num_candidates, gamma,
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
    number = _clip(number, most, min_blocks, max_blocks, num_k_blocks)
    for start in tl.range(0, num_q_blocks, BLOCK_J):
        i = start + lane
        at = summary + b * summary_stride_b + h * summary_stride_h + i * COLUMNS + DENSE
        dense = tl.load(at, mask=i < num_q_blocks, other=0) != 0
        tl.store(count + bh * num_q_blocks + i, tl.where(dense, num_k_blocks, number), mask=i < num_q_blocks)


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
    launch(
        _cumulative_kernel,
        grid,
        masses=masses,
        cumulative=cumulative,
        num_k_blocks=num_k_blocks,
        BLOCK_J=block_j,
        BLOCK_R=64,
    )
    summary = summary.contiguous()
    num_q_blocks = summary.shape[2]
    count = torch.empty(batch, heads, num_q_blocks, dtype=torch.int32, device=masses.device)
    best_distance = best_gamma = None
    programs = 0
    if density is not None:
        kept = torch.empty(*summary.shape[:2], num_k_blocks + 1, dtype=torch.int64, device=masses.device)
        grid = -(-(num_k_blocks + 1) // 64), summary.shape[0] * summary.shape[1], 1
        launch(
            _kept_kernel,
            grid,
            summary=summary,
            kept=kept,
            num_q_blocks=num_q_blocks,
            num_k_blocks=num_k_blocks,
            BLOCK_C=64,
            BLOCK_I=64,
        )
        heads_at_once = power_of_2(heads, 1, MAX_HEADS)
        candidates = SEARCHES // heads_at_once
        programs = -(-(heads * num_k_blocks + 1) // candidates)  # one more, for inf
        best_distance = torch.empty(batch, programs, dtype=torch.float64, device=masses.device)
        best_gamma = torch.empty(batch, programs, dtype=torch.float32, device=masses.device)
        launch(
            _candidates_kernel,
            (programs, batch, 1),
            cumulative=cumulative,
            kept=kept,
            forced=forced,
            best_distance=best_distance,
            best_gamma=best_gamma,
            num_k_blocks=num_k_blocks,
            min_blocks=min_blocks,
            max_blocks=max_blocks,
            heads=heads,
            search_steps=num_k_blocks.bit_length(),
            density=density,
            CANDIDATES=candidates,
            HEADS=heads_at_once,
        )
    launch(
        _counts_kernel,
        (batch * heads, 1, 1),
        cumulative=cumulative,
        summary=summary,
        forced=forced,
        best_distance=best_distance,
        best_gamma=best_gamma,
        count=count,
        num_k_blocks=num_k_blocks,
        min_blocks=min_blocks,
        max_blocks=max_blocks,
        heads=heads,
        num_q_blocks=num_q_blocks,
        num_candidates=programs,
        gamma=gamma,
        FIND_GAMMA=density is not None,
        BLOCK_J=256,
    )
    return count
