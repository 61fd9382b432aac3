"""Time to first token of a Llama in transformers, by sdpa and by flexproxy, on one GPU.

    python -m benchmarks.bench_prefill                       # 32K to 256K tokens, about six minutes on an H200
    python -m benchmarks.bench_prefill --plot-only           # draw the picture from the result file again

The shape of Llama-3.1-8B by its real class, random weights, bf16, batch 1, a cache, logits of the last token; what is
run is the model, as users run it. ``sdpa`` is timed twice: with cuDNN and with FlashAttention-2 as its kernel. Beside
time stands the memory that a prefill takes at its peak beyond the weights. Besides, at one length: what flexproxy adds
to a layer beyond building its mask and attending under it, and a decode step.

First the gate: at 4096 tokens, the layer's attention under a real budget and a padded batch against dense attention in
double precision; if it fails, nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

import flexproxy
from benchmarks.harness import RESULTS, environment, require_gpu, time_ms, write_json
from flexproxy import ProxyConfig, reference
from flexproxy._compat import compiled_flex_attention
from flexproxy.integrations.transformers import configure, record_selections
from flexproxy.integrations.transformers.attention import attention_forward
from flexproxy.integrations.transformers.masks import forward_mask

LENGTHS, DENSITIES = (32768, 65536, 131072, 262144), (0.31, 0.20, 0.16, 0.10)
LONGEST_OF_FLASH = 131072  # one prefill of 256K takes it more than a minute
SDPA = {"sdpa_cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa_flash": SDPBackend.FLASH_ATTENTION}


def model_config(max_length: int) -> LlamaConfig:
    """The shape of Llama-3.1-8B."""
    shape: dict[str, Any] = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": max_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaConfig(**shape)


def make_model(max_length: int) -> Any:
    """Random weights, made on the device."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(model_config(max_length)).eval()
    finally:
        torch.set_default_dtype(dtype)


def settings(density: float, length: int) -> ProxyConfig:
    """The paper's defaults, with a density; short prompts would not reach it with the paper's least budget."""
    return ProxyConfig(density=density, min_budget=min(2048, length // 32))


def causal_mask(length: int, padding: Tensor | None = None) -> BlockMask:
    """The mask that transformers would make for a prefill without a cache before it."""
    mask = forward_mask(
        batch_size=1 if padding is None else len(padding),
        q_length=length,
        kv_length=length,
        mask_function=masking_utils.causal_mask_function,
        attention_mask=padding,
        device=torch.device("cuda", torch.cuda.current_device()),
    )
    assert isinstance(mask, BlockMask)
    return mask


def layer_inputs(length: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as a layer of the model has them, its strides too."""

    def heads(number: int) -> Tensor:
        return torch.randn(batch, length, number, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    return heads(32), heads(8), heads(8)


@torch.no_grad()
def check_correctness(model: Any) -> None:
    """The gate: a layer's output is dense attention under its own selection, within twice SDPA's own error."""
    length, module = 4096, model.model.layers[0].self_attn
    q, k, v = (x[:, ::4] for x in layer_inputs(length, 2))  # 8 query heads and 2 key heads: the reference is dense
    padding = torch.ones(2, length, dtype=torch.bool, device="cuda")
    padding[1, :1000] = False
    mask, scale = causal_mask(length, padding), q.shape[-1] ** -0.5
    configure(model, ProxyConfig(density=0.2, min_budget=512))
    with record_selections(model) as record:
        out = attention_forward(module, q, k, v, mask, scaling=scale)[0].transpose(1, 2)
    member = create_mask(record[0].mask_mod(), 2, q.shape[1], length, length, device="cuda")
    allowed = member & create_mask(mask.mask_mod, 2, 1, length, length, device="cuda")
    exact = reference.attention(q, k, v, allowed, scale)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=True)
    dense = torch.where(allowed.any(-1, keepdim=True), dense, 0.0)
    error, own_error = ((x.double() - exact).abs().max().item() for x in (out, dense))
    if not error <= 2 * own_error + torch.finfo(q.dtype).eps * exact.abs().max().item():
        raise SystemExit(f"correctness gate failed: error {error:.2e}, SDPA's own {own_error:.2e}; nothing was timed")


def attempt(run: Callable[[], Any], repeats: int, warmup: int) -> dict[str, Any]:
    """Milliseconds, and the peak of memory beyond what was there; what cannot run is recorded, and not the end."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        cell: dict[str, Any] = dict(time_ms(run, repeats=repeats, warmup=warmup))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    return cell | {"peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)}


def time_to_first_token(model: Any, length: int, densities: list[float], repeats: int) -> dict[str, Any]:
    """One row of the result: every contender at one length."""
    tokens = torch.randint(model.config.vocab_size, (1, length), device="cuda")

    @torch.no_grad()
    def prefill(kernel: AbstractContextManager[Any] | None = None) -> None:
        with kernel or nullcontext():
            model(input_ids=tokens, use_cache=True, logits_to_keep=1)

    row: dict[str, Any] = {"length": length}
    model.set_attn_implementation("sdpa")
    for name, backend in SDPA.items():
        if name == "sdpa_flash" and length > LONGEST_OF_FLASH:
            continue
        slow = length > 65536  # minutes without end otherwise; there is nothing to compile
        times = 1 if length > 131072 else repeats
        row[name] = attempt(lambda backend=backend: prefill(sdpa_kernel(backend)), times, 0 if slow else 1)  # type: ignore[misc]
    model.set_attn_implementation("flexproxy")
    for density in densities:
        configure(model, settings(density, length))
        first = density == densities[0]  # one shape is compiled once
        cell = attempt(prefill, repeats if length <= 131072 else 1, 1 if first else 0)
        row[f"flexproxy_{density:.2f}"] = cell
    return row


@torch.no_grad()
def layer_overhead(model: Any, length: int, density: float) -> dict[str, Any]:
    """What a layer of the integration takes beside the build and the attention that it consists of."""
    module, config = model.model.layers[0].self_attn, settings(density, length)
    configure(model, config)
    q, k, v = layer_inputs(length)
    mask, scale, flex = causal_mask(length), q.shape[-1] ** -0.5, compiled_flex_attention("cuda")
    selected = flexproxy.build(q, k, block_mask=mask, config=config, scale=scale)
    options = flexproxy.kernel_options(q, k)

    def attend() -> Tensor:
        out: Tensor = flex(q, k, v, block_mask=selected, scale=scale, enable_gqa=True, kernel_options=options)
        return out

    row: dict[str, Any] = {"length": length, "density": density}
    row["layer"] = time_ms(lambda: attention_forward(module, q, k, v, mask, scaling=scale))
    row["build"] = time_ms(lambda: flexproxy.build(q, k, block_mask=mask, config=config, scale=scale))
    row["attention"] = time_ms(attend)
    row["mask_once_a_forward"] = time_ms(lambda: causal_mask(length))
    parts = row["build"]["median"] + row["attention"]["median"]
    row["added_share"] = round((row["layer"]["median"] - parts) / parts, 4)
    return row


@torch.no_grad()
def decode(model: Any, length: int) -> dict[str, Any]:
    """A step with one new token after a cache of ``length``, by turns."""
    tokens = torch.randint(model.config.vocab_size, (1, length), device="cuda")
    model.set_attn_implementation("flexproxy")
    configure(model, settings(0.1, length))
    cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    row: dict[str, Any] = {"length": length}
    medians: dict[str, list[float]] = {"sdpa": [], "flexproxy": []}
    for _ in range(3):
        for name, found in medians.items():
            model.set_attn_implementation(name)
            step = time_ms(lambda: model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True), warmup=2)
            found.append(step["median"])
    row |= {name: {"median": statistics.median(found), "rounds": found} for name, found in medians.items()}
    row["ratio"] = round(row["flexproxy"]["median"] / row["sdpa"]["median"], 4)
    return row


def draw(data: dict[str, Any], path: Path) -> None:
    """Time to first token, and memory, over the length; from the result file alone."""
    from matplotlib.figure import Figure

    rows = data["time_to_first_token"]
    names = [name for name, cell in rows[0].items() if isinstance(cell, dict)]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    time_axis, memory_axis = figure.subplots(1, 2)
    for name in names:
        cells = [(row["length"] // 1024, row[name]) for row in rows if "median" in row.get(name, {})]
        style = "--" if name.startswith("sdpa") else "-"
        label = name.replace("_", " ")
        lengths = [length for length, _ in cells]
        time_axis.plot(lengths, [cell["median"] / 1000 for _, cell in cells], style, marker="o", label=label)
        memory_axis.plot(lengths, [cell["peak_mib"] / 1024 for _, cell in cells], style, marker="o", label=label)
    for axis, title in ((time_axis, "time to first token, s"), (memory_axis, "peak memory beyond the weights, GiB")):
        axis.set(title=title, xlabel="tokens, K", xscale="log", yscale="log")
        ticks = [row["length"] // 1024 for row in rows]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    time_axis.legend(fontsize=8)
    figure.suptitle(f"Llama-3.1-8B shape, bf16, {data['environment']['gpu']}")
    unfinished = path.with_suffix(".tmp")
    figure.savefig(unfinished, format=path.suffix.lstrip("."), dpi=130)
    unfinished.replace(path)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    require_gpu()
    model = make_model(max(*args.lengths, args.at) + 1024)
    check_correctness(model)
    data: dict[str, Any] = {"environment": environment() | {"transformers": metadata.version("transformers")}}
    data["layer_overhead"] = layer_overhead(model, args.at, 0.16)
    data["decode"] = decode(model, args.at)
    data["time_to_first_token"] = []
    for length in track(sorted(args.lengths), "time to first token"):
        data["time_to_first_token"].append(time_to_first_token(model, length, args.densities, args.repeats))
        write_json(args.out, data)  # a longer prompt may be the end of it
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES), help="kept / admissible blocks")
    parser.add_argument("--repeats", type=int, default=2, help="timed prefills; one above 128K")
    parser.add_argument("--at", type=int, default=131072, help="length for the layer's overhead and for decoding")
    parser.add_argument("--out", type=Path, default=RESULTS / "prefill.json", help="result file (JSON)")
    parser.add_argument("--plot-only", action="store_true", help="draw the picture from the result file, run nothing")
    args = parser.parse_args()
    data = json.loads(args.out.read_text()) if args.plot_only else measure(args)
    draw(data, args.out.with_suffix(".png"))
    print("layer", data["layer_overhead"])
    print("decode", data["decode"])
    for row in data["time_to_first_token"]:
        cells = {name: cell for name, cell in row.items() if isinstance(cell, dict)}
        print(row["length"], {name: (c.get("median", c.get("error")), c.get("peak_mib")) for name, c in cells.items()})


if __name__ == "__main__":
    main()
