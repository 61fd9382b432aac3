"""Triton kernel of stage 1: the query of every window that is farthest from the mean of its neighbours."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.config import NEIGHBOURS
from flexproxy.ops.kernels.launch import launch, power_of_2, strides


@triton.jit(do_not_specialize=["valid_stride_b", "valid_stride_h", "num_rows", "num_windows", "proxies"])
def _outlying_kernel(
    q, valid, chosen,
    stride_b, stride_h, stride_s, stride_d, valid_stride_b, valid_stride_h, num_rows, num_windows, proxies, head_dim,
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
    at = q + b * stride_b + p * stride_h + row.to(tl.int64)[:, None] * stride_s
    for start in tl.range(0, head_dim, BLOCK_D):
        dim = start + tl.arange(0, BLOCK_D)
        inside = ok[:, None] & (dim < head_dim)[None, :]
        x = tl.load(at + dim[None, :] * stride_d, mask=inside, other=0.0).to(tl.float64)
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
        (q, valid, chosen),
        (*q.stride(), *strides(valid, 2), num_queries, num_windows, proxies, head_dim),
        (window, NEIGHBOURS, power_of_2(head_dim, 16, 64)),
        warps=8,
    )
    return chosen
