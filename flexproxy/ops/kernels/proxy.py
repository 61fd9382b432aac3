"""Triton kernels of stage 1: the means of groups of heads, and the query that is farthest from its neighbours' mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.config import NEIGHBOURS
from flexproxy.ops.cache import kept
from flexproxy.ops.kernels.launch import Launched, Options, launch, power_of_2
from flexproxy.ops.tensors import is_contiguous


@triton.jit
def _pool_rows(
    x, heads, pooled, at, stride_h, stride_s, stride_d, first_row, num_rows, step, largest, head_dim,
    HAS_TABLE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """BLOCK_S rows of one proxy, which are ``step`` tokens apart.

    Head after head: many at once, a power of two apart, are slow to read.
    """
    proxy = tl.program_id(1)
    row = first_row + tl.arange(0, BLOCK_S)
    dim = tl.arange(0, BLOCK_D)
    inside = (row < num_rows)[:, None] & (dim < head_dim)[None, :]
    at = x + at + (row.to(tl.int64) * step)[:, None] * stride_s + dim[None, :] * stride_d  # [rows, D]
    table = heads + proxy * (largest + 1) if HAS_TABLE else heads
    number = tl.load(table) if HAS_TABLE else largest
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for member in tl.range(0, number):
        head = tl.load(table + 1 + member) if HAS_TABLE else proxy * largest + member
        total += tl.load(at + head.to(tl.int64) * stride_h, mask=inside, other=0.0).to(tl.float32)
    out = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + proxy) * num_rows + row
    tl.store(pooled + out[:, None] * head_dim + dim[None, :], (total / number).to(pooled.dtype.element_ty), mask=inside)


POOL_NUMBERS = ["q_rows", "k_rows", "q_step", "k_step", "q_largest", "k_largest", "q_programs"]


@triton.jit(do_not_specialize=POOL_NUMBERS)
def _pool_kernel(
    q, k, q_heads, k_heads, q_pooled, k_pooled,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d, k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    q_rows, k_rows, q_step, k_step, q_largest, k_largest, q_programs, head_dim,
    Q_TABLE: tl.constexpr, K_TABLE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The first programs pool q, the others k."""
    b = tl.program_id(2).to(tl.int64)
    program = tl.program_id(0)
    if program < q_programs:
        _pool_rows(
            q, q_heads, q_pooled, b * q_stride_b, q_stride_h, q_stride_s, q_stride_d, program * BLOCK_S, q_rows, q_step,
            q_largest, head_dim, Q_TABLE, BLOCK_D, BLOCK_S,
        )  # fmt: skip
    else:
        _pool_rows(
            k, k_heads, k_pooled, b * k_stride_b, k_stride_h, k_stride_s, k_stride_d, (program - q_programs) * BLOCK_S,
            k_rows, k_step, k_largest, head_dim, K_TABLE, BLOCK_D, BLOCK_S,
        )  # fmt: skip


class Pool(NamedTuple):
    """Means to make: of groups of the heads of ``x``, as in ``flexproxy.stages.proxy.pool_groups``, into ``out``."""

    x: Tensor
    members: Sequence[int]
    sizes: Sequence[int]
    stride: int
    out: Tensor

    def table(self) -> Tensor | None:
        if is_contiguous(self.members, self.sizes, self.x.shape[1]):
            return None
        return _table(self.x.device, tuple(self.members), tuple(self.sizes))


def pool_groups(x: Tensor, members: Sequence[int], sizes: Sequence[int], stride: int) -> Tensor:
    """``flexproxy.stages.proxy.pool_groups``."""
    shape = x.shape[0], len(sizes), -(-x.shape[2] // stride), x.shape[3]
    pooled = torch.empty(shape, dtype=x.dtype, device=x.device)
    pool_pair(Pool(x, members, sizes, stride, pooled), None)
    return pooled


def pool_pair(first: Pool, other: Pool | None) -> Launched | None:
    """Both in one launch, or the first alone: as many groups of heads of the same dimension."""
    batch, proxies, q_rows, head_dim = first.out.shape
    second, k_rows, k_heads = first, 0, None  # no program reads these
    if other is not None:
        second, k_rows, k_heads = other, other.out.shape[2], other.table()
    q_heads = first.table()
    block_d = power_of_2(head_dim, 16, 256)
    block_s = max(1, 8192 // block_d)
    q_programs = -(-q_rows // block_s)
    return launch(
        _pool_kernel,
        (q_programs - (-k_rows // block_s), proxies, batch),
        q=first.x,
        k=second.x,
        q_heads=q_heads,
        k_heads=k_heads,
        q_pooled=first.out,
        k_pooled=second.out,
        q_rows=q_rows,
        k_rows=k_rows,
        q_step=first.stride,
        k_step=second.stride,
        q_largest=max(first.sizes),
        k_largest=max(second.sizes),
        q_programs=q_programs,
        head_dim=head_dim,
        Q_TABLE=q_heads is not None,
        K_TABLE=k_heads is not None,
        BLOCK_D=block_d,
        BLOCK_S=block_s,
    )


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
