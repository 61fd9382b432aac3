"""Requests of different lengths, packed and in pages: each as it is alone."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flexproxy
from flexproxy import ProxyConfig
from flexproxy.sparse.ragged import Keys, Packed, Paged, Request, _wide, attend_requests
from tests.accuracy import eagerly

HQ, HKV, D, PAGE = 4, 2, 16, 8
SETTINGS = ProxyConfig(density=0.4, min_budget=16, block_size=16, num_proxies=1)
# A first chunk, a chunk after 77 cached tokens, a whole prompt; between them, five tokens of others.
REQUESTS = (Request(0, 0, 64, 64), Request(2, 69, 50, 127), Request(3, 119, 33, 33))
TOKENS = 160


class Made:
    """Queries of all tokens, and keys of four requests, the second of which is not asked for."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.q = 3 * torch.randn(TOKENS, HQ, D, device=device, dtype=dtype)
        self.lengths = [64, 40, 127, 33]
        self.keys = [torch.randn(n, HKV, 2 * D, device=device, dtype=dtype) for n in self.lengths]

    def packed(self) -> Packed:
        k, v = torch.cat(self.keys).chunk(2, -1)
        offsets = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        return Packed(k, v, offsets)

    def paged(self) -> Paged:
        """Pages in a random order, heads before tokens. What nobody wrote is NaN; further columns lead nowhere."""
        device = self.q.device
        columns = [-(-n // PAGE) for n in self.lengths]
        order = torch.randperm(sum(columns), device=device).to(torch.int32)
        table = torch.full((len(columns), max(columns) + 1), 2**30, dtype=torch.int32, device=device)
        cache = torch.full((sum(columns), HKV, PAGE, 2 * D), torch.nan, dtype=self.q.dtype, device=device)
        first = 0
        for row, (number, keys) in enumerate(zip(columns, self.keys, strict=True)):
            own = order[first : first + number]
            table[row, :number] = own
            padded = F.pad(keys, (0, 0, 0, 0, 0, number * PAGE - len(keys)), value=torch.nan)
            cache[own] = padded.unflatten(0, (number, PAGE)).transpose(1, 2)
            first += number
        return Paged(cache.transpose(1, 2), table)


def alone(made: Made, request: Request, config: ProxyConfig) -> Tensor:
    """The output of one request, by itself, ``[tokens, Hq, D]``."""
    q = made.q[request.start : request.start + request.num_queries].transpose(0, 1)[None]
    k, v = made.keys[request.row].transpose(0, 1)[None].chunk(2, -1)
    return flexproxy.attention(q, k, v, config=config, when="always")[0].transpose(0, 1)


@pytest.mark.parametrize("kind", ["packed", "paged"])
@pytest.mark.parametrize("config", [SETTINGS, ProxyConfig(gamma=1.0, block_size=16)], ids=["budget", "all"])
def test_each_request_is_as_it_is_alone(kind: str, config: ProxyConfig) -> None:
    made = Made("cpu")
    keys: Keys = made.packed() if kind == "packed" else made.paged()
    out = torch.full_like(made.q, 7.0)
    with eagerly():
        assert attend_requests(made.q, keys, REQUESTS, out, config=config, when="always") is out
        written = torch.zeros(TOKENS, dtype=torch.bool)
        for request in REQUESTS:
            rows = slice(request.start, request.start + request.num_queries)
            torch.testing.assert_close(out[rows], alone(made, request, config), rtol=0, atol=0)
            if config.keeps_all:
                torch.testing.assert_close(out[rows], dense(made, request), rtol=1e-5, atol=1e-5)
            written[rows] = True
    assert bool((out[~written] == 7.0).all())


def dense(made: Made, request: Request) -> Tensor:
    """Plain attention, the last query at the last key."""
    q = made.q[request.start : request.start + request.num_queries].transpose(0, 1)
    k, v = made.keys[request.row].transpose(0, 1).repeat_interleave(HQ // HKV, 0).chunk(2, -1)
    mask = torch.ones(request.num_queries, request.num_keys, dtype=torch.bool, device=q.device)
    mask = mask.tril(request.num_keys - request.num_queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_dim", [16, 5])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("padding", [0, 1, "every second"])
@pytest.mark.parametrize("heads_first", [True, False], ids=["heads first", "tokens first"])
def test_pages_are_gathered_whatever_their_strides(
    dtype: torch.dtype, head_dim: int, offset: int, padding: int | str, heads_first: bool
) -> None:
    """As they are read one by one; where elements of 8 bytes fit, by these."""
    width = 4 * head_dim if padding == "every second" else 2 * head_dim + int(padding)
    shape = (6, HKV, PAGE, width) if heads_first else (6, PAGE, HKV, width)
    memory = torch.randn(offset + math.prod(shape)).to(dtype)
    cache = memory[offset:].view(shape)
    cache = cache[..., ::2] if padding == "every second" else cache[..., : 2 * head_dim]
    pages = cache.transpose(1, 2) if heads_first else cache
    assert (_wide(pages).dtype == torch.int64) == (head_dim == 16 and offset == 0 and padding == 0)
    order = [4, 0, 5]
    k, v = Paged(pages, torch.tensor([[2, 2, 2, 9], [*order, 9]], dtype=torch.int32)).of(Request(1, 0, 1, 19))
    expected = torch.cat([pages[page] for page in order])[:19].transpose(0, 1)[None]
    assert k.dtype == v.dtype == dtype
    for gathered, whole in zip((k, v), expected.chunk(2, -1), strict=True):
        torch.testing.assert_close(gathered, whole, rtol=0, atol=0)


def test_no_request() -> None:
    made = Made("cpu")
    requests: Sequence[Request] = ()
    assert bool((attend_requests(made.q, made.paged(), requests, torch.ones_like(made.q), config=SETTINGS) == 1).all())


def test_one_request_is_gathered_at_a_time() -> None:
    """The memory of a step is that of its longest request."""
    made = Made("cpu")
    alive: list[weakref.ref[Tensor]] = []

    class Watched(NamedTuple):
        keys: Keys

        def of(self, request: Request) -> tuple[Tensor, Tensor]:
            assert all(reference() is None for reference in alive)
            k, v = self.keys.of(request)
            alive.extend((weakref.ref(k), weakref.ref(v)))
            return k, v

    with eagerly():
        attend_requests(made.q, Watched(made.paged()), REQUESTS, torch.empty_like(made.q), config=SETTINGS)
    assert len(alive) == 2 * len(REQUESTS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """Compiled, without a synchronisation."""
    made = Made("cuda", dtype)
    config = ProxyConfig(gamma=1.0, num_proxies=1)
    expected = {request: dense(made, request) for request in REQUESTS}
    keys = made.paged()
    out = torch.zeros_like(made.q)
    attend_requests(made.q, keys, REQUESTS, out, config=config, when="always")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            attend_requests(made.q, keys, REQUESTS, out, config=config, when="always")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for request, wanted in expected.items():
        rows = slice(request.start, request.start + request.num_queries)
        torch.testing.assert_close(out[rows], wanted, rtol=2e-2, atol=2e-2)
