"""A process with one vLLM engine on a CPU: reads a case from a file, writes the tokens that it generates to another.

    python -m tests.integrations.serving.worker case.json result.json

The case: "model", a folder; "settings" of flexproxy, or null for vLLM alone; "engine", arguments of ``LLM``; "batches",
lists of prompts that are generated together, each with its number of new tokens.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(case_path: str, result_path: str) -> None:
    case: dict[str, Any] = json.loads(Path(case_path).read_text())
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    if case["engine"].get("tensor_parallel_size", 1) == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

    from vllm import LLM, SamplingParams

    from tests.integrations.serving import cpu_backend

    settings = case["settings"]
    if settings is not None:
        os.environ["FLEXPROXY_TEST_CPU"] = "1"  # of processes that vLLM starts, which find the test's plug-in
        cpu_backend.register()
    llm = LLM(
        model=case["model"],
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        additional_config={} if settings is None else {"flexproxy": settings},
        **case["engine"],
    )
    generated = []
    for batch in case["batches"]:
        prompts = [{"prompt_token_ids": tokens} for tokens, _ in batch]
        sampling = [
            SamplingParams(temperature=0, max_tokens=number, min_tokens=number, ignore_eos=True, detokenize=False)
            for _, number in batch
        ]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        generated.append([list(output.outputs[0].token_ids) for output in outputs])
    Path(result_path).write_text(json.dumps({"tokens": generated, "attended": cpu_backend.ATTENDED}))


if __name__ == "__main__":
    main(*sys.argv[1:])
