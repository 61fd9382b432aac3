"""Time from a cold process to the first result: what a user waits for at the first call, and in a later process.

    python -m benchmarks.bench_cold

Each row is a process of its own, at 32K tokens: first with empty caches of compiled kernels, then with what the first
one left. flash-attn-4 keeps its kernels on disk only if an environment variable asks for it: one more process fills
that cache, and one reads it. Columns: caches ("empty", "warm", "filling flash-attn-4's", "warm, and flash-attn-4's"),
import_s (torch and flexproxy), build_s (the first ``build``), attention_s (the first ``attention`` after that),
again_ms (the third ``attention``, by the wall clock), total_s (all but the last).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Annotated

import typer

from benchmarks.harness import (
    Out,
    Quick,
    Row,
    command,
    require_gpu,
    result_path,
    run_cases,
    settings_of,
)
from flexproxy.ops import compat

FLASH_ENABLED, FLASH_DIR = (f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}" for name in ("ENABLED", "DIR"))
PROGRAM = """
import json, sys, time
start = time.perf_counter()
import torch, flexproxy
imported = time.perf_counter()
q = torch.randn(1, 32, {length}, 128, device="cuda", dtype=torch.bfloat16)
k, v = torch.randn(2, 1, 8, {length}, 128, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
ready = time.perf_counter()
config = flexproxy.ProxyConfig(density=0.1)
flexproxy.build(q, k, config=config)
torch.cuda.synchronize()
built = time.perf_counter()
times = []
for _ in range(3):
    begin = time.perf_counter()
    flexproxy.attention(q, k, v, config=config)
    torch.cuda.synchronize()
    times.append(time.perf_counter() - begin)
print(json.dumps({{
    "import_s": round(imported - start, 2), "build_s": round(built - ready, 2), "attention_s": round(times[0], 2),
    "again_ms": round(times[2] * 1e3, 2), "total_s": round(imported - start + built - ready + times[0], 2),
}}))
"""


def bench(
    *,
    length: Annotated[int, typer.Option(min=1, help="Tokens.")] = 32768,
    out: Out = None,
    quick: Quick = False,
) -> None:
    settings = settings_of(locals())
    require_gpu()
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: f"{folder}/{name}" for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", FLASH_DIR)}
        states = {"empty": "0", "warm": "0"}
        if compat.flash_backend_exists():
            states |= {"filling flash-attn-4's": "1", "warm, and flash-attn-4's": "1"}

        def measure(state: str) -> list[Row]:
            program = [sys.executable, "-c", PROGRAM.format(length=length)]
            env = os.environ | caches | {FLASH_ENABLED: states[state]}
            done = subprocess.run(program, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                return [{"caches": state, "error": done.stderr.strip().splitlines()[-1][:300]}]
            return [{"caches": state, "error": None} | json.loads(done.stdout)]

        run_cases(list(states), measure, result_path("cold", out, quick), settings)


def main(argv: Sequence[str] | None = None) -> None:
    command(bench, argv)


if __name__ == "__main__":
    main()
