"""Time to first token of a Llama in transformers, by sdpa and by flexproxy, on one GPU.

    python -m benchmarks.bench_prefill      # 16K to 256K tokens
    python -m benchmarks.bench_prefill --chunks 8192,2048,16384,32768 --repeats 1   # 128K in chunks, and short prompts

The shape of Llama-3.1-8B by its real class, random weights made on the device, bf16, batch 1, logits of the last token
and the cache for decoding: the model as users run it, once with ``attn_implementation="sdpa"``, where the kernel is
cuDNN's or FlashAttention-2's, and once with ``"flexproxy"``. ``peak_mib`` is the memory at its peak beyond the weights.

Besides, at one length (--at): what a layer takes beyond building its mask and attending under it, and a decode step.
First the gate, on a padded batch: a layer's output against dense attention in double precision under the blocks that it
kept; if it fails, nothing is timed.

With ``--chunks``, instead: a prompt of --at tokens, whole and in chunks, behind a cache with room for all of it. Dense
contenders are those of ``benchmarks.chunked``, and ``sdpa`` as transformers runs it there, under a mask by tokens; a
gate checks them too. ``kept`` is the density that the first layer had, of the whole prompt; ``extra_ms_per_chunk`` what
a chunk takes beyond its share of the whole prompt; ``compiled`` how many graphs were compiled while it was timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

import flexproxy
from benchmarks import chunked, gate
from benchmarks.contenders import config_for, flex
from benchmarks.harness import (
    Lengths,
    Out,
    Quick,
    Row,
    attempt,
    command,
    fractions,
    integers,
    listed,
    quantiles,
    require_gpu,
    result_path,
    run_cases,
    settings_of,
    time_ms,
)
from flexproxy import ProxyConfig, reference
from flexproxy.inspect.record import Pass
from flexproxy.integrations.transformers import configure
from flexproxy.integrations.transformers.attention import attention_forward
from flexproxy.integrations.transformers.masks import forward_mask

LENGTHS, DENSITIES = "16384,32768,131072,262144", "0.31,0.20,0.16,0.10"
SDPA = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA FlashAttention-2": SDPBackend.FLASH_ATTENTION}
SLOW, ONCE, SHORT_REPEATS = 65536, 131072, 5  # longer prompts are not warmed up, and still longer ones run once
LONGEST_OF_FLASH = 131072  # longer ones take it long
IN_CHUNKS = {  # dense contenders, and what they are called in transformers
    "SDPA cuDNN in two parts": chunked.TWO_PARTS,
    "SDPA FlashAttention-2 lower right": chunked.LOWER_RIGHT,
    "SDPA as transformers masks it": "sdpa",
}
CHUNKED_DENSITY, SHORT_DENSITY, SHORT = 0.16, 0.15, (8192, 16384, 32768)
DEVICE, DTYPE = "cuda", torch.bfloat16


class Case(NamedTuple):
    """What is measured: ``prefill``, ``chunks``, ``layer`` or ``decode``.

    density: of flexproxy. chunk: its tokens. share: so many layers attend to the blocks of the first of them.
    """

    part: str
    length: int
    contender: str
    density: float | None = None
    chunk: int | None = None
    share: int = 1


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


def make_model(config: LlamaConfig) -> Any:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def causal_mask(length: int, padding: Tensor | None = None) -> BlockMask:
    """The mask that transformers makes for a prefill without a cache before it."""
    mask = forward_mask(
        batch_size=1 if padding is None else len(padding),
        q_length=length,
        kv_length=length,
        mask_function=masking_utils.causal_mask_function,
        attention_mask=padding,
        device=torch.empty(0, device=DEVICE).device,
    )
    assert isinstance(mask, BlockMask)
    return mask


def layer_inputs(length: int, batch: int = 1, heads: int = 32, kv_heads: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as a layer of the model has them, strides too."""

    def tensor(number: int) -> Tensor:
        return torch.randn(batch, length, number, 128, device=DEVICE, dtype=DTYPE).transpose(1, 2)

    return tensor(heads), tensor(kv_heads), tensor(kv_heads)


@torch.no_grad()
def check_correctness(model: Any, length: int = 4096) -> None:
    """The gate."""
    q, k, v = layer_inputs(length, batch=2, heads=8, kv_heads=2)
    padding = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
    padding[1, : length // 4] = False
    mask, scale = causal_mask(length, padding), q.shape[-1] ** -0.5
    model.set_attn_implementation("flexproxy")
    # A prompt short enough for the exact result would be dense.
    configure(model, ProxyConfig(density=0.2, min_budget=length // 8), when="always")
    with flexproxy.record(model, selections=True) as record:
        out = attention_forward(model.model.layers[0].self_attn, q, k, v, mask, scaling=scale)[0].transpose(1, 2)
    member = create_mask(record.selections[0].mask_mod(), 2, q.shape[1], length, length, device=DEVICE)
    allowed = member & create_mask(mask.mask_mod, 2, 1, length, length, device=DEVICE)
    exact = reference.attention(q, k, v, allowed, scale)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=True)
    dense = torch.where(allowed.any(-1, keepdim=True), dense, 0.0)
    compare(out, dense, exact)


def check_chunks(attend: Callable[..., Tensor]) -> None:
    """The gate of dense attention behind a cache, one of ``chunked.ATTENTIONS``."""
    q, k, v = layer_inputs(1024, heads=8, kv_heads=2)
    q, scale = q[:, :, -384:], q.shape[-1] ** -0.5
    allowed = torch.ones(384, 1024, dtype=torch.bool, device=DEVICE).tril(1024 - 384)
    exact = reference.attention(q, k, v, allowed[None, None].expand(1, 8, -1, -1), scale)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=True)
    compare(attend(q, k, v, scale), dense, exact)


def compare(out: Tensor, dense: Tensor, exact: Tensor) -> None:
    gate.compare("", out, exact, (dense.double() - exact).abs().max().item())


def prefill_ms(run: Callable[[], Any], repeats: int, warmup: int) -> Row:
    """Times until the result is there, as somebody waits for it, and the peak of memory beyond what was there."""
    for _ in range(warmup):
        run()
    torch.cuda.synchronize()
    before, times = torch.cuda.memory_allocated(), []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return quantiles(times) | {"peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)}


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def density_of(passes: Sequence[Pass]) -> float:
    """Of a layer, over all pairs of tokens that its passes admit; dense passes keep them all."""
    pairs = [x.num_queries * (x.num_keys - (x.num_queries - 1) / 2) for x in passes]
    kept = [1.0 if x.density is None else statistics.fmean(chain.from_iterable(x.density)) for x in passes]
    return round(sum(n * share for n, share in zip(pairs, kept, strict=True)) / sum(pairs), 4)


class Bench:
    """Measures cases with one model."""

    def __init__(self, model: Any, repeats: int) -> None:
        self.model, self.repeats = model, repeats
        self._whole: dict[tuple[str, int], float] = {}  # milliseconds of the whole prompt, by contender and share

    def measure(self, case: Case) -> list[Row]:
        measured = getattr(self, case.part)
        return [case._asdict() | attempt(lambda: measured(case))]

    def _tokens(self, length: int) -> Tensor:
        return torch.randint(self.model.config.vocab_size, (1, length), device=DEVICE)

    def _use(self, case: Case) -> AbstractContextManager[Any]:
        """Set the model's attention to that of a case; for the duration of the context, sdpa's kernel."""
        if case.density is None:
            self.model.set_attn_implementation(IN_CHUNKS.get(case.contender, "sdpa"))
            return sdpa_kernel(SDPA[case.contender]) if case.contender in SDPA else nullcontext()
        self.model.set_attn_implementation("flexproxy")
        share = {n: n - n % case.share for n in range(len(self.model.model.layers)) if n % case.share}
        configure(self.model, config_for(case.density, case.length), share=share)
        return nullcontext()

    @torch.no_grad()
    def prefill(self, case: Case) -> Row:
        tokens = self._tokens(case.length)

        def run() -> None:
            self.model(input_ids=tokens, use_cache=True, logits_to_keep=1)

        with self._use(case):
            kept = self._rehearse(run, case)
            repeats = 1 if case.length > ONCE else max(self.repeats, SHORT_REPEATS if case.length < SLOW else 1)
            row = prefill_ms(run, repeats, warmup=1 if case.length <= SLOW else 0)
        return row | {"kept": kept}

    @torch.no_grad()
    def chunks(self, case: Case) -> Row:
        """A prompt in chunks."""
        assert case.chunk is not None
        if (attend := chunked.ATTENTIONS.get(IN_CHUNKS.get(case.contender, ""))) is not None:
            check_chunks(attend)
        tokens = self._tokens(case.length).split(case.chunk, 1)

        def run() -> None:
            cache = chunked.roomy_cache(self.model.config.num_hidden_layers, case.length)
            for part in tokens:
                self.model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)

        with self._use(case):
            kept = self._rehearse(run, case)
            compiled = compilations()
            row = prefill_ms(run, self.repeats, warmup=0)
        row |= {"kept": kept, "compiled": compilations() - compiled, "extra_ms_per_chunk": None}
        contender = case.contender, case.share
        if len(tokens) == 1:
            self._whole[contender] = row["median_ms"]
        elif contender in self._whole:
            extra = row["median_ms"] - self._whole[contender]
            row["extra_ms_per_chunk"] = round(extra / (len(tokens) - 1), 3)
        return row

    def _rehearse(self, run: Callable[[], None], case: Case) -> float | None:
        """Compile and plan what a case needs, by the first layers. Returns the density, None of dense contenders."""
        with self._first_layers(max(2, case.share)):
            run()
            if case.density is None:
                return None
            with flexproxy.record(self.model) as record:  # attention that is observed may go another way
                run()
        return density_of(record.layers[0])

    @contextmanager
    def _first_layers(self, number: int) -> Iterator[None]:
        """The model has so many layers."""
        config = self.model.config
        all_of_them, config.num_hidden_layers = config.num_hidden_layers, number
        try:
            yield
        finally:
            config.num_hidden_layers = all_of_them

    @torch.no_grad()
    def layer(self, case: Case) -> Row:
        """One layer's attention as transformers calls it; the one call behind it; and its two parts, one by one."""
        assert case.density is not None
        with self._use(case):
            module, config = self.model.model.layers[0].self_attn, config_for(case.density, case.length)
            q, k, v = layer_inputs(case.length)
            mask, scale = causal_mask(case.length), q.shape[-1] ** -0.5
            arguments: dict[str, Any] = {"block_mask": mask, "config": config, "scale": scale}
            block_mask, options = flexproxy.build(q, k, **arguments), flexproxy.kernel_options(q, k)
            runs: dict[str, Callable[[], Any]] = {
                "layer": lambda: attention_forward(module, q, k, v, mask, scaling=scale),
                "call": lambda: flexproxy.attention(q, k, v, **arguments),
                "build": lambda: flexproxy.build(q, k, **arguments),
                "attention": lambda: flex(q, k, v, block_mask, options),
                "mask": lambda: causal_mask(case.length),  # once a forward pass
            }
            median = {name: time_ms(run)["median_ms"] for name, run in runs.items()}
        parts = median["build"] + median["attention"]
        row: Row = {f"{name}_ms": ms for name, ms in median.items()}
        row["added_to_call"] = round((median["layer"] - median["call"]) / median["call"], 4)
        return row | {"added_to_parts": round((median["layer"] - parts) / parts, 4)}

    @torch.no_grad()
    def decode(self, case: Case) -> Row:
        """A step with one new token, by turns with sdpa: medians of three rounds."""
        with self._use(case):
            tokens = self._tokens(case.length)
            cache = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
        rounds: dict[str, list[float]] = {"sdpa": [], "flexproxy": []}
        for _ in range(3):
            for name, found in rounds.items():
                self.model.set_attn_implementation(name)
                step = time_ms(lambda: self.model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True))
                found.append(step["median_ms"])
        median = {name: statistics.median(found) for name, found in rounds.items()}
        row: Row = {f"{name}_ms": ms for name, ms in median.items()}
        return row | {"ratio": round(median["flexproxy"] / median["sdpa"], 4)}


def cases_of(lengths: Sequence[int], densities: Sequence[float], at: int) -> list[Case]:
    cases = [Case("layer", at, "flexproxy", 0.16), Case("decode", at, "flexproxy", 0.16)]
    for length in sorted(lengths):
        cases += [Case("prefill", length, name) for name in SDPA if name == "SDPA cuDNN" or length <= LONGEST_OF_FLASH]
        cases += [Case("prefill", length, "flexproxy", density) for density in densities]
    return cases


def cases_in_chunks(chunks: Sequence[int], length: int) -> list[Case]:
    """The most important first: the whole prompt, the first size of chunks, short prompts, other sizes, slow ones."""
    best, *slow = IN_CHUNKS
    pairs = [(best, None), ("flexproxy", CHUNKED_DENSITY)]
    sized = [[Case("chunks", length, *pair, chunk) for pair in pairs] for chunk in (length, *chunks)]
    short = [
        Case("prefill", short, *pair)
        for short in SHORT
        for pair in [*((name, None) for name in SDPA), ("flexproxy", SHORT_DENSITY)]
    ]
    last = [Case("chunks", length, name, None, chunks[0]) for name in slow]
    return [*chain.from_iterable(sized[:2]), *short, *chain.from_iterable(sized[2:]), *last]


def with_sharing(cases: Sequence[Case], share: int) -> Iterator[Case]:
    """The cases, and after each of a sparse prefill the same with layers that share."""
    for case in cases:
        yield case
        if share > 1 and case.density is not None and case.part in ("prefill", "chunks"):
            yield case._replace(share=share)


def bench(
    *,
    lengths: Lengths = LENGTHS,
    densities: Annotated[Any, listed(fractions, "Kept / admissible blocks.")] = DENSITIES,
    repeats: Annotated[int, typer.Option(min=1, help="Timed prefills, up to 128K; of longer prompts, one.")] = 2,
    at: Annotated[int, typer.Option(min=1, help="Length for the layer, for decoding, and for chunks.")] = 131072,
    chunks: Annotated[Any, listed(integers, "Instead: prompts in chunks of so many tokens.")] = "",
    share: Annotated[int, typer.Option(min=1, help="Also with so many layers sharing one selection.")] = 1,
    out: Out = None,
    quick: Quick = False,
) -> None:
    settings = settings_of(locals()) | {"transformers": transformers.__version__}
    require_gpu()
    model = make_model(model_config(max(*lengths, *SHORT, at) + 1024))
    check_correctness(model)
    cases = cases_of(lengths, densities, at)
    if chunks:
        chunked.register()
        cases = cases_in_chunks(chunks, at)
    name = "prefill_chunks" if chunks else "prefill"
    run_cases(list(with_sharing(cases, share)), Bench(model, repeats).measure, result_path(name, out, quick), settings)


def main(argv: Sequence[str] | None = None) -> None:
    command(bench, argv, lengths="32768", densities="0.16", at=32768)


if __name__ == "__main__":
    main()
