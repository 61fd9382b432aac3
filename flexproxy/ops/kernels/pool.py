"""Triton kernel of stage 1: the means of groups of heads, at every stride-th token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.ops.cache import kept
from flexproxy.ops.kernels.launch import launch, power_of_2
from flexproxy.ops.tensors import is_contiguous


@triton.jit(do_not_specialize=["num_rows", "largest"])
def _pool_kernel(
    x, heads, pooled, stride_b, stride_h, stride_s, stride_d, num_rows, largest, head_dim,
    HAS_TABLE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """BLOCK_S rows of one proxy, head after head: many at once, a power of two apart, are slow to read."""
    proxy = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    dim = tl.arange(0, BLOCK_D)
    inside = (row < num_rows)[:, None] & (dim < head_dim)[None, :]
    at = x + b * stride_b + row.to(tl.int64)[:, None] * stride_s + dim[None, :] * stride_d  # [rows, D]
    table = heads + proxy * (largest + 1) if HAS_TABLE else heads
    number = tl.load(table) if HAS_TABLE else largest
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for member in tl.range(0, number):
        head = tl.load(table + 1 + member) if HAS_TABLE else proxy * largest + member
        total += tl.load(at + head.to(tl.int64) * stride_h, mask=inside, other=0.0).to(tl.float32)
    out = (b * tl.num_programs(1) + proxy) * num_rows + row
    tl.store(pooled + out[:, None] * head_dim + dim[None, :], (total / number).to(pooled.dtype.element_ty), mask=inside)


def pool_groups(x: Tensor, members: Sequence[int], sizes: Sequence[int], stride: int) -> Tensor:
    """``flexproxy.stages.proxy.pool_groups``."""
    batch, num_heads, length, head_dim = x.shape
    num_rows = -(-length // stride)
    pooled = torch.empty(batch, len(sizes), num_rows, head_dim, dtype=x.dtype, device=x.device)
    contiguous = is_contiguous(members, sizes, num_heads)
    stride_b, stride_h, stride_s, stride_d = x.stride()
    block_d = power_of_2(head_dim, 16, 256)
    block_s = max(1, 8192 // block_d)
    launch(
        _pool_kernel,
        (-(-num_rows // block_s), len(sizes), batch),
        (x, None if contiguous else _table(x.device, tuple(members), tuple(sizes)), pooled),
        (stride_b, stride_h, stride_s * stride, stride_d, num_rows, max(sizes), head_dim),
        (not contiguous, block_d, block_s),
    )
    return pooled


@kept(256)
def _table(device: torch.device, members: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """The number of heads of each group, then their indices: int32 ``[P, 1 + largest]``."""
    entries = []
    start = 0
    for size in sizes:
        entries += [size, *members[start : start + size], *[0] * (max(sizes) - size)]
        start += size
    # Filled, not copied: a copy from the host would wait for the device.
    return torch.stack([torch.full((), entry, dtype=torch.int32, device=device) for entry in entries])
