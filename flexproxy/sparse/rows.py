"""Inference under the default mask on a CPU: ``scaled_dot_product_attention`` of gathered blocks, without compilation.

NOTE [Rows on a CPU]
The CPU kernel of ``flex_attention`` takes longer for a block than ``scaled_dot_product_attention`` does, in fp32 half
as long again and more, and seconds to compile. The latter has no lists of blocks, but is as fast for gathered ones as
for a sequence, if it gets many queries at once, and no more keys than stay in the cache of a core. So the heads of a
proxy that read the same keys attend together: each keeps the first blocks of one ranking, and those that all of them
keep come first, then those that all but one keep, and so on. Rows of blocks with equal counts are one batch. The pieces
are merged by their log-sum-exps, in fp32. Only the block on the diagonal has a mask; where queries lie askew to the
blocks of keys there would be two.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from flexproxy.ops.compat import in_a_mode
from flexproxy.ops.tensors import pad_to_multiple
from flexproxy.selection import Selection

MAX_GATHERED = 2**20  # elements of keys, and of values, that are gathered at once: 4 MiB each in fp32
MAX_KEYS = 2048  # in one piece: with a head dimension of 64 in fp32, keys and values take 1 MiB


def fits(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> bool:
    """Whether ``attend`` can do it, under the default mask, where nothing but the output is needed."""
    aligned = (k.shape[2] - q.shape[2]) % block_size == 0
    eager = not torch.compiler.is_compiling() and not in_a_mode()
    return q.device.type == "cpu" and aligned and v.shape[3] == q.shape[3] and eager


def attend(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    """Attention to the blocks of a selection under the default mask: ``[B, Hq, Sq, D]``. See NOTE [Rows on a CPU]."""
    num_queries, size, scale = q.shape[2], selection.block_size, selection.scale
    # Where the last dimension is not contiguous, the kernel returns wrong numbers without an error (torch 2.13).
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    q, k, v = (pad_to_multiple(x.detach(), -2, size, 0.0).unflatten(2, (-1, size)) for x in (q, k, v))
    before = k.shape[2] - q.shape[2]
    row = torch.arange(q.shape[2])
    # The blocks of a row by rank, that on the diagonal behind them all; it is forced, so it is one of the count.
    order = selection.rank.clone()
    order[:, :, row, before + row] = k.shape[2]
    order = order.argsort(dim=-1)
    counts = torch.minimum(selection.count - 1, before + row).tolist()
    out = torch.empty_like(q)
    gathered = [x.new_empty(max(k.shape[2], MAX_GATHERED // x[0, 0, 0].numel()), *x.shape[3:]) for x in (k, v)]
    for b in range(len(q)):
        for proxy, kv_head, heads in _heads_together(selection, k.shape[1]):
            keys, values = k[b, kv_head], v[b, kv_head]
            for rows, of_heads in _equal_rows(list(zip(*(counts[b][h] for h in heads), strict=True)), keys[0].numel()):
                by_count = sorted(zip(of_heads, heads, strict=True), reverse=True)
                number, own = [count for count, _ in by_count], [head for _, head in by_count]
                queries = q[b, own, rows].transpose(0, 1).contiguous()  # [rows, heads, size, D]
                diagonal = slice(before + rows.start, before + rows.stop)
                result, lse = _attend(queries, keys[diagonal, None], values[diagonal, None], scale, is_causal=True)
                index = order[b, proxy, rows, : number[0]].flatten()
                for x, into in zip((keys, values), gathered, strict=True):
                    torch.index_select(x, 0, index, out=into[: len(index)])
                listed_keys, listed_values = (x[: len(index)].view(len(queries), 1, -1, x.shape[2]) for x in gathered)
                for together, part in _pieces(number, size):
                    other = _attend(queries[:, :together], listed_keys[:, :, part], listed_values[:, :, part], scale)
                    _merge_(result[:, :together], lse[:, :together], *other)
                out[b, own, rows] = result.transpose(0, 1).to(out.dtype)
    return out.flatten(2, 3)[:, :, :num_queries]


def _heads_together(selection: Selection, num_kv_heads: int) -> list[tuple[int, int, list[int]]]:
    """Proxy, key head, and the query heads that have both."""
    proxy_of = selection.proxy_of.tolist()
    together: dict[tuple[int, int], list[int]] = {}
    for head, proxy in enumerate(proxy_of):
        together.setdefault((proxy, head * num_kv_heads // len(proxy_of)), []).append(head)
    return [(*both, heads) for both, heads in together.items()]


def _equal_rows(counts: list[tuple[int, ...]], block_elements: int) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Runs of rows of blocks with equal counts, no more at once than may be gathered, and these counts."""
    start = 0
    for of_heads, run in groupby(counts):
        stop = start + len(list(run))
        at_once = max(1, MAX_GATHERED // (max(1, *of_heads) * block_elements))
        for first in range(start, stop, at_once):
            yield slice(first, min(first + at_once, stop)), of_heads
        start = stop


def _pieces(counts: list[int], size: int) -> Iterator[tuple[int, slice]]:
    """How many heads, of those with the largest counts, attend to which of the gathered keys."""
    start = 0
    for together in range(len(counts), 0, -1):
        stop = counts[together - 1] * size
        for first in range(start, stop, MAX_KEYS):
            yield together, slice(first, min(first + MAX_KEYS, stop))
        start = stop


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool = False) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, in fp32, of q ``[rows, heads, size, D]``; k and v ``[rows, 1, keys, D]``."""
    rows, heads, size, dim = q.shape
    if is_causal:
        k, v = (x.expand(-1, heads, -1, -1) for x in (k, v))
    else:
        q = q.reshape(rows, 1, heads * size, dim)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=is_causal, scale=scale)
    return out.float().view(rows, heads, size, dim), lse.float().view(rows, heads, size)


def _merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Into the first, as if it had been one softmax."""
    out.lerp_(other, torch.sigmoid(other_lse - lse)[..., None])
    torch.logaddexp(lse, other_lse, out=lse)
