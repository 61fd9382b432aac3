"""The parts of a vLLM backend that are ours, on a stand-in for vLLM and a dense backend: steps of made-up lengths."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import flexproxy
from flexproxy import ProxyConfig
from flexproxy.sparse.ragged import Paged, Request
from tests.accuracy import eagerly
from tests.caches import forget_tensors
from tests.integrations.serving import stand_in

HQ, HKV, D, PAGE = 4, 2, 32, 8
HEADS: dict[str, Any] = {"num_heads": HQ, "num_kv_heads": HKV, "head_size": D}
# Decodes, chunks of prompts, whole prompts; cached and new tokens. The last place is empty.
MIXED = [(60, 1), (100, 64), (33, 1), (0, 20), (0, 96), (200, 1)]
EVERY_BLOCK = {"gamma": 1.0, "num_proxies": 1, "when": "always"}
PAPER = {"sink_blocks": 0, "local_blocks": 1, "dense_last_blocks": 0}
BUDGET: dict[str, Any] = PAPER | {"density": 0.4, "min_budget": 32, "block_size": 32, "num_proxies": 1}

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def sparse() -> Iterator[Any]:
    with stand_in.installed() as module:
        yield module


class Server:
    """Layers of one backend, and a builder for them; on a GPU in bf16."""

    def __init__(
        self,
        sparse: Any,
        settings: dict[str, Any],
        layers: dict[int, dict[str, Any]] | None = None,
        device: str = "cpu",
        heads: dict[str, Any] = HEADS,
        **changes: Any,
    ) -> None:
        class Builder(sparse.SparseBuilder, stand_in.DenseBuilder):
            pass

        class Layer(sparse.SparseLayer, stand_in.DenseLayer):
            def keys_of(self, layer: Any, kv_cache: Tensor, table: Tensor) -> Paged:
                return Paged(kv_cache.transpose(1, 2), table)

        class Backend:
            @staticmethod
            def get_impl_cls() -> Any:
                return Layer

            @staticmethod
            def get_builder_cls() -> Any:
                return Builder

        self.device = torch.device(device)
        self.config = stand_in.use_config(settings, device, **changes)
        made = {0: {}, 1: {}} if layers is None else layers
        self.layers = [stand_in.Attention(f"model.layers.{i}.attn", Backend, **heads, **x) for i, x in made.items()]
        self.builder: Any = Builder([layer.layer_name for layer in self.layers], self.config, self.device)

    def step(self, requests: list[tuple[int, int]] = MIXED) -> Step:
        return Step(requests, self.device, self.config.model_config.dtype)

    def run(self, step: Step, layer: int = 0, metadata: Any = None, **arguments: Any) -> Tensor:
        metadata = self.builder.build(0, step.common) if metadata is None else metadata
        out = torch.full_like(step.q, 7.0)
        chosen = self.layers[layer]
        with eagerly() if self.device.type == "cpu" else contextlib.nullcontext():
            chosen.impl.forward(chosen, step.q, step.q, step.q, step.cache, metadata, out, **arguments)
        return out


class Step:
    """Queries, a cache of pages in random order, and the metadata; two places for requests that are not there."""

    def __init__(self, requests: list[tuple[int, int]], device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.requests = requests
        queries, lengths = [new for _, new in requests], [cached + new for cached, new in requests]
        starts = torch.tensor([0, *queries, 0, 0]).cumsum(0).to(torch.int32)
        columns = [-(-length // PAGE) for length in lengths]
        order = torch.randperm(sum(columns)).to(torch.int32)
        table = torch.zeros(len(requests) + 2, max(columns) + 2, dtype=torch.int32)
        for row, own in enumerate(order.split(columns)):
            table[row, : len(own)] = own
        self.q = 2 * torch.randn(int(starts[-1]) + 5, HQ, D, device=device, dtype=dtype)  # and five of padding
        self.cache = torch.randn(sum(columns), HKV, PAGE, 2 * D, device=device, dtype=dtype)
        on_host = torch.tensor([*lengths, 0, 0], dtype=torch.int32)
        self.common = stand_in.CommonMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=on_host.to(device),
            num_reqs=len(requests) + 2,
            num_actual_tokens=int(starts[-1]),
            max_query_len=max(queries),
            block_table_tensor=table.to(device),
            slot_mapping=torch.arange(int(starts[-1]), device=device),
            is_prefilling=torch.tensor([new > 1 for new in queries] + [False, False]),
            seq_lens_cpu_upper_bound=on_host,
        )

    def dense(self) -> Tensor:
        """The output of the dense backend alone."""
        out = torch.full_like(self.q, 7.0)
        metadata = stand_in.DenseBuilder([], None, self.q.device).build(0, self.common)
        return stand_in.DenseLayer(**HEADS).forward(None, self.q, None, None, self.cache, metadata, out)


def test_every_block_is_the_dense_step(sparse: Any) -> None:
    server = Server(sparse, EVERY_BLOCK)
    step = server.step()
    torch.testing.assert_close(server.run(step), step.dense(), rtol=1e-5, atol=1e-5)
    assert server.layers[0].impl.seen == [1, 1, 1]  # the decodes, in the runs between prefills


def test_a_rehearsal_has_keys_laid_out_as_gathered_pages(sparse: Any) -> None:
    """Kernels that it compiles are to fit: their strides, and where they begin."""
    step = Server(sparse, EVERY_BLOCK).step([(100, 64), (0, 96)])
    for row, num_keys in enumerate((164, 96)):
        request = Request(row, 0, num_keys, num_keys)
        gathered = Paged(step.cache.transpose(1, 2), step.common.block_table_tensor).of(request)
        rehearsed = sparse.zeros_as_gathered(step.q, num_keys, HKV, D).of(request._replace(row=0))
        for x, zeros in zip(gathered, rehearsed, strict=True):
            assert x.shape == zeros.shape
            assert x.stride() == zeros.stride()
            assert x.storage_offset() == zeros.storage_offset() == 0


def test_a_budget_is_the_request_alone(sparse: Any) -> None:
    """Requests of at least a block are those of ``flexproxy.attention``; the others are dense."""
    server = Server(sparse, BUDGET)
    step = server.step()
    out, dense = server.run(step), step.dense()
    assert server.layers[0].impl.seen == [1, 21, 1]  # between them also the prompt of 20 tokens
    starts = step.common.query_start_loc_cpu.tolist()
    config = ProxyConfig(**BUDGET)
    for row, (_, new) in enumerate(step.requests):
        rows = slice(starts[row], starts[row + 1])
        if new < 32:
            torch.testing.assert_close(out[rows], dense[rows])
            continue
        k, v = Paged(step.cache.transpose(1, 2), step.common.block_table_tensor).of(
            sparse.Request(row, starts[row], new, sum(step.requests[row]))
        )
        with eagerly():
            alone = flexproxy.attention(step.q[rows].transpose(0, 1)[None], k, v, config=config)
        torch.testing.assert_close(out[rows], alone[0].transpose(0, 1))
        assert not torch.allclose(out[rows], dense[rows], atol=1e-3)
    assert bool((out[starts[-1] :] == 7.0).all())


def test_layers_with_other_settings(sparse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the split that its settings ask for; those of layers with the same requests are made once."""
    monkeypatch.setattr("flexproxy.sparse.plan.SPARSE_COST", 0.0)  # the budgets alone decide
    monkeypatch.setattr("flexproxy.sparse.plan.CPU_BUILD", 0.0)
    layers = {"1": {"min_budget": 100}, "2": {"gamma": 1.0}, "3": {"min_budget": 64}}
    server = Server(sparse, BUDGET | {"layers": layers}, {i: {} for i in range(4)})
    step = server.step()
    for layer in range(4):
        server.run(step, layer, server.builder.build(0, step.common))
    seen = [layer.impl.seen for layer in server.layers]
    assert seen == [[1, 21, 1], [1, 118], [step.q.shape[0]], [1, 21, 1]]
    fast = [common.num_actual_tokens for common, is_fast in server.builder.calls if is_fast]
    assert fast == [1, 21, 1, 1, 118] * 4  # the runs of layers 0 and 3, then of layer 1, in each of four builds


def test_steps_that_stay_whole(sparse: Any) -> None:
    server = Server(sparse, EVERY_BLOCK)
    step = server.step()
    whole = [step.q.shape[0]]
    server.run(step, metadata=server.builder.build_for_cudagraph_capture(step.common))
    server.run(step, metadata=server.builder.build(0, step.common, True))  # of a draft model
    server.run(step, metadata=server.builder.build(16, step.common))  # a prefix in common, computed by itself
    for changes in ({"causal": False}, {"causal": torch.ones(6)}, {"mm_req_doc_ranges": {0: [(0, 3)]}}):
        server.run(step, metadata=server.builder.build(0, step.common.replace(**changes)))
    assert stand_in.LOG[1:] == []
    for name in ("is_prefilling", "seq_lens_cpu_upper_bound"):
        changed = step.common.replace(**{name: None})
        metadata = server.builder.build(0, changed)
        metadata.common = step.common  # the dense backend's own lengths
        server.run(step, metadata=metadata)
        assert stand_in.LOG[-1] == f"flexproxy: steps for which vLLM has no {name} on the host stay dense"
    server.run(step, output_scale=torch.ones(()))
    assert "arguments that it does not know stay dense: ['output_scale']" in stand_in.LOG[-1]
    assert server.layers[0].impl.seen == whole * 9


def test_decoding_looks_at_no_lengths(sparse: Any) -> None:
    server = Server(sparse, EVERY_BLOCK)
    step = server.step([(60, 1), (9, 1)])
    step.common.is_prefilling = None  # would be told
    torch.testing.assert_close(server.run(step), step.dense())
    assert stand_in.LOG[1:] == []


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "encoder": ({"attn_type": stand_in.AttentionType.ENCODER_ONLY}, "it is no causal self-attention"),
    "window": ({"sliding_window": (127, 0)}, "it has a sliding window"),
    "alibi": ({"alibi_slopes": [0.5] * HQ}, "it has ALiBi"),
    "softcap": ({"logits_soft_cap": 30.0}, "it has a softcap"),
    "sinks": ({"sinks": torch.ones(HQ)}, "it has attention sinks"),
    "fp8": ({"kv_cache_dtype": "fp8_e4m3"}, "its cache is quantized"),
    "shared": ({"kv_sharing_target_layer_name": "model.layers.0.attn"}, "it shares the cache of another layer"),
    "dcp": ({"dcp_world_size": 2}, "decode context parallelism is on"),
    "pcp": ({"pcp_world_size": 2}, "prefill context parallelism is on"),
}


@pytest.mark.parametrize("name", REASONS)
def test_layers_that_stay_dense(sparse: Any, name: str) -> None:
    """They are named in the log with the reason, beside the others."""
    properties, reason = REASONS[name]
    server = Server(sparse, EVERY_BLOCK, {0: {}, 1: properties, 2: {}})
    said = list(stand_in.LOG)
    assert said == [
        "flexproxy: layers 0, 2 prefill sparsely where a prompt has 2 tokens or more: num_proxies=1, gamma=1.0",
        f"flexproxy: layers 1 stay dense: {reason}",
    ]
    step = server.step()
    server.run(step, 1)
    assert server.layers[1].impl.seen == [step.q.shape[0]]


def test_builders_that_vllm_derives(sparse: Any) -> None:
    """They are given other requests than there are."""
    server = Server(sparse, EVERY_BLOCK)
    derived = type("ChunkedBuilder", (type(server.builder),), {"__module__": "vllm.somewhere"})
    builder = derived(server.builder.layer_names, server.config, server.device)
    step = server.step()
    server.run(step, metadata=builder.build(0, step.common))
    assert server.layers[0].impl.seen == [step.q.shape[0]]


def test_settings_must_fit(sparse: Any) -> None:
    with pytest.raises(ValueError, match="did you mean 'gamma'"):
        Server(sparse, {"gama": 0.9})
    said = list(stand_in.LOG)
    assert said == [
        "flexproxy: additional_config[\"flexproxy\"]: expected names of settings, got 'gama'; did you mean 'gamma'?"
    ]
    with pytest.raises(ValueError, match="num_proxies: expected a divisor of the 2 KV heads"):
        Server(sparse, {"num_proxies": 3})


def test_a_rank_takes_its_share(sparse: Any) -> None:
    half = HEADS | {"num_heads": 2, "num_kv_heads": 1}
    server = Server(sparse, {"groups": [0, 1, 2, 2]}, heads=half, rank=1, ranks=2)
    plan = server.layers[0].impl.plan_of(server.layers[0])
    assert plan.share == ProxyConfig(groups=[0, 0])
    assert plan.config == ProxyConfig(groups=[0, 1, 2, 2])
    assert stand_in.LOG == []  # the first rank tells
    server = Server(sparse, {}, heads=half, rank=1, ranks=2)
    assert server.layers[0].impl.plan_of(server.layers[0]).share == ProxyConfig(num_proxies=1)  # of two for the model
    with pytest.raises(ValueError, match="num_proxies: expected a multiple of the 2 tensor-parallel ranks"):
        Server(sparse, {"num_proxies": 1}, heads=half, rank=1, ranks=2)


@pytest.mark.gpu
def test_on_a_gpu(sparse: Any) -> None:
    """Every block, in bf16; the build and the sparse requests of a step do not wait for the device."""
    server = Server(sparse, EVERY_BLOCK, device="cuda")
    step = server.step()
    torch.testing.assert_close(server.run(step), step.dense(), rtol=2e-2, atol=2e-2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            server.run(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_profiling_run_takes_the_memory(sparse: Any) -> None:
    """As much as the longest prefill later takes, and once for all layers with the same settings."""
    forget_tensors()  # those of other tests would be given back while it is measured
    server = Server(sparse, EVERY_BLOCK, device="cuda")
    q = torch.zeros(512, HQ, D, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q)

    def peak(layer: Any, cache: Any, metadata: Any) -> int:
        gc.collect()  # or garbage of other tests is freed while it is measured
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer.impl.forward(layer, q, q, q, cache, metadata, out)
        return torch.cuda.max_memory_allocated() - before

    profiled = peak(server.layers[0], None, None)
    assert peak(server.layers[1], None, None) < profiled / 4
    step = server.step([(512, 512)])
    step.q = q
    assert peak(server.layers[0], step.cache, server.builder.build(0, step.common)) <= profiled
