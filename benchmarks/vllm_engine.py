"""A process with one engine of vLLM, for bench_vllm: its times, and its tokens.

What is found is written after each measurement, and printed: what ends early leaves what it has.

python -m benchmarks.vllm_engine CASE.json RESULT.json
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, quantiles, write_json

LONG_MS = 4000.0
"""A prompt that takes longer is timed once, after the first time."""


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


class Log(logging.Handler):
    """What flexproxy says in vLLM's log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("flexproxy: "):
            self.lines.append(message.removeprefix("flexproxy: "))


def engine(case: dict[str, Any], report: Callable[[Row], None]) -> None:
    """Measure what one engine is asked for, and report it piece by piece.

    case: ``model``, a folder; ``settings`` of flexproxy, None for FlashAttention alone; and ``work``.

    work: ``engine``, arguments of ``LLM``; ``prompts`` by name, lists of lengths, each timed to its first token, the
    first time and the median of three more, or one; ``decode``, a number of requests of 64 tokens and how many they
    generate; ``tokens``, prompts whose tokens are reported, with their log-probabilities; ``texts``, token ids whose
    mean bits are reported.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    begin = time.perf_counter()
    from vllm import LLM, SamplingParams
    from vllm import __version__ as vllm_version

    from flexproxy.integrations.vllm import register

    register()
    log = Log()
    logging.getLogger("vllm").addHandler(log)
    work, settings = case["work"], case["settings"]
    arguments: dict[str, Any] = {} if settings is None else {"additional_config": {"flexproxy": settings}}
    llm = LLM(
        model=case["model"],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        attention_config={"backend": "FLASH_ATTN" if settings is None else "CUSTOM"},
        seed=0,
        **work["engine"],
        **arguments,
    )
    config = llm.llm_engine.vllm_config
    report(
        {
            "vllm": vllm_version,
            "start_s": round(time.perf_counter() - begin, 1),
            "log": log.lines,
            "cache_pages": config.cache_config.num_gpu_blocks,
            "page": config.cache_config.block_size,
            "graphs": str(config.compilation_config.cudagraph_mode),
            "runner": 2 if getattr(config, "use_v2_model_runner", False) else 1,
        }
    )

    def generate(lengths: Sequence[int], number: int, seed: int = 0, logprobs: int | None = None) -> tuple[float, Any]:
        generator = torch.Generator().manual_seed(seed)
        ids = [torch.randint(1, 1000, (length,), generator=generator).tolist() for length in lengths]
        sampling = SamplingParams(
            temperature=0, max_tokens=number, min_tokens=number, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        begin = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": each} for each in ids], sampling, use_tqdm=False)
        return 1000 * (time.perf_counter() - begin), [output.outputs[0] for output in outputs]

    if "tokens" in work:
        found = generate(work["tokens"], 16, logprobs=0)[1]
        tokens = [list(one.token_ids) for one in found]
        chosen = [[at[token].logprob for token, at in zip(one.token_ids, one.logprobs, strict=True)] for one in found]
        report({"tokens": tokens, "logprobs": chosen})
    if "texts" in work:
        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in work["texts"]], sampling, use_tqdm=False)
        nats = [
            [-found[token].logprob for token, found in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(work["texts"], outputs, strict=True)
        ]
        report({"bits_per_token": [round(statistics.fmean(each) / math.log(2), 5) for each in nats]})
    if "decode" in work:
        requests, number = work["decode"]
        generate([64] * requests, 8)
        short, long = (min(generate([64] * requests, n)[0] for _ in range(3)) for n in (8, 8 + number))
        report({"decode_tokens_per_s": round(1000 * requests * number / (long - short), 1)})
    for name, lengths in work.get("prompts", {}).items():
        first, _ = generate(lengths, 1)  # with what is still compiled and loaded
        times = [generate(lengths, 1, seed)[0] for seed in range(1, 2 if first > LONG_MS else 4)]
        report({f"{name}_first_ms": round(first, 1), f"{name}_ms": quantiles(times)["median_ms"]})
    report({"peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2), "log": log.lines})


def main(case: Path, result: Path) -> None:
    row: Row = {}

    def report(found: Row) -> None:
        row.update(found)
        write_json(result, row)
        print("measured", {name: value for name, value in found.items() if name != "logprobs"}, flush=True)

    try:
        engine(json.loads(case.read_text()), report)
    except Exception as error:
        report({"ended": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]})
        raise


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
