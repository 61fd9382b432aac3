"""Time of build and of sparse attention beside dense attention, causal, on one GPU.

    python -m benchmarks.bench_attention --lengths 8192 32768 131072

bf16, B 1, Hq 32, Hkv 8, D 128, random inputs, every contender with the same causal mask; medians by CUDA events. First
the gate: at 4096 tokens, output under the mask against dense attention in double precision; if it fails, nothing is
timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_mask

import flexproxy
from benchmarks.harness import RESULTS, environment, peak_extra_mib, require_gpu, time_ms, write_json
from flexproxy import ProxyConfig, masks, reference
from flexproxy._compat import compiled_flex_attention

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128


def inputs(length: int, heads: int = NUM_Q_HEADS, kv_heads: int = NUM_KV_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(1, heads, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, kv_heads, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return q, k, v


def check_correctness() -> None:
    """The gate: sparse output is dense attention under the selection's token mask, within twice SDPA's own error."""
    q, k, v = inputs(4096, 8, 2)
    config = ProxyConfig(density=0.2, min_budget=512)
    selection = flexproxy.select(q, k, config=config)
    member = create_mask(selection.mask_mod(), 1, 8, 4096, 4096, device="cuda")
    allowed = member & create_mask(masks.causal, 1, 1, 4096, 4096, device="cuda")
    exact = reference.attention(q, k, v, allowed, HEAD_DIM**-0.5)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    out = flexproxy.attention(q, k, v, config=config)
    error, own_error = ((x.double() - exact).abs().max().item() for x in (out, dense))
    if not error <= 2 * own_error + torch.finfo(q.dtype).eps * exact.abs().max().item():
        raise SystemExit(f"correctness gate failed: error {error:.2e}, SDPA's own {own_error:.2e}; nothing was timed")


def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def attempt(run: Callable[[], Any]) -> dict[str, Any]:
    """Its time; a contender that cannot run is recorded, and is not the end of the run."""
    try:
        return dict(time_ms(run))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def measure(length: int, density: float, num_proxies: int) -> dict[str, Any]:
    q, k, v = inputs(length)
    config = ProxyConfig(density=density, num_proxies=num_proxies, min_budget=min(2048, length // 16))
    flex = compiled_flex_attention("cuda")
    block_mask = flexproxy.build(q, k, config=config)
    row: dict[str, Any] = {"length": length, "target_density": density, "num_proxies": num_proxies}
    row["density"] = round(flexproxy.select(q, k, config=config).density().mean().item(), 4)
    contenders: dict[str, Callable[[], Any]] = {
        "sdpa_cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION)(q, k, v),
        "sdpa_flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION)(q, k, v),
        "build": lambda: flexproxy.build(q, k, config=config),
        "sparse": lambda: flex(q, k, v, block_mask=block_mask, enable_gqa=True),
        "attention": lambda: flexproxy.attention(q, k, v, config=config),
    }
    row |= {name: attempt(run) for name, run in contenders.items()}
    row["build_peak_extra_mib"] = peak_extra_mib(lambda: flexproxy.build(q, k, config=config))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072], help="tokens")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1], help="kept / admissible blocks")
    parser.add_argument("--num-proxies", type=int, nargs="+", default=[1], help="proxy heads")
    parser.add_argument("--out", type=Path, default=RESULTS / "attention.json", help="result file (JSON)")
    args = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    check_correctness()
    cases = [(s, d, p) for s in args.lengths for d in args.densities for p in args.num_proxies]
    rows = [measure(*case) for case in track(cases, "timing")]
    write_json(args.out, {"environment": environment(), "rows": rows})
    for row in rows:
        times = {name: cell.get("median", "failed") for name, cell in row.items() if isinstance(cell, dict)}
        print({key: value for key, value in row.items() if not isinstance(value, dict)}, times)


if __name__ == "__main__":
    main()
