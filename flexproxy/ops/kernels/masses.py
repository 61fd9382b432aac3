"""Triton kernels of stage 3: the probability mass of every key block. See NOTE [One pass]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.ops.kernels.block_logits import block_logits, combine_splits
from flexproxy.ops.kernels.launch import launch, strides
from flexproxy.ops.kernels.tiles import masses_tile

if TYPE_CHECKING:
    from flexproxy.masks.sampled import SampledMask

NUMBERS = ["probes_stride_b", "probes_stride_h", "num_probes", "num_columns", "num_k_blocks", "splits", "heads"]


@triton.jit(do_not_specialize=NUMBERS)
def _masses_kernel(
    values, partial, probes, masses,
    probes_stride_b, probes_stride_h, num_probes, num_columns, num_k_blocks, splits, heads,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Masses of BLOCK_J key blocks: the mean over the probes of exp(value - lse); not-a-number counts as nothing."""
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
        for c in tl.static_range(COLUMNS):
            column = j.to(tl.int64) * COLUMNS + c
            value = tl.load(
                values + (bh * num_columns + column[:, None]) * num_probes + row[None, :],
                mask=(column < num_columns)[:, None] & present[None, :],
                other=float("-inf"),
            )
            mass += tl.sum(tl.where(present[None, :], tl.exp2(value - lse[None, :]), 0.0), 1)
    mass = mass / tl.maximum(number, 1).to(tl.float32)
    tl.store(masses + bh * num_k_blocks + j, tl.where(mass == mass, mass, 0.0), mask=j < num_k_blocks)


def block_masses(q: Tensor, k: Tensor, probes: Tensor, mask: SampledMask, block_size: int, scale: float) -> Tensor:
    """``flexproxy.stages.budget.block_masses``."""
    batch, heads, _, head_dim = q.shape
    num_probes = probes.shape[2]
    num_k_blocks = -(-k.shape[2] // block_size)
    tile = masses_tile(q.dtype, head_dim, q.device, block_size)
    rows = slice(0, num_probes)
    values, partial = block_logits(q, k, mask, probes, None, rows, num_probes, block_size, 1, scale, True, tile)
    masses = torch.empty(batch, heads, num_k_blocks, dtype=torch.float32, device=q.device)
    block_m = min(num_probes, 128)
    block_j = 4096 // block_m
    launch(
        _masses_kernel,
        (-(-num_k_blocks // block_j), batch * heads, 1),
        (values, partial, probes, masses),
        (*strides(probes, 2), num_probes, values.shape[3], num_k_blocks, partial.shape[2], heads),
        (-(-block_size // tile.keys), block_m, block_j),
    )
    return masses
