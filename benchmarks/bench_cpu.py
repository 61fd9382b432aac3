"""Attention on a CPU: the estimate and ``flexproxy.attention`` against ``scaled_dot_product_attention``, causal, fp32.

    python -m benchmarks.bench_cpu

8 query and 2 key/value heads of 64, random; cores should be idle (column ``load``: processes that ran or waited in the
minute before). Rows by tokens and ``what``: dense, build (of the selection), attention. Times are of the wall clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flexproxy
from benchmarks.harness import (
    Density,
    Lengths,
    Out,
    Quick,
    Row,
    command,
    quantiles,
    result_path,
    run_cases,
    settings_of,
)
from flexproxy import ProxyConfig, masks, reference

REPEATS = 5


def qkv(length: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    return torch.randn(1, 8, length, 64), torch.randn(1, 2, length, 64), torch.randn(1, 2, length, 64)


def check(config: ProxyConfig) -> None:
    """Sparse output is dense attention under the tokens of the selected blocks."""
    q, k, v = qkv(2000)
    tokens = flexproxy.select(q, k, config=config).block_map().repeat_interleave(128, 2).repeat_interleave(128, 3)
    allowed = tokens[..., :2000, :2000] & reference.token_mask(masks.causal, 1, 8, 2000, 2000, "cpu")
    wanted = reference.attention(q, k, v, allowed, 64**-0.5)
    error = (flexproxy.attention(q, k, v, config=config, when="always").double() - wanted).abs().max().item()
    if error > 1e-5:
        raise SystemExit(f"correctness gate failed: attention is off by {error:.2g}; nothing was timed")


def times(run: Callable[[], Any]) -> Row:
    run()
    seen = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        run()
        seen.append((time.perf_counter() - begin) * 1e3)
    return quantiles(seen)


def bench(
    *,
    lengths: Lengths = "8192,32768",
    density: Density = 0.33,
    out: Out = None,
    quick: Quick = False,
) -> None:
    settings = settings_of(locals())
    configs = {stride: ProxyConfig(density=density, min_budget=512, stride=stride) for stride in (4, 2)}
    for config in configs.values():
        check(config)

    def measure(length: int) -> list[Row]:
        q, k, v = qkv(length)
        dense_row = times(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        rows: list[Row] = [{"what": "dense", "stride": None} | dense_row]
        for stride, config in configs.items():
            rows.append({"what": "build", "stride": stride} | times(partial(flexproxy.select, q, k, config=config)))
            run = partial(flexproxy.attention, q, k, v, config=config, when="always")
            rows.append({"what": "attention", "stride": stride} | times(run))
        common = {"tokens": length, "load": round(os.getloadavg()[0], 2), "error": None}
        ratio = dense_row["median_ms"]
        return [common | row | {"dense_over_it": round(ratio / row["median_ms"], 2)} for row in rows]

    run_cases(lengths, measure, result_path("cpu", out, quick), settings)


def main(argv: Sequence[str] | None = None) -> None:
    command(bench, argv, lengths="2048")


if __name__ == "__main__":
    main()
