"""A step of a serving engine, with and without vLLM, on one GPU.

    python -m benchmarks.bench_vllm

Without vLLM: what the backend does with a step, on a cache of pages and lengths that are made up. First the gate: with
every block kept, each request is dense attention in double precision, and with a budget ``flexproxy.attention`` of
contiguous keys.

Where vLLM can be imported: engines of the shape of Llama-3.1-8B with random weights, each a process of its own, once
with FlashAttention and once with flexproxy: time to first token of one prompt, eight prompts at once, tokens a second
of decoding, the pages of the cache that memory has room for; and, with a small model, how many tokens of both are equal
where flexproxy keeps every block.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import (
    Row,
    attempt,
    fraction,
    parse,
    parser,
    positive_int,
    quantiles,
    require_gpu,
    result_path,
    run_cases,
    settings_of,
)
from benchmarks.serving_step import LAYOUTS, PAGE, Lengths, check_step, measure_step


class Case(NamedTuple):
    """part: ``step`` (the contender is then a layout), ``equality`` or ``engine``."""

    part: str
    contender: str
    requests: Lengths
    density: float | None = None


# Engines


def model_config(length: int, small: bool) -> dict[str, Any]:
    """config.json of Llama-3.1-8B, or of a small model with heads of the same size."""
    hidden, layers, heads, vocabulary = (512, 2, 4, 1024) if small else (4096, 32, 32, 128256)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4 or 1,
        "head_dim": 128,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
    }


def save_small_model(folder: Path) -> None:
    """With weights, for tokens that depend on attention; those that vLLM makes up are too small for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = model_config(16384, small=True)
    config = LlamaConfig(**{name: value for name, value in settings.items() if name != "torch_dtype"})
    config.initializer_range = 0.15
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)


def run_engine(folder: Path, contender: str, settings: dict[str, Any] | None, work: dict[str, Any]) -> Row:
    """What a process with an engine found; see ``engine``."""
    case = {"model": str(folder), "settings": settings, "work": work}
    result = folder / f"{contender.split()[0]}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.bench_vllm", "--engine", json.dumps(case), "--out", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not result.exists():
        (folder / "failed.log").write_text(done.stdout + done.stderr)
        raise RuntimeError((done.stdout + done.stderr).strip()[-250:])
    lines = (done.stdout + done.stderr).splitlines()
    row: Row = json.loads(result.read_text())
    return row | {"log": [line.partition("flexproxy: ")[2] for line in lines if "flexproxy: " in line]}


def engine(case: dict[str, Any], out: Path) -> None:
    """In a process of its own: one engine, and the times of what it is asked for.

    work: ``prompts`` by name, lists of lengths, each timed to its first token, median of three; ``decode``, a number of
    requests of 64 tokens and how many they generate; ``tokens``, prompts whose tokens are returned; ``max_tokens``, of
    a step; ``max_len``; ``load``.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    from flexproxy.integrations.vllm import register

    register()
    work, settings = case["work"], case["settings"]
    arguments: dict[str, Any] = {} if settings is None else {"additional_config": {"flexproxy": settings}}
    backend = "FLASH_ATTN" if settings is None else "CUSTOM"
    llm = LLM(
        model=case["model"],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        load_format=work["load"],
        max_model_len=work["max_len"],
        max_num_batched_tokens=work["max_tokens"],
        max_num_seqs=64,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.9,
        attention_config={"backend": backend},
        seed=0,
        **arguments,
    )

    def generate(lengths: Sequence[int], number: int, seed: int = 0) -> tuple[float, Any]:
        generator = torch.Generator().manual_seed(seed)
        ids = [torch.randint(1, 1000, (length,), generator=generator).tolist() for length in lengths]
        sampling = SamplingParams(
            temperature=0, max_tokens=number, min_tokens=number, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": each} for each in ids], sampling, use_tqdm=False)
        return 1000 * (time.perf_counter() - begin), [list(output.outputs[0].token_ids) for output in outputs]

    row: Row = {"cache_pages": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks}
    for name, lengths in work.get("prompts", {}).items():
        row[f"{name}_first_ms"], _ = generate(lengths, 1)  # what is still compiled and loaded
        row[f"{name}_ms"] = quantiles([generate(lengths, 1, seed)[0] for seed in range(1, 4)])["median_ms"]
    if "decode" in work:
        requests, number = work["decode"]
        generate([64] * requests, 8)
        short, long = (min(generate([64] * requests, n)[0] for _ in range(3)) for n in (8, 8 + number))
        row["decode_tokens_per_s"] = round(1000 * requests * number / (long - short), 1)
    if "tokens" in work:
        row["tokens"] = generate(work["tokens"], 16)[1]
    out.write_text(json.dumps(row))


def measure_engines(folder: Path, args: argparse.Namespace) -> Callable[[Case], Row]:
    """A function that measures one contender with the shape of 8B, or compares tokens of the small model."""

    def measure(case: Case) -> Row:
        lengths = [queries for queries, _ in case.requests]
        if case.part == "equality":
            work = {"tokens": lengths, "max_tokens": 2048, "max_len": 16384, "load": "auto"}
            save_small_model(folder / "small")
            every = {"gamma": 1.0, "num_proxies": 1, "when": "always"}
            stock, ours = (run_engine(folder / "small", name, s, work) for name, s in (("stock", None), ("all", every)))
            pairs = [(a, b) for one, two in zip(stock["tokens"], ours["tokens"], strict=True) for a, b in zip(one, two)]  # noqa: B905
            return {"equal_tokens": sum(a == b for a, b in pairs), "of": len(pairs), "log": ours["log"]}
        (folder / "8b").mkdir(exist_ok=True)
        longest = max(args.lengths) + 64
        (folder / "8b" / "config.json").write_text(json.dumps(model_config(longest, small=False)))
        prompts = {str(length): [length] for length in lengths} | {"eight": [min(16384, min(lengths))] * 8}
        work = {"prompts": prompts, "decode": [32, 256], "max_tokens": args.tokens, "max_len": longest, "load": "dummy"}
        settings = None if case.density is None else {"density": case.density}
        return run_engine(folder / "8b", case.contender, settings, work)

    return measure


def cases_of(args: argparse.Namespace, engines: bool) -> list[Case]:
    cases: list[Case] = []
    for layout in LAYOUTS:
        lasts: list[Lengths] = [((min(args.tokens, length), length),) for length in args.lengths]
        cases += [Case("step", layout, last, args.density) for last in lasts]
        cases.append(Case("step", layout, ((2048, 16384),) * 8, args.density))
    if engines:
        prompts = tuple((length, length) for length in args.lengths)
        cases.append(Case("equality", "flexproxy", ((5000, 5000), (300, 300), (2048, 2048), (9001, 9001))))
        cases.append(Case("engine", "FlashAttention", prompts))
        cases.append(Case("engine", "flexproxy", prompts, args.density))
    return cases


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--lengths", type=positive_int, nargs="+", default=[32768, 131072], help="tokens")
    options.add_argument("--tokens", type=positive_int, default=16384, help="new tokens of a step, at most")
    options.add_argument("--density", type=fraction, default=0.16, help="kept / admissible blocks")
    options.add_argument("--no-engines", action="store_true", help="without vLLM, also where it can be imported")
    options.add_argument("--engine", help=argparse.SUPPRESS)
    args = parse(options, argv, lengths=[16384])
    if args.engine is not None:
        engine(json.loads(args.engine), args.out)
        return
    require_gpu()
    for layout in LAYOUTS:
        check_step(layout)
    engines = not args.no_engines and find_spec("vllm") is not None
    with tempfile.TemporaryDirectory() as folder:
        of_engines = measure_engines(Path(folder), args)

        def measure(case: Case) -> list[Row]:
            if case.part == "step":
                found = attempt(lambda: measure_step(case.requests, args.density, case.contender))
            else:
                found = attempt(lambda: of_engines(case))
            return [case._asdict() | found]

        settings = settings_of(args) | {"shape": "Hq 32, Hkv 8, D 128, bf16", "page": PAGE}
        run_cases(cases_of(args, engines), measure, result_path(args, "vllm"), settings)


if __name__ == "__main__":
    main()
