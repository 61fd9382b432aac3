"""Inference under the default mask: replayed estimates and dense rows apart give what the ordinary way gives."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import flexproxy
from flexproxy import ProxyConfig, replay
from flexproxy.plan import plan_estimate
from flexproxy.sparse import inference
from flexproxy.sparse.kernel import NotCompiledError, run_causal
from flexproxy.stages.lists import block_lists
from tests.accuracy import eagerly
from tests.settings import outliers

CONFIGS = {
    "defaults": ProxyConfig(min_budget=256),
    "density": ProxyConfig(density=0.3, min_budget=128),
    "two dense rows": ProxyConfig(gamma=0.7, min_budget=128, dense_last_blocks=2, num_proxies=1),
    "paper": ProxyConfig.paper(gamma=0.8, min_budget=128),
    "outliers": outliers(gamma=0.8, min_budget=128, num_proxies=1),
    "rows of a density": ProxyConfig(density=0.3, min_budget=128, sharing="rows"),
    "rows": ProxyConfig(gamma=0.8, min_budget=128, sharing="rows", query_stride=16),
    "blocks of 64": ProxyConfig(gamma=0.8, min_budget=128, block_size=64),
}
# Batch, query heads, key heads, queries, keys, head dimension.
SHAPES = {
    "long": (1, 8, 2, 4224, 4224, 64),
    "ragged, a batch": (2, 4, 2, 4300, 4300, 64),
    "a chunk": (1, 4, 4, 1100, 4700, 128),
    "short": (1, 4, 2, 700, 700, 32),
}


def qkv(shape: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_q_heads, num_kv_heads, num_queries, num_keys, head_dim = SHAPES[shape]
    rng = torch.Generator("cuda").manual_seed(seed)

    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(batch, length, heads, head_dim, generator=rng, device="cuda", dtype=dtype).transpose(1, 2)

    return normal(num_q_heads, num_queries), 2 * normal(num_kv_heads, num_keys), normal(num_kv_heads, num_keys)


def expected(x: tuple[Tensor, Tensor, Tensor], config: ProxyConfig) -> Tensor:
    """Dense attention under the selected blocks, in double precision."""
    q, k, v = x
    kept = flexproxy.select(q, k, config=config).block_map()
    blocks = kept.repeat_interleave(config.block_size, 2).repeat_interleave(config.block_size, 3)
    position = torch.arange(q.shape[2], device=q.device) + k.shape[2] - q.shape[2]
    causal = position[:, None] >= torch.arange(k.shape[2], device=q.device)
    out = []
    for head in range(q.shape[1]):  # one after the other, for memory
        own = head // (q.shape[1] // k.shape[1])
        logits = q[:, head].double() @ k[:, own].double().transpose(1, 2) * q.shape[3] ** -0.5
        allowed = blocks[:, head, : q.shape[2], : k.shape[2]] & causal
        out.append(logits.masked_fill_(~allowed, -torch.inf).softmax(-1) @ v[:, own].double())
    return torch.stack(out, 1)


def assert_near(out: Tensor, x: tuple[Tensor, Tensor, Tensor], config: ProxyConfig) -> None:
    wanted = expected(x, config)
    assert ((out.double() - wanted).norm() / wanted.norm()).item() < (1e-2 if out.dtype != torch.float32 else 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_call_is_right(shape: str, name: str) -> None:
    """The first one, which compiles, the second, which captures, and those that replay, each with other values."""
    config = CONFIGS[name]
    for seed in range(4):
        x = qkv(shape, seed)
        assert_near(flexproxy.attention(*x, config=config, when="always"), x, config)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_without_replays(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_pays", lambda plan: False)
    for seed in range(2):
        x = qkv(shape, seed)
        assert_near(flexproxy.attention(*x, config=CONFIGS["density"], when="always"), x, CONFIGS["density"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for seed in range(3):
        x = qkv("long", seed, dtype)
        assert_near(flexproxy.attention(*x, config=CONFIGS["defaults"], when="always"), x, CONFIGS["defaults"])


@pytest.mark.gpu
def test_values_of_another_head_dimension() -> None:
    q, k, v = qkv("long", 0)
    for _ in range(3):
        assert_near(
            flexproxy.attention(q, k, v[..., :32], config=CONFIGS["defaults"], when="always"),
            (q, k, v[..., :32]),
            CONFIGS["defaults"],
        )


@pytest.mark.gpu
def test_streams_and_threads_have_replays_of_their_own() -> None:
    config, inputs = CONFIGS["density"], [qkv("long", seed) for seed in range(8)]
    torch.cuda.synchronize()
    outputs: dict[int, Tensor] = {}

    def work(numbers: range, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            for number in numbers:
                outputs[number] = flexproxy.attention(*inputs[number], config=config, when="always")

    default = torch.cuda.current_stream()
    workers = [
        threading.Thread(target=work, args=(range(4), default)),
        threading.Thread(target=work, args=(range(4, 8), torch.cuda.Stream())),
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.cuda.synchronize()
    for number, x in enumerate(inputs):
        assert_near(outputs[number], x, config)


@pytest.mark.gpu
def test_in_a_graph_of_the_caller() -> None:
    """CUDA graphs do not nest: there the estimate is captured with the rest."""
    config, x = CONFIGS["density"], qkv("long", 0)
    for _ in range(3):
        flexproxy.attention(*x, config=config, when="always")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flexproxy.attention(*x, config=config, when="always")
    for ours, theirs in zip(x, qkv("long", 5), strict=True):
        ours.copy_(theirs)
    graph.replay()
    assert_near(out, x, config)


@pytest.mark.gpu
def test_gradients_go_the_ordinary_way() -> None:
    x = tuple(tensor.requires_grad_() for tensor in qkv("short", 0))
    for _ in range(3):
        flexproxy.attention(*x, config=CONFIGS["density"], when="always").sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in x)


def test_where_compilation_is_switched_off() -> None:
    x = torch.zeros(1, 1, 128, 16)
    lists = block_lists(*[torch.ones(1, 1, 1, 1, dtype=torch.bool)] * 2)
    with eagerly(), pytest.raises(NotCompiledError):
        run_causal(x, x, x, torch.zeros(1, dtype=torch.int32), lists, 128, 1.0, {})


def test_which_rows_stand_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the kernel for them takes: values of another head dimension it does not."""
    first_apart = inference.first_apart.__wrapped__
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)
    q, k = (torch.empty(1, heads, 4300, 64, dtype=torch.bfloat16) for heads in (4, 2))
    plan = plan_estimate((q, k), None, None, (ProxyConfig(dense_last_blocks=2), None))
    usual = inference.Values(torch.bfloat16, 64, 64)
    assert first_apart(plan, usual, 32) == 32 * 128
    for changes in ({"value_dim": 32}, {"dtype": torch.float32}):
        assert first_apart(plan, usual._replace(**changes), 32) is None
    paper = plan_estimate((q, k), None, None, (ProxyConfig.paper(), None))
    assert first_apart(paper, usual, 32) is None
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: False)
    assert first_apart(plan, usual, 32) is None
