"""Single calls of attention: what the device takes for them, and what the host does, on one GPU.

    python -m benchmarks.bench_calls

bf16, B 1, Hq 32, Hkv 8, D 128, causal, random inputs, flexproxy's defaults at a density. First the gate: sparse output
against dense attention in double precision; if it fails, nothing is timed. Columns of a row, one for each length,
contender and kernel, in each of three rounds, for other work on a shared host only adds to its times:
- round, length (tokens)
- contender: "SDPA" (torch's choice), "SDPA cuDNN", "flexproxy" (made to be sparse), "flexproxy, auto" (as it decides)
- kernel, of flexproxy: "default", or "triton" (without flash-attn-4, where that is installed)
- queued_ms: on the device, behind other work, as in a model whose host runs ahead; the mean of calls in a row
- waited_ms: until the result is there, nothing else on the device; host_ms: until the call returns. Medians
- target_density, min_budget (tokens), why_dense (None where it is sparse), of flexproxy; error (None if there is none)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import flexproxy
from benchmarks import gate
from benchmarks.contenders import config_for, cudnn, inputs, kernel_variants
from benchmarks.harness import (
    Lengths,
    Out,
    Quick,
    Row,
    attempt,
    call_ms,
    command,
    release,
    require_gpu,
    result_path,
    run_cases,
    settings_of,
)

DENSITIES = {2048: 0.15, 4096: 0.15, 8192: 0.15}  # longer ones: 0.10
ROUNDS = 3
CYCLES = 4e6  # of a millisecond, so that the device waits for twice as long as the host will take


class Case(NamedTuple):
    round: int
    length: int
    contender: str
    kernel: str | None = None

    def __str__(self) -> str:
        kernel = f", {self.kernel}" if self.kernel else ""
        return f"round {self.round}, {self.length} tokens, {self.contender}{kernel}"


def times_of(run: Callable[[], Any], repeats: int = 20) -> Row:
    """Milliseconds of a call, as the columns say."""
    for _ in range(3):  # the first compiles, the second captures
        run()
    host, waited = call_ms(run, repeats)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(CYCLES * repeats * host))
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    torch.cuda.synchronize()
    return {"queued_ms": round(first.elapsed_time(last) / repeats, 4), "waited_ms": waited, "host_ms": host}


def measure(case: Case) -> list[Row]:
    q, k, v = tensors = inputs(case.length)
    density = DENSITIES.get(case.length, 0.1)
    config = config_for(density, case.length)
    sparse = functools.partial(flexproxy.attention, q, k, v, config=config)
    contenders: dict[str, Callable[[], Any]] = {
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "SDPA cuDNN": lambda: cudnn(*tensors),
        "flexproxy": functools.partial(sparse, when="always"),
        "flexproxy, auto": sparse,
    }
    row: Row = case._asdict()
    variant: Callable[[], AbstractContextManager[Any]] = nullcontext
    if case.kernel is not None:
        row |= {"target_density": density, "min_budget": config.min_budget, "why_dense": None}
        variant = kernel_variants()[case.kernel]
    with variant():
        if case.contender == "flexproxy, auto":
            row["why_dense"] = flexproxy.why_dense(q, k, config)
        row |= attempt(lambda: times_of(contenders[case.contender]))
    release()
    return [row]


def bench(*, lengths: Lengths = "2048,4096,8192,16384,32768", out: Out = None, quick: Quick = False) -> None:
    settings = settings_of(locals())
    require_gpu()
    # The host is timed: no workers of the compiler may start meanwhile.
    torch._inductor.config.compile_threads = 1
    gate.check_attention(every=False)
    kinds: list[tuple[str, str | None]] = [("SDPA", None), ("SDPA cuDNN", None)]
    kinds += [(name, kernel) for kernel in kernel_variants() for name in ("flexproxy", "flexproxy, auto")]
    cases = [Case(turn, length, *kind) for turn in range(ROUNDS) for length in lengths for kind in kinds]
    run_cases(cases, measure, result_path("calls", out, quick), settings)


def main(argv: Sequence[str] | None = None) -> None:
    command(bench, argv, lengths="8192")


if __name__ == "__main__":
    main()
