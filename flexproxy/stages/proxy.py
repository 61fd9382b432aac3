"""Stage 1, proxy heads: which heads go together, and their means (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from flexproxy.config import NEIGHBOURS, ProxyConfig
from flexproxy.ops.cache import kept
from flexproxy.ops.operators import operator
from flexproxy.ops.tensors import is_contiguous, pad_to_multiple

Groups = tuple[tuple[int, ...], ...]
CHUNK_ELEMENTS = 2**22  # of proxy queries in one piece, in double precision 32 MiB


def head_groups(config: ProxyConfig, num_q_heads: int, num_kv_heads: int) -> tuple[Groups, Groups]:
    """The query heads, and the key heads, of every proxy.

    A key head belongs to a group if a query head of the group uses it, and counts once.

    Raises:
        ValueError: the proxies do not fit the heads.
    """
    groups = config.groups
    if groups is None:
        num_proxies = config.proxies(num_q_heads, num_kv_heads)
        fits = num_kv_heads % num_proxies == 0 or (num_proxies % num_kv_heads == 0 and num_q_heads % num_proxies == 0)
        if not fits:
            possible = [
                p
                for p in range(1, num_q_heads + 1)
                if num_kv_heads % p == 0 or (p % num_kv_heads == 0 and num_q_heads % p == 0)
            ]
            raise ValueError(
                f"num_proxies: expected a divisor of the {num_kv_heads} KV heads, or a multiple of it that divides the "
                f"{num_q_heads} query heads, got {num_proxies}; use one of {possible}, or set groups"
            )
        groups = tuple(head * num_proxies // num_q_heads for head in range(num_q_heads))
    elif len(groups) != num_q_heads:
        raise ValueError(
            f"groups: expected the proxy index of each of the {num_q_heads} query heads, got {len(groups)} of them; "
            "name one for each, or use num_proxies"
        )
    heads_per_kv = num_q_heads // num_kv_heads
    q_heads: list[list[int]] = [[] for _ in range(max(groups) + 1)]
    for head, proxy in enumerate(groups):
        q_heads[proxy].append(head)
    k_heads = [sorted({head // heads_per_kv for head in heads}) for heads in q_heads]
    return tuple(map(tuple, q_heads)), tuple(map(tuple, k_heads))


def proxy_of_heads(q_groups: Groups, device: torch.device) -> Tensor:
    """Proxy index of every query head, int64 ``[Hq]``, made on the device: a copy from the host would synchronise."""
    num_heads = sum(map(len, q_groups))
    if len(q_groups) == 1:
        return torch.zeros(num_heads, dtype=torch.int64, device=device)
    return _proxy_table(device, q_groups).clone()


@kept(256)
def _proxy_table(device: torch.device, q_groups: Groups) -> Tensor:
    members, sizes = flat(q_groups)
    num_heads = len(members)
    if is_contiguous(members, sizes, num_heads):
        return torch.arange(num_heads, device=device) // sizes[0]
    index = {head: proxy for proxy, heads in enumerate(q_groups) for head in heads}
    return torch.stack([torch.full((), index[head], dtype=torch.int64, device=device) for head in range(num_heads)])


def pool_heads(x: Tensor, groups: Groups, stride: int) -> Tensor:
    """Mean over the heads of each group, of every stride-th token: ``[B, H, S, D]`` to ``[B, P, ceil(S / stride), D]``.

    Accumulated in fp32 and rounded to the dtype of ``x``.
    """
    return pool_groups(x, *flat(groups), stride)


def flat(groups: Groups) -> tuple[list[int], list[int]]:
    """``members`` and ``sizes`` of ``pool_groups``: the heads of all groups in a row, and how many each has."""
    return [head for heads in groups for head in heads], [len(heads) for heads in groups]


@operator(lambda a: ((a.x.shape[0], len(a.sizes), -(-a.x.shape[2] // a.stride), a.x.shape[3]), a.x.dtype))
def pool_groups(x: Tensor, members: Sequence[int], sizes: Sequence[int], stride: int) -> Tensor:
    """``pool_heads`` for groups of the given sizes, whose heads follow one another in ``members``."""
    x = x[:, :, ::stride]
    if is_contiguous(members, sizes, x.shape[1]):
        by_group: Tensor = x.unflatten(1, (len(sizes), -1))
        return by_group.mean(dim=2, dtype=torch.float32).to(x.dtype)
    ends = list(accumulate(sizes))
    groups = [members[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    means = [torch.stack([x[:, head] for head in heads], 1).mean(dim=1, dtype=torch.float32) for heads in groups]
    return torch.stack(means, 1).to(x.dtype)


@operator(lambda a: ((*a.q.shape[:2], -(-a.q.shape[2] // a.window)), torch.int64))
def outlying_queries(q: Tensor, valid: Tensor, window: int) -> Tensor:
    """In every window the query that is farthest from the mean of its neighbours: int64 ``[B, P, ceil(Sq / window)]``.

    Neighbours are the valid queries of the ``NEIGHBOURS`` tokens, from a multiple of that number on, that the window
    lies in. In double precision, so that the choice does not depend on the order of summation. The first of equal
    distances wins; a distance of NaN comes after all others, and queries that are not valid come last.

    Args:
        q: proxy queries ``[B, P, Sq, D]``.
        valid: bool ``[b, p, Sq]``, the query has an allowed key.
        window: queries in a window, a power of two up to ``NEIGHBOURS``.
    """
    batch, proxies, num_queries, head_dim = q.shape
    chosen = []
    rows_per_chunk = max(1, CHUNK_ELEMENTS // (batch * proxies * head_dim * NEIGHBOURS)) * NEIGHBOURS
    for start in range(0, num_queries, rows_per_chunk):
        rows = slice(start, min(start + rows_per_chunk, num_queries))
        present = pad_to_multiple(valid[:, :, rows], -1, NEIGHBOURS, False).unflatten(-1, (-1, NEIGHBOURS))[..., None]
        x = pad_to_multiple(q[:, :, rows].double(), -2, NEIGHBOURS, 0.0).unflatten(2, (-1, NEIGHBOURS))
        mean = torch.where(present, x, 0.0).sum(-2, keepdim=True) / present.sum(-2, keepdim=True).clamp(min=1)
        distance = (x - mean).square().sum(-1)
        distance = distance.masked_fill(distance.isnan(), -1.0).masked_fill(~present[..., 0], -2.0)
        best = distance.reshape(batch, proxies, -1, window).argmax(-1)
        chosen.append(best + torch.arange(start, start + best.shape[-1] * window, window, device=q.device))
    return torch.cat(chosen, -1)[..., : -(-num_queries // window)].contiguous()


def merge_heads(mask: Tensor, groups: Groups) -> Tensor:
    """Whether any head of a group has it: bool ``[b, Hq, ...]`` to ``[b, P, ...]``; ``[b, 1, ...]`` stays."""
    if mask.shape[1] == 1:
        return mask
    return torch.stack([torch.stack([mask[:, head] for head in heads], 1).any(dim=1) for heads in groups], 1)
