"""A step of a serving engine without the engine: pages and lengths that are made up, on a GPU.

What ``flexproxy.integrations.vllm`` does with a step: which requests are sparse, the gather of their pages, attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import flexproxy
from benchmarks.harness import Row, time_ms
from flexproxy import ProxyConfig, reference
from flexproxy.integrations.vllm.step import dense_runs, prefills, sparse_requests
from flexproxy.sparse.ragged import Paged, Request, attend_requests

DTYPE, PAGE = torch.bfloat16, 16
LAYOUTS = ("tokens first", "heads first")  # NHD and HND, as vLLM calls them
Requests = tuple[tuple[int, int], ...]  # new tokens, and all tokens, of each request


class Step(NamedTuple):
    """Queries of a step ``[tokens, Hq, D]``, and a cache in which its requests have their pages, in random order."""

    q: Tensor
    paged: Paged
    starts: list[int]
    lengths: list[int]
    prefilling: list[bool]

    def sparse(self, config: ProxyConfig) -> tuple[Request, ...]:
        """The prefills of at least a block."""
        candidates = prefills(self.starts, self.lengths, self.prefilling)
        return sparse_requests(candidates, lambda queries, keys: queries >= config.block_size)

    def alone(self, request: Request) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of one request, contiguous, ``[1, H, S, D]``; its pages are read one by one."""
        rows = slice(request.start, request.start + request.num_queries)
        pages = self.paged.table[request.row, : -(-request.num_keys // PAGE)].tolist()
        tokens = torch.cat([self.paged.pages[page] for page in pages])[: request.num_keys]
        k, v = (x.transpose(0, 1)[None].contiguous() for x in tokens.chunk(2, -1))
        return self.q[rows].transpose(0, 1)[None].contiguous(), k, v


def make_step(requests: Requests, heads: tuple[int, int], head_dim: int, layout: str) -> Step:
    """requests: new tokens and all tokens of each; one new token is decoding. heads: of queries, and of keys."""
    torch.manual_seed(0)
    starts = [0]
    for queries, _ in requests:
        starts.append(starts[-1] + queries)
    columns = [-(-keys // PAGE) for _, keys in requests]
    order = torch.randperm(sum(columns), device="cuda").to(torch.int32)
    table = torch.zeros(len(requests), max(columns), dtype=torch.int32, device="cuda")
    for row, own in enumerate(order.split(columns)):
        table[row, : len(own)] = own
    inner = (PAGE, heads[1]) if layout == LAYOUTS[0] else (heads[1], PAGE)
    cache = torch.randn(sum(columns), *inner, 2 * head_dim, device="cuda", dtype=DTYPE)
    pages = cache if layout == LAYOUTS[0] else cache.transpose(1, 2)
    q = 2 * torch.randn(starts[-1], heads[0], head_dim, device="cuda", dtype=DTYPE)
    return Step(q, Paged(pages, table), starts, [keys for _, keys in requests], [n > 1 for n, _ in requests])


def check_step(layout: str) -> None:
    """The gate. Two decodes, a chunk in the middle of a prompt, a short prompt, a whole prompt; ragged lengths."""
    step = make_step(((1, 900), (1024, 3000), (1, 70), (40, 40), (1300, 1300)), (8, 2), 128, layout)
    keep_all, budget = ProxyConfig(gamma=1.0, num_proxies=1), ProxyConfig(density=0.3, min_budget=256, num_proxies=1)
    requests = step.sparse(keep_all)
    runs = dense_runs(step.starts, requests)
    found = [request.row for request in requests], [(run.first, run.end) for run in runs]
    _require(found == ([1, 4], [(0, 1), (2, 4)]), f"{layout}: wrong requests are sparse: {found}")
    dense = attend_requests(step.q, step.paged, requests, torch.zeros_like(step.q), config=keep_all, when="always")
    sparse = attend_requests(step.q, step.paged, requests, torch.zeros_like(step.q), config=budget, when="always")
    for request in requests:
        q, k, v = step.alone(request)
        rows = slice(request.start, request.start + request.num_queries)
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device="cuda").tril(k.shape[2] - q.shape[2])
        exact = reference.attention(q, k, v, allowed, q.shape[-1] ** -0.5)
        error = (dense[rows].transpose(0, 1)[None].double() - exact).abs().max().item()
        _require(
            error <= 4 * torch.finfo(DTYPE).eps * exact.abs().max().item(), f"{layout}: error {error:.1e} of dense"
        )
        alone = flexproxy.attention(q, k, v, config=budget, when="always")[0].transpose(0, 1)
        difference = (sparse[rows].float() - alone.float()).abs().max().item()
        _require(
            difference <= 2 * torch.finfo(DTYPE).eps * alone.abs().max().item(), f"{layout}: {difference:.1e} apart"
        )
    _require(not bool(sparse[0].any()), f"{layout}: rows of other requests were written")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SystemExit(f"correctness gate failed: {message}; nothing was timed")


def measure_step(requests: Requests, density: float, layout: str) -> Row:
    """One layer's share of a step, heads as Llama-3.1-8B.

    ``added``: what the step takes beyond build and attention, as a share of these.
    """
    step = make_step(requests, (32, 8), 128, layout)
    config = ProxyConfig(density=density, min_budget=2048)
    sparse, out = step.sparse(config), torch.empty_like(step.q)
    inputs = [step.alone(request) for request in sparse]

    def build() -> None:
        for q, k, _ in inputs:
            flexproxy.build(q, k, config=config)

    def call() -> None:
        for q, k, v in inputs:
            flexproxy.attention(q, k, v, config=config, when="always")

    def gather() -> None:
        for request in sparse:
            step.paged.of(request)

    def whole() -> None:
        attend_requests(step.q, step.paged, sparse, out, config=config, when="always")

    runs: dict[str, Callable[[], None]] = {
        "build": build,
        "call": call,
        "gather": gather,
        "step": whole,
    }
    row: Row = {f"{name}_ms": time_ms(run)["median_ms"] for name, run in runs.items()}
    moved = 2 * sum(request.num_keys for request in sparse) * 8 * 256 * DTYPE.itemsize
    row["gather_gb_per_s"] = round(moved / row["gather_ms"] / 1e6, 1)
    return row | {"added": round((row["step_ms"] - row["call_ms"]) / row["call_ms"], 4)}
