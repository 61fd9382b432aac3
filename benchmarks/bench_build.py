"""Time of flexproxy.build, in total and stage by stage, beside dense attention, on one GPU.

    python -m benchmarks.bench_build --lengths 8192,131072 --num-proxies 1,4,8

bf16, B 1, Hq 32, Hkv 8, D 128, random inputs, causal, blocks of 128, a density of 0.1; stride 4, as in the paper, and
every head its own proxy with one threshold for all rows (``sharing="rows"``). First the gate: ranks and counts are
those of the specification; if not, nothing is timed.

Columns of a row, one for each length, number of proxy heads and way of sharing:
- length (tokens), num_proxies, query_stride, sharing, density (target), min_budget (tokens)
- median_ms, p10_ms, p90_ms, repeats: of one call, by CUDA events
- cpu_ms: of one call on the CPU, until it returns; the median, with nothing queued before
- stage_pool_ms ... stage_other_ms, kernels: device time by the names of kernels, and launches, from a profile of the
  same in two calls, ``select(...).block_mask()``, which launches one kernel after the other at every length
- dense_ms: median of SDPA cuDNN in the same run; share_of_dense: median_ms / dense_ms; None past --dense-up-to
- error, stage_error, dense_error: why something is missing, else None
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import typer

import flexproxy
from benchmarks import gate
from benchmarks.contenders import NUM_Q_HEADS, config_for, cudnn, inputs
from benchmarks.harness import (
    Budget,
    Density,
    Lengths,
    Out,
    Quick,
    Row,
    attempt,
    call_ms,
    command,
    integers,
    listed,
    release,
    require_gpu,
    result_path,
    run_cases,
    settings_of,
    time_ms,
)
from benchmarks.stages import profile_stages
from flexproxy import ProxyConfig

ROWS = ProxyConfig(num_proxies=8, query_stride=16, sharing="rows")  # of the gate, which has 8 heads
LENGTHS = "8192,16384,32768,65536,131072,262144,524288,1048576"


class Case(NamedTuple):
    length: int
    num_proxies: int
    rows_of: int | None = None  # the query stride where rows share

    def __str__(self) -> str:
        rows = "" if self.rows_of is None else f", stride {self.rows_of}:4, rows"
        return f"{self.length} tokens, P {self.num_proxies}{rows}"

    def config(self, density: float) -> ProxyConfig:
        config = config_for(density, self.length, self.num_proxies)
        if self.rows_of is not None:
            return replace(config, query_stride=self.rows_of, sharing="rows")
        return config


@functools.lru_cache(maxsize=1)  # the cases of one length follow each other
def dense_time(length: int, budget_ms: float) -> Row:
    q, k, v = inputs(length)
    return attempt(lambda: time_ms(lambda: cudnn(q, k, v), budget_ms))


def measure(case: Case, density: float, dense_up_to: int, budget_ms: float) -> list[Row]:
    config = case.config(density)
    row: Row = {"length": case.length, "num_proxies": case.num_proxies}
    row |= {"query_stride": config.strides[0], "sharing": config.sharing}
    row |= {"density": density, "min_budget": config.min_budget}

    def timed() -> Row:
        q, k, _ = inputs(case.length)
        run = functools.partial(flexproxy.build, q, k, config=config)
        times = time_ms(run, budget_ms) | {"cpu_ms": call_ms(run, 5)[0]}
        stages = attempt(lambda: profile_stages(lambda: flexproxy.select(q, k, config=config).block_mask()))
        return times | {"stage_error": stages.pop("error")} | stages

    row |= attempt(timed)
    release()
    dense = dense_time(case.length, budget_ms) if case.length <= dense_up_to else {"error": None}
    row |= {"dense_ms": dense.get("median_ms"), "dense_error": dense["error"], "share_of_dense": None}
    if row["dense_ms"] and "median_ms" in row:
        row["share_of_dense"] = round(row["median_ms"] / row["dense_ms"], 6)
    return [row]


def bench(
    *,
    lengths: Lengths = LENGTHS,
    num_proxies: Annotated[Any, listed(integers, "Proxy heads.")] = "1,4,8",
    rows: Annotated[Any, listed(integers, "Query strides of heads by themselves whose rows share.")] = "16",
    density: Density = 0.1,
    dense_up_to: Annotated[int, typer.Option(min=1, help="Longest prompt for dense attention.")] = 2**18,
    budget_ms: Budget = 300.0,
    out: Out = None,
    quick: Quick = False,
) -> None:
    settings = settings_of(locals())
    require_gpu()
    for config in (ProxyConfig(), ProxyConfig(num_proxies=4), ROWS):
        gate.check_selection(config)
    kinds = [*((p, None) for p in num_proxies), *((NUM_Q_HEADS, stride) for stride in rows)]
    cases = [Case(length, *kind) for length in lengths for kind in kinds]
    path = result_path("build", out, quick)
    run_cases(cases, lambda case: measure(case, density, dense_up_to, budget_ms), path, settings)


def main(argv: Sequence[str] | None = None) -> None:
    command(bench, argv, lengths="8192,32768", num_proxies="1", rows="16", budget_ms=50.0)


if __name__ == "__main__":
    main()
