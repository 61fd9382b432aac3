"""Time of build and of sparse attention beside dense attention and the peers' selections, causal, on one GPU.

    python -m benchmarks.bench_attention --lengths 8192,32768,131072

bf16, B 1, Hq 32, Hkv 8, D 128, random inputs, every contender with the same causal mask. First the gate: the output of
every kernel, and with every selection, against dense attention in double precision; if it fails, nothing is timed.

Columns of a row, one for each thing that was timed:
- length (tokens), contender, part, median_ms, p10_ms, p90_ms, repeats (by CUDA events), error (None if there is none)
- contender "SDPA cuDNN", "SDPA FlashAttention-2", "flex dense"; part "dense"
- contender "flexproxy"; part "build" (to the BlockMask), "sparse" (attention with it), "total"
  (``flexproxy.attention``, which is both; where it would stay dense, it is made to be sparse)
- contender "XAttention", "FlexPrefill", "FlashPrefill", "Prism" (our readings, benchmarks/baselines); part "map"
  (their choice of blocks), "lists" (to the BlockMask, by flexproxy's code), "sparse" (on flexproxy's kernel)
- kernel: "default" (flexproxy's choice), "triton" (its choice without flash-attn-4, where that is installed), of what
  runs flex_attention; kernel_options: the options for the mask of ``build``, as text
- target_density, density: kept / admissible blocks, wanted and reached; min_budget (tokens), of flexproxy;
  threshold: of a peer, found by bisection before the timing
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import typer
from torch import Tensor

import flexproxy
from benchmarks import gate
from benchmarks.baselines import METHODS, threshold_for_density, to_block_mask
from benchmarks.contenders import (
    causal_block_mask,
    config_for,
    cudnn,
    flash_attention_2,
    flex,
    inputs,
    kernel_variants,
)
from benchmarks.harness import (
    Budget,
    Density,
    Lengths,
    Out,
    Quick,
    Row,
    attempt,
    command,
    fractions,
    integers,
    listed,
    release,
    require_gpu,
    result_path,
    run_cases,
    settings_of,
    time_ms,
)

LENGTHS = "4096,8192,16384,32768,65536,131072,262144,524288"
DENSITIES = "0.02,0.05,0.1,0.2,0.4"
EXTRA_CASES = [(262144, 0.03)]  # the density at which a peer reports its figure for this length
MAX_PAIRS = 0.4 * 262144**2  # density x length^2: what is denser takes seconds a call and is left out


class Case(NamedTuple):
    """One line of the progress bar: everything of one kind at one length."""

    kind: str
    length: int
    density: float | None = None

    def __str__(self) -> str:
        return f"{self.length} tokens, {self.kind}" + ("" if self.density is None else f" at density {self.density}")


Tensors = tuple[Tensor, Tensor, Tensor]


def timed(budget_ms: float, common: Row, run: Callable[[], Any]) -> Row:
    return common | attempt(lambda: time_ms(run, budget_ms))


def dense(case: Case, tensors: Tensors, budget_ms: float) -> Iterator[Row]:
    options = flexproxy.kernel_options(*tensors[:2])
    block_mask = functools.cache(lambda: causal_block_mask(case.length, tensors[0].device))
    contenders: dict[str, Callable[[], Any]] = {
        "SDPA cuDNN": lambda: cudnn(*tensors),
        "SDPA FlashAttention-2": lambda: flash_attention_2(*tensors),
        "flex dense": lambda: flex(*tensors, block_mask(), options),
    }
    for name, run in contenders.items():
        kernel = {"kernel": "default", "kernel_options": str(options)} if name == "flex dense" else {}
        yield timed(budget_ms, {"length": case.length, "contender": name, "part": "dense"} | kernel, run)


def sparse(case: Case, tensors: Tensors, budget_ms: float) -> Iterator[Row]:
    assert case.density is not None
    q, k, _ = tensors
    config = config_for(case.density, case.length)
    common: Row = {"length": case.length, "contender": "flexproxy", "target_density": case.density}
    common["min_budget"] = config.min_budget
    common["density"] = round(flexproxy.select(q, k, config=config).density().mean().item(), 4)
    build = functools.partial(flexproxy.build, q, k, config=config)
    yield timed(budget_ms, common | {"part": "build"}, build)
    block_mask = build()
    both = functools.partial(flexproxy.attention, *tensors, config=config, when="always")
    for name, variant in kernel_variants().items():
        with variant():
            options = flexproxy.kernel_options(q, k)
            kernel = {"kernel": name, "kernel_options": str(options)}
            one = functools.partial(flex, *tensors, block_mask, options)
            yield timed(budget_ms, common | {"part": "sparse"} | kernel, one)
            yield timed(budget_ms, common | {"part": "total"} | kernel, both)


def peer(case: Case, tensors: Tensors, budget_ms: float) -> Iterator[Row]:
    assert case.density is not None
    q, k, _ = tensors
    method = METHODS[case.kind]
    threshold, reached = threshold_for_density(lambda x: method.select(q, k, x), case.density, method.increasing)
    common: Row = {"length": case.length, "contender": case.kind, "target_density": case.density}
    common |= {"threshold": threshold, "density": round(reached, 4)}
    select = functools.partial(method.select, q, k, threshold)
    yield timed(budget_ms, common | {"part": "map"}, select)
    blocks = select()
    yield timed(budget_ms, common | {"part": "lists"}, lambda: to_block_mask(blocks, case.length))
    block_mask, options = to_block_mask(blocks, case.length), flexproxy.kernel_options(q, k)
    kernel = {"kernel": "default", "kernel_options": str(options)}
    yield timed(budget_ms, common | {"part": "sparse"} | kernel, lambda: flex(*tensors, block_mask, options))


KINDS = {"dense": dense, "sparse": sparse} | dict.fromkeys(METHODS, peer)


def measure(case: Case, budget_ms: float) -> list[Row]:
    tensors = inputs(case.length)
    rows: list[Row] = []

    def collect() -> Row:
        for row in KINDS[case.kind](case, tensors, budget_ms):
            rows.append(row)  # noqa: PERF402 - rows until a failure are kept
        return {}

    failure = attempt(collect)["error"]
    if failure:
        unknown = {"length": case.length, "contender": case.kind, "part": None, "target_density": case.density}
        rows.append(unknown | {"error": failure})
    return rows


def cases_of(
    lengths: Sequence[int], densities: Sequence[float], dense_up_to: int, peers_at: Sequence[int], peer_density: float
) -> list[Case]:
    cases = []
    for length in sorted(set(lengths) | set(peers_at)):
        if length in lengths:
            if length <= dense_up_to:
                cases.append(Case("dense", length))
            at = sorted({*densities, *(x for extra, x in EXTRA_CASES if extra == length)})
            cases += [Case("sparse", length, x) for x in at if x * length**2 <= MAX_PAIRS]
        if length in peers_at:
            cases += [Case(name, length, peer_density) for name in METHODS]
    return cases


def bench(
    *,
    lengths: Lengths = LENGTHS,
    densities: Annotated[Any, listed(fractions, "Kept / admissible blocks.")] = DENSITIES,
    dense_up_to: Annotated[int, typer.Option(min=1, help="Longest prompt for dense attention.")] = 2**18,
    peers_at: Annotated[Any, listed(integers, "Lengths for the peers.")] = "131072",
    peer_density: Density = 0.1,
    budget_ms: Budget = 300.0,
    out: Out = None,
    quick: Quick = False,
) -> None:
    settings = settings_of(locals())
    require_gpu()
    gate.check_attention(every=True)
    release()
    cases = cases_of(lengths, densities, dense_up_to, peers_at, peer_density)
    run_cases(cases, lambda case: measure(case, budget_ms), result_path("attention", out, quick), settings)


def main(argv: Sequence[str] | None = None) -> None:
    quick = {"lengths": "8192", "densities": "0.2", "peers_at": "8192", "peer_density": 0.2, "budget_ms": 50.0}
    command(bench, argv, **quick)


if __name__ == "__main__":
    main()
