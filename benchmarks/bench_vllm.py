"""A step of a serving engine, with and without vLLM, on one GPU.

Without vLLM: what the backend does with a step, on a cache of pages and lengths that are made up. First the gate: with
every block kept, each request is dense attention in double precision, and with a budget ``flexproxy.attention`` of
contiguous keys.

Where vLLM can be imported: engines of the shape of Llama-3.1-8B with random weights, each a process of its own, once
with FlashAttention and once with flexproxy: time to first token of one prompt, eight prompts at once, tokens a second
of decoding, the pages of the cache that memory has room for; and, with a small model, how many tokens of both are equal
where flexproxy keeps every block.

    python -m benchmarks.bench_vllm
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks.harness import (
    Density,
    Lengths,
    Out,
    Quick,
    Row,
    attempt,
    command,
    require_gpu,
    result_path,
    run_cases,
    settings_of,
)
from benchmarks.serving_step import LAYOUTS, PAGE, Requests, check_step, measure_step
from benchmarks.vllm_engine import model_config, save_small_model

EVERY_BLOCK = {"gamma": 1.0, "num_proxies": 1, "when": "always"}


class Case(NamedTuple):
    """part: ``step`` (the contender is then a layout), ``equality`` or ``engine``; tokens: of a step, at most."""

    part: str
    contender: str
    requests: Requests
    tokens: int
    density: float | None = None


def run_engine(folder: Path, settings: dict[str, Any] | None, work: dict[str, Any]) -> Row:
    """What a process with an engine found; see ``vllm_engine.engine``. ``log``: what flexproxy said in it."""
    case, result = folder / "case.json", folder / "result.json"
    case.write_text(json.dumps({"model": str(folder), "settings": settings, "work": work}))
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.vllm_engine", str(case), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if not result.exists():
        raise RuntimeError(said.strip()[-250:])
    row: Row = json.loads(result.read_text())
    return row | {"log": [line.partition("flexproxy: ")[2] for line in said.splitlines() if "flexproxy: " in line]}


def measure_equality(folder: Path, case: Case) -> Row:
    """Tokens of the small model that both engines generate, where flexproxy keeps every block; bf16, greedily."""
    lengths = [queries for queries, _ in case.requests]
    work = {"tokens": lengths, "max_tokens": case.tokens, "max_len": max(lengths) + 64, "load": "auto"}
    save_small_model(folder)
    stock, ours = (run_engine(folder, settings, work) for settings in (None, EVERY_BLOCK))
    one, two = (list(chain.from_iterable(found["tokens"])) for found in (stock, ours))
    return {"equal_tokens": sum(a == b for a, b in zip(one, two, strict=True)), "of": len(one), "log": ours["log"]}


def measure_engine(folder: Path, case: Case) -> Row:
    """Times with the shape of Llama-3.1-8B."""
    lengths = [queries for queries, _ in case.requests]
    longest = max(lengths) + 64
    (folder / "config.json").write_text(json.dumps(model_config(longest, small=False)))
    prompts = {str(length): [length] for length in lengths} | {"eight": [min(16384, *lengths)] * 8}
    work = {"prompts": prompts, "decode": [32, 256], "max_tokens": case.tokens, "max_len": longest, "load": "dummy"}
    return run_engine(folder, None if case.density is None else {"density": case.density}, work)


def measure(case: Case) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        if case.part == "step":
            assert case.density is not None
            density = case.density
            found = attempt(lambda: measure_step(case.requests, density, case.contender))
        else:
            measured = measure_equality if case.part == "equality" else measure_engine
            found = attempt(lambda: measured(Path(folder), case))
    return [case._asdict() | found]


def cases_of(lengths: Sequence[int], tokens: int, density: float, engines: bool) -> list[Case]:
    cases: list[Case] = []
    for layout in LAYOUTS:
        lasts: list[Requests] = [((min(tokens, length), length),) for length in lengths]
        cases += [Case("step", layout, last, tokens, density) for last in lasts]
        cases.append(Case("step", layout, ((2048, 16384),) * 8, tokens, density))
    if engines:
        prompts = tuple((length, length) for length in lengths)
        cases.append(Case("equality", "flexproxy", ((5000, 5000), (300, 300), (2048, 2048), (9001, 9001)), 2048))
        cases.append(Case("engine", "FlashAttention", prompts, tokens))
        cases.append(Case("engine", "flexproxy", prompts, tokens, density))
    return cases


def bench(
    *,
    lengths: Lengths = "32768,131072",
    tokens: Annotated[int, typer.Option(min=128, help="New tokens of a step, at most.")] = 16384,
    density: Density = 0.16,
    engines: Annotated[bool, typer.Option(help="With vLLM, where it can be imported.")] = True,
    out: Out = None,
    quick: Quick = False,
) -> None:
    settings = settings_of(locals()) | {"shape": "Hq 32, Hkv 8, D 128, bf16", "page": PAGE}
    require_gpu()
    for layout in LAYOUTS:
        check_step(layout)
    cases = cases_of(lengths, tokens, density, engines and find_spec("vllm") is not None)
    run_cases(cases, measure, result_path("vllm", out, quick), settings)


def main(argv: Sequence[str] | None = None) -> None:
    command(bench, argv, lengths="16384")


if __name__ == "__main__":
    main()
