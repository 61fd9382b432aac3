"""Device memory that build and attention take at their peak, on one GPU.

    python -m benchmarks.bench_memory --lengths 8192,131072,1048576

bf16, B 1, Hq 32, Hkv 8, D 128, random inputs, causal. First the gate: sparse output against dense attention in double
precision; if it fails, nothing is measured.

Columns of a row, one for each length, number of proxy heads and part:
- length (tokens), num_proxies, density (target), min_budget (tokens)
- part: build (of the BlockMask), sparse (attention with a BlockMask that exists), total (both in one call)
- kept_mib: what the result holds (of build the BlockMask, of attention the output)
- extra_mib: the peak beyond that; q, k and v, and for sparse the BlockMask, were there before and are in neither
- inputs_mib: q, k and v; device_mib: all of the device's memory
- error: why something is missing, else None
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

import flexproxy
from benchmarks import gate
from benchmarks.contenders import config_for, flex, inputs
from benchmarks.harness import (
    Density,
    Lengths,
    Out,
    Quick,
    Row,
    attempt,
    command,
    integers,
    listed,
    peak_memory,
    release,
    require_gpu,
    result_path,
    run_cases,
    settings_of,
)

LENGTHS = "8192,32768,131072,262144,524288,1048576"
PARTS = ("build", "sparse", "total")


class Case(NamedTuple):
    length: int
    num_proxies: int

    def __str__(self) -> str:
        return f"{self.length} tokens, P {self.num_proxies}"


def warm_peak(run: Callable[[], Any]) -> Row:
    """``peak_memory`` of the third call: the first compiles, which measures kernels, the second captures a graph."""
    for _ in range(2):
        run()
    release()
    return peak_memory(run)


def part_of(part: str, q: Tensor, k: Tensor, v: Tensor, case: Case, density: float) -> Row:
    config = config_for(density, case.length, case.num_proxies)
    if part == "build":
        return warm_peak(lambda: flexproxy.build(q, k, config=config))
    if part == "total":
        return warm_peak(lambda: flexproxy.attention(q, k, v, config=config))
    block_mask = flexproxy.build(q, k, config=config)
    options = flexproxy.kernel_options(q, k)
    return warm_peak(lambda: flex(q, k, v, block_mask, options))


def measure(case: Case, density: float) -> list[Row]:
    q, k, v = inputs(case.length)
    common: Row = case._asdict() | {
        "density": density,
        "min_budget": config_for(density, case.length).min_budget,
        "inputs_mib": round(sum(x.nbytes for x in (q, k, v)) / 2**20, 1),
        "device_mib": round(torch.cuda.get_device_properties(q.device).total_memory / 2**20, 1),
    }
    # Attention does not depend on the proxies: they share the length's first case.
    parts = PARTS if case.num_proxies == 1 else PARTS[:1]
    return [common | {"part": part} | attempt(lambda: part_of(part, q, k, v, case, density)) for part in parts]  # noqa: B023


def bench(
    *,
    lengths: Lengths = LENGTHS,
    num_proxies: Annotated[Any, listed(integers, "Proxy heads.")] = "1,4,8",
    density: Density = 0.02,
    out: Out = None,
    quick: Quick = False,
) -> None:
    settings = settings_of(locals())
    require_gpu()
    gate.check_attention(every=False)
    release()
    cases = [Case(length, p) for length in lengths for p in num_proxies]
    run_cases(cases, lambda case: measure(case, density), result_path("memory", out, quick), settings)


def main(argv: Sequence[str] | None = None) -> None:
    command(bench, argv, lengths="8192", num_proxies="1")


if __name__ == "__main__":
    main()
