"""Attention of requests of different lengths, as serving engines hold them.

The queries of all requests of a step lie in one tensor ``[tokens, Hq, D]``, request after request. Their keys lie in a
tensor likewise, or in the pages of a cache. Lengths and offsets are Python numbers, so that nothing waits for the
device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flexproxy.config import ProxyConfig
from flexproxy.sparse.attention import attention
from flexproxy.sparse.plan import When


class Request(NamedTuple):
    """The part of one request that a step computes.

    row: its row of the block table, or its place among the requests.
    start: its first query in the tensor of queries.
    num_queries: new tokens; the last of its keys.
    num_keys: cached tokens and new ones.
    """

    row: int
    start: int
    num_queries: int
    num_keys: int


class Keys(Protocol):
    """Where the keys and values of requests are."""

    def of(self, request: Request) -> tuple[Tensor, Tensor]:
        """Keys and values of one request, each ``[1, Hkv, Skv, D]``."""


class Packed(NamedTuple):
    """Keys and values of all requests, ``[keys, Hkv, D]``; those of request i begin at ``offsets[i]``."""

    k: Tensor
    v: Tensor
    offsets: Sequence[int]

    def of(self, request: Request) -> tuple[Tensor, Tensor]:
        start = self.offsets[request.row]
        rows = slice(start, start + request.num_keys)
        return self.k[rows].transpose(0, 1)[None], self.v[rows].transpose(0, 1)[None]


class Paged(NamedTuple):
    """Pages of keys and values side by side, ``[pages, page_size, Hkv, D + D]``, any strides, without gradients.

    The keys of a request are gathered apart from its values: NOTE [Strides that are inferred] in
    flexproxy/sparse/kernel.py.

    table: int ``[requests, columns]``; page i of a request holds its tokens from ``i * page_size`` on. Columns behind
        its last page are not read.
    """

    pages: Tensor
    table: Tensor

    def of(self, request: Request) -> tuple[Tensor, Tensor]:
        own = self.table[request.row, : -(-request.num_keys // self.pages.shape[1])]
        gathered = (x.index_select(0, own).view(self.pages.dtype) for x in _wide(self.pages).chunk(2, -1))
        k, v = (x.flatten(0, 1)[: request.num_keys].transpose(0, 1)[None] for x in gathered)
        return k, v


def _wide(pages: Tensor) -> Tensor:
    """The same memory in elements of 8 bytes, where that fits: a GPU gathers these faster. Without gradients."""
    number = 8 // pages.itemsize
    fits = pages.shape[-1] // 2 % number == 0 and pages.stride(-1) == 1
    fits = fits and all(n % number == 0 for n in (pages.storage_offset(), *pages.stride()[:-1]))
    return pages.view(torch.int64) if fits else pages


def attend_requests(
    q: Tensor,
    keys: Keys,
    requests: Iterable[Request],
    out: Tensor,
    *,
    config: ProxyConfig,
    scale: float | None = None,
    when: When = "auto",
) -> Tensor:
    """``flexproxy.attention`` of each request, causal: its last query sees all of its keys.

    Args:
        q: queries ``[tokens, Hq, D]``; tokens of no request are not read.
        keys: where the keys and values are.
        out: ``[tokens, Hq, D]``; the rows of the requests are written, others stay.
        config, scale, when: as in ``flexproxy.attention``.

    Returns:
        ``out``.

    Raises:
        TypeError, ValueError: as ``flexproxy.attention``.
    """
    for request in requests:
        rows = slice(request.start, request.start + request.num_queries)
        k, v = keys.of(request)
        result = attention(q[rows].transpose(0, 1)[None], k, v, config=config, scale=scale, when=when)
        out[rows] = result[0].transpose(0, 1)
        del k, v, result  # before the keys of the next request are gathered
    return out
