"""A process with one engine of vLLM, for bench_vllm: its times, and its tokens.

python -m benchmarks.vllm_engine CASE.json RESULT.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, quantiles


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


def engine(case: dict[str, Any]) -> Row:
    """The times of what one engine is asked for.

    case: ``model``, a folder; ``settings`` of flexproxy, None for FlashAttention alone; and ``work``.

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
        gpu_memory_utilization=0.85,
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
    return row


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(engine(json.loads(Path(sys.argv[1]).read_text()))))
