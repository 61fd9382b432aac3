"""Triton kernel of stage 3: the probability mass of every key block. See NOTE [One pass]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.kernels.block_logits import block_logits
from flexproxy.kernels.tiles import masses_tile


@triton.jit(do_not_specialize=["num_probes", "num_columns", "num_k_blocks", "splits"])
def _masses_kernel(
    values, partial, probes, masses, probes_stride_b, probes_stride_h,
    num_probes, num_columns, num_k_blocks, splits,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Masses of BLOCK_J key blocks: the mean over the probes of exp(value - lse); not-a-number counts as nothing."""
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // HEADS, bh % HEADS
    mass = tl.zeros([BLOCK_J], tl.float32)
    number = 0
    for start in tl.range(0, num_probes, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        probe = tl.load(probes + b * probes_stride_b + h * probes_stride_h + row, mask=row < num_probes, other=-1)
        present = probe >= 0
        number += tl.sum(present.to(tl.int32))
        largest = tl.full([BLOCK_M], -3e38, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for split in tl.range(0, splits):
            part = tl.load(partial + (bh * splits + split) * num_probes + row, mask=present, other=float("-inf"))
            new_largest = tl.maximum(largest, part)
            total = total * tl.exp2(largest - new_largest) + tl.exp2(part - new_largest)
            largest = new_largest
        lse = largest + tl.log2(total)
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


def block_masses(
    q: Tensor,
    k: Tensor,
    probes: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    q_label: Tensor | None,
    k_label: Tensor | None,
    bits: Tensor | None,
    block_size: int,
    scale: float,
) -> Tensor:
    """``flexproxy.budget.block_masses``."""
    batch, heads, _, head_dim = q.shape
    num_probes = probes.shape[2]
    num_k_blocks = -(-k.shape[2] // block_size)
    tile = masses_tile(q.dtype, head_dim, block_size)
    rows = slice(0, num_probes)
    values, partial = block_logits(
        q, k, (lo, hi, q_label, k_label, bits), probes, None, rows, block_size, 1, scale, True, tile
    )
    masses = torch.empty(batch, heads, num_k_blocks, dtype=torch.float32, device=q.device)
    block_m = min(num_probes, 64)
    block_j = 2048 // block_m
    _masses_kernel[(-(-num_k_blocks // block_j), batch * heads)](
        values, partial, probes, masses,
        0 if probes.shape[0] == 1 else probes.stride(0), 0 if probes.shape[1] == 1 else probes.stride(1),
        num_probes, values.shape[2], num_k_blocks, partial.shape[2],
        HEADS=heads, COLUMNS=-(-block_size // tile.keys), BLOCK_M=block_m, BLOCK_J=block_j,
        num_warps=4,
    )  # fmt: skip
    return masses
