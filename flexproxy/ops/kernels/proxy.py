"""Triton kernels of stage 1: the means of groups of heads, and the query that is farthest from its neighbours' mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.config import NEIGHBOURS
from flexproxy.ops.cache import kept
from flexproxy.ops.kernels.launch import Options, launch, power_of_2
from flexproxy.ops.tensors import is_contiguous


@triton.jit(do_not_specialize=["num_rows", "step", "largest"])
def _pool_kernel(
    x, heads, pooled, x_stride_b, x_stride_h, x_stride_s, x_stride_d, num_rows, step, largest, head_dim,
    HAS_TABLE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """BLOCK_S rows of one proxy, which are ``step`` tokens apart.

    Head after head: many at once, a power of two apart, are slow to read.
    """
    proxy = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    dim = tl.arange(0, BLOCK_D)
    inside = (row < num_rows)[:, None] & (dim < head_dim)[None, :]
    at = x + b * x_stride_b + (row.to(tl.int64) * step)[:, None] * x_stride_s + dim[None, :] * x_stride_d  # [rows, D]
    table = heads + proxy * (largest + 1) if HAS_TABLE else heads
    number = tl.load(table) if HAS_TABLE else largest
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for member in tl.range(0, number):
        head = tl.load(table + 1 + member) if HAS_TABLE else proxy * largest + member
        total += tl.load(at + head.to(tl.int64) * x_stride_h, mask=inside, other=0.0).to(tl.float32)
    out = (b * tl.num_programs(1) + proxy) * num_rows + row
    tl.store(pooled + out[:, None] * head_dim + dim[None, :], (total / number).to(pooled.dtype.element_ty), mask=inside)


def pool_groups(x: Tensor, members: Sequence[int], sizes: Sequence[int], stride: int) -> Tensor:
    """``flexproxy.stages.proxy.pool_groups``."""
    batch, num_heads, length, head_dim = x.shape
    num_rows = -(-length // stride)
    pooled = torch.empty(batch, len(sizes), num_rows, head_dim, dtype=x.dtype, device=x.device)
    contiguous = is_contiguous(members, sizes, num_heads)
    block_d = power_of_2(head_dim, 16, 256)
    block_s = max(1, 8192 // block_d)
    launch(
        _pool_kernel,
        (-(-num_rows // block_s), len(sizes), batch),
        x=x,
        heads=None if contiguous else _table(x.device, tuple(members), tuple(sizes)),
        pooled=pooled,
        num_rows=num_rows,
        step=stride,
        largest=max(sizes),
        head_dim=head_dim,
        HAS_TABLE=not contiguous,
        BLOCK_D=block_d,
        BLOCK_S=block_s,
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


@triton.jit(do_not_specialize=["valid_stride_b", "valid_stride_h", "num_rows", "num_windows", "proxies"])
def _outlying_kernel(
    q, valid, chosen,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d, valid_stride_b, valid_stride_h,
    num_rows, num_windows, proxies, head_dim,
    WINDOW: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One neighbourhood of BLOCK_S queries of one proxy, some dimensions after others: their distances add up."""
    b = tl.program_id(1).to(tl.int64) // proxies
    p = tl.program_id(1).to(tl.int64) % proxies
    row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    ok = row < num_rows
    ok &= tl.load(valid + b * valid_stride_b + p * valid_stride_h + row, mask=ok, other=0) != 0
    number = tl.maximum(tl.sum(ok.to(tl.int32)), 1).to(tl.float64)
    distance = tl.zeros([BLOCK_S], tl.float64)
    at = q + b * q_stride_b + p * q_stride_h + row.to(tl.int64)[:, None] * q_stride_s
    for start in tl.range(0, head_dim, BLOCK_D):
        dim = start + tl.arange(0, BLOCK_D)
        inside = ok[:, None] & (dim < head_dim)[None, :]
        x = tl.load(at + dim[None, :] * q_stride_d, mask=inside, other=0.0).to(tl.float64)
        difference = tl.where(inside, x - (tl.sum(x, 0) / number)[None, :], 0.0)
        distance += tl.sum(difference * difference, 1)
    distance = tl.where(distance == distance, distance, -1.0)
    distance = tl.where(ok, distance, -2.0)
    best = tl.argmax(tl.reshape(distance, [BLOCK_S // WINDOW, WINDOW]), 1)
    window = tl.program_id(0) * (BLOCK_S // WINDOW) + tl.arange(0, BLOCK_S // WINDOW)
    out = chosen + tl.program_id(1).to(tl.int64) * num_windows + window
    tl.store(out, window.to(tl.int64) * WINDOW + best, mask=window < num_windows)


def outlying_queries(q: Tensor, valid: Tensor, window: int) -> Tensor:
    """``flexproxy.stages.proxy.outlying_queries``."""
    batch, proxies, num_queries, head_dim = q.shape
    num_windows = -(-num_queries // window)
    chosen = torch.empty(batch, proxies, num_windows, dtype=torch.int64, device=q.device)
    launch(
        _outlying_kernel,
        (-(-num_queries // NEIGHBOURS), batch * proxies, 1),
        Options(warps=8),
        q=q,
        valid=valid,
        chosen=chosen,
        num_rows=num_queries,
        num_windows=num_windows,
        proxies=proxies,
        head_dim=head_dim,
        WINDOW=window,
        BLOCK_S=NEIGHBOURS,
        BLOCK_D=power_of_2(head_dim, 16, 64),
    )
    return chosen
