"""A step of a serving engine, with and without vLLM, on one GPU.

Without vLLM: what the backend does with a step, on a cache of pages and lengths that are made up. First the gate: with
every block kept, each request is dense attention in double precision, and with a budget ``flexproxy.attention`` of
contiguous keys.

Where vLLM can be imported: engines of the shape of Llama-3.1-8B with random weights, each a process of its own, once
with FlashAttention and once with flexproxy: time to first token of one prompt, eight prompts at once, tokens a second
of decoding, the pages of the cache that memory has room for; with a small model, how many tokens of both are equal
where flexproxy keeps every block; and with SmolLM2, where its package is, the bits per byte of fixed prose, by vLLM's
own log-probabilities. What vLLM logs is printed.

    python -m benchmarks.bench_vllm
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
from benchmarks.quality import prompt_tasks
from benchmarks.quality.corpus import corpus
from benchmarks.quality.real_models import resolve
from benchmarks.serving_step import LAYOUTS, PAGE, Requests, check_step, measure_step
from benchmarks.vllm_engine import model_config, save_small_model
from flexproxy.cli.inputs import load_tokenizer

EVERY_BLOCK = {"gamma": 1.0, "num_proxies": 1, "when": "always"}
REAL_TOKENS, REAL_TEXTS = 8064, 16  # within what SmolLM2 was trained on
NOT_COMPILED = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}


class Case(NamedTuple):
    """part: ``step`` (the contender is then a layout) or one of ENGINES; tokens: of a step, at most."""

    part: str
    contender: str
    requests: Requests
    tokens: int
    density: float | None = None


class Options(NamedTuple):
    """Of engines. compiled: by torch.compile, as vLLM does by default; limit_s: for one engine, with its start."""

    compiled: bool = True
    limit_s: float = 600


def run_engine(
    folder: Path, settings: dict[str, Any] | None, work: dict[str, Any], limit_s: float = 600, model: str | None = None
) -> Row:
    """What a process with an engine found; see ``vllm_engine.engine``. ``ended``: why it stopped early, if it did.

    model: a folder; by default the one for the files of the process.

    Raises:
        RuntimeError: it found nothing.
    """
    name = "stock" if settings is None else "flexproxy"
    case, result = folder / f"{name}_case.json", folder / f"{name}_result.json"
    case.write_text(json.dumps({"model": model or str(folder), "settings": settings, "work": work}))
    command = [sys.executable, "-m", "benchmarks.vllm_engine", str(case), str(result)]
    try:
        code = subprocess.run(command, check=False, timeout=limit_s).returncode
        ended = {"ended": f"by {code}"} if code else {}
    except subprocess.TimeoutExpired:
        ended = {"ended": f"after {limit_s:g} s"}
    row: Row = ended | (json.loads(result.read_text()) if result.exists() else {})
    if not row.keys() - {"ended"}:
        raise RuntimeError(row.get("ended", "it found nothing"))
    return row


def measure_equality(folder: Path, case: Case, options: Options) -> Row:
    """Tokens of the small model that both engines generate, where flexproxy keeps every block; bf16, greedily.

    In bf16 near-ties part: ``first_apart`` is the largest difference of the log-probabilities of first tokens.
    """
    lengths = [queries for queries, _ in case.requests]
    engine = {
        "max_model_len": max(lengths) + 64,
        "max_num_batched_tokens": case.tokens,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": 2**30,  # vLLM then measures no memory, which the two would disturb
    }
    save_small_model(folder)
    with ThreadPoolExecutor() as pool:
        stock, ours = pool.map(
            lambda settings: run_engine(folder, settings, {"tokens": lengths, "engine": engine}, options.limit_s),
            (None, EVERY_BLOCK),
        )
    one, two = (list(chain.from_iterable(found["tokens"])) for found in (stock, ours))
    firsts = [[values[0] for values in found["logprobs"]] for found in (stock, ours)]
    return {
        "equal_tokens": sum(a == b for a, b in zip(one, two, strict=True)),
        "of": len(one),
        "equal_first_tokens": sum(a[0] == b[0] for a, b in zip(stock["tokens"], ours["tokens"], strict=True)),
        "first_apart": max(abs(a - b) for a, b in zip(*firsts, strict=True)),
        "log": ours["log"],
    }


def measure_real(folder: Path, case: Case, options: Options) -> Row:
    """Bits per byte of prose under SmolLM2, a model that nobody here trained: the mean over the requests, and each."""
    model = resolve("smollm2")
    text = corpus("prose", "evaluation").content.decode(errors="replace")
    make = prompt_tasks.tasks(prompt_tasks.PromptHaystack(text, load_tokenizer(model)))["text"].make
    samples = [make(seed, length) for seed, (length, _) in enumerate(case.requests)]
    engine = {
        "max_model_len": case.tokens,
        "max_num_batched_tokens": case.tokens,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.5,
    }
    settings = None if case.density is None else {"density": case.density, "min_budget": 256, "when": "always"}
    work = {"texts": [sample.tokens.tolist() for sample in samples], "engine": engine}
    found = run_engine(folder, settings, work, options.limit_s, model)
    bits = [
        round(each / sample.bytes_per_token, 5)
        for each, sample in zip(found.pop("bits_per_token"), samples, strict=True)
    ]
    return found | {"bits_per_byte": round(statistics.fmean(bits), 5), "cases": bits}


def measure_engine(folder: Path, case: Case, options: Options) -> Row:
    """Times with the shape of Llama-3.1-8B."""
    lengths = [queries for queries, _ in case.requests]
    longest = max(lengths) + 64
    (folder / "config.json").write_text(json.dumps(model_config(longest, small=False)))
    prompts = {str(length): [length] for length in sorted(lengths)} | {"eight": [min(16384, *lengths)] * 8}
    engine = {
        "load_format": "dummy",
        "max_model_len": longest,
        "max_num_batched_tokens": case.tokens,
        "max_num_seqs": 32,
        "gpu_memory_utilization": 0.85,
        "compilation_config": {"cudagraph_capture_sizes": [1, 8, 32]} | ({} if options.compiled else NOT_COMPILED),
    }
    settings = None if case.density is None else {"density": case.density}
    return run_engine(folder, settings, {"prompts": prompts, "decode": [32, 256], "engine": engine}, options.limit_s)


ENGINES = {"equality": measure_equality, "engine": measure_engine, "real": measure_real}


def measure(case: Case, options: Options) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        if case.part == "step":
            assert case.density is not None
            density = case.density
            found = attempt(lambda: measure_step(case.requests, density, case.contender))
        else:
            found = attempt(lambda: ENGINES[case.part](Path(folder), case, options))
    return [case._asdict() | found]


def cases_of(lengths: Sequence[int], tokens: int, density: float, engines: bool, steps: bool = True) -> list[Case]:
    cases: list[Case] = []
    for layout in LAYOUTS if steps else ():
        lasts: list[Requests] = [((min(tokens, length), length),) for length in lengths]
        cases += [Case("step", layout, last, tokens, density) for last in lasts]
        cases.append(Case("step", layout, ((2048, 16384),) * 8, tokens, density))
    if engines:
        prompts = tuple((length, length) for length in lengths)
        cases.append(Case("equality", "flexproxy", ((5000, 5000), (300, 300), (2048, 2048), (9001, 9001)), 2048))
        cases.append(Case("engine", "FlashAttention", prompts, tokens))
        cases.append(Case("engine", "flexproxy", prompts, tokens, density))
        texts = ((REAL_TOKENS, REAL_TOKENS),) * REAL_TEXTS
        cases += [Case("real", name, texts, 8192, x) for name, x in (("FlashAttention", None), ("flexproxy", 0.25))]
    return cases


def bench(
    *,
    lengths: Lengths = "32768,131072",
    tokens: Annotated[int, typer.Option(min=128, help="New tokens of a step, at most.")] = 16384,
    density: Density = 0.16,
    steps: Annotated[bool, typer.Option(help="Without vLLM.")] = True,
    engines: Annotated[bool, typer.Option(help="With vLLM, where it can be imported.")] = True,
    compiled: Annotated[bool, typer.Option(help="Engines of vLLM's default, which starts by compiling.")] = True,
    limit: Annotated[float, typer.Option(min=1.0, help="Seconds for one engine, with its start.")] = 600.0,
    out: Out = None,
    quick: Quick = False,
) -> None:
    settings = settings_of(locals()) | {"shape": "Hq 32, Hkv 8, D 128, bf16", "page": PAGE}
    require_gpu()
    for layout in LAYOUTS if steps else ():
        check_step(layout)
    options = Options(compiled, limit)
    cases = cases_of(lengths, tokens, density, engines and find_spec("vllm") is not None, steps)
    run_cases(cases, lambda case: measure(case, options), result_path("vllm", out, quick), settings)


def main(argv: Sequence[str] | None = None) -> None:
    command(bench, argv, lengths="16384")


if __name__ == "__main__":
    main()
