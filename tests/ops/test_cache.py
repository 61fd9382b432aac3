"""What is kept from call to call: the same values as made anew, given only where they hold, and never the caller's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flexproxy
from flexproxy import ProxyConfig, masks
from flexproxy.ops import cache, implementations

CUDA = torch.device("cuda", 0)
SETTINGS: dict[str, ProxyConfig] = {
    "gamma": ProxyConfig(block_size=32, min_budget=0, gamma=0.6),
    "density, forced blocks": ProxyConfig(block_size=32, min_budget=0, density=0.4, sink_blocks=2, local_blocks=3),
    "proxies": ProxyConfig(block_size=32, min_budget=0, gamma=0.6, num_proxies=2),
    "groups": ProxyConfig(block_size=32, min_budget=0, gamma=0.6, groups=[0, 1, 1, 0]),
}


@pytest.fixture
def keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this test makes is kept for it alone."""
    place = object()
    monkeypatch.setattr(cache, "place_of", lambda device: place)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for the current stream of a GPU."""
    stream = SimpleNamespace(cuda_stream=7, capturing=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: stream.cuda_stream, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stream.capturing)
    return stream


def make_inputs(seed: int, num_queries: int = 200, num_keys: int = 200) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        2 * torch.randn(2, 4, num_queries, 16, generator=generator),
        torch.randn(2, 2, num_keys, 16, generator=generator),
    )


def parts(selection: flexproxy.Selection) -> list[Tensor]:
    mask = selection.block_mask()
    lists = mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices
    return [selection.rank, selection.count, selection.proxy_of, *(x for x in lists if x is not None)]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_kept_mask_changes_nothing(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths and values come again in turn: each selection is that of a build that keeps nothing."""
    calls = [(*make_inputs(seed, 200 - 70 * (seed % 2)), SETTINGS[name]) for seed in range(4)]
    calls = [(q.to(device), k.to(device), config) for q, k, config in calls]
    with monkeypatch.context() as context:
        context.setattr(cache, "place_of", lambda device: None)
        wanted = [parts(flexproxy.select(q, k, config=config)) for q, k, config in calls]
    place = object()
    monkeypatch.setattr(cache, "place_of", lambda device: place)
    for (q, k, config), fresh in zip(calls, wanted, strict=True):
        for ours, theirs in zip(parts(flexproxy.select(q, k, config=config)), fresh, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_caller_gets_is_his(name: str, keeps: None) -> None:
    q, k = make_inputs(0)
    first = parts(flexproxy.select(q, k, config=SETTINGS[name]))
    copies = [x.clone() for x in first]
    for x in first:
        x.fill_(3)
    for ours, wanted in zip(parts(flexproxy.select(q, k, config=SETTINGS[name])), copies, strict=True):
        assert torch.equal(ours, wanted)


@pytest.fixture
def classified(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of queries of every mask that is classified."""
    pipeline, seen = sys.modules["flexproxy.pipeline"], []
    inner: Callable[..., Any] = pipeline.classify_clauses

    def noting(clauses: Any, *arguments: Any) -> Any:
        seen.append(clauses.lo.shape[-1])
        return inner(clauses, *arguments)

    monkeypatch.setattr(pipeline, "classify_clauses", noting)
    return seen


def test_the_default_mask_is_classified_once(keeps: None, classified: list[int]) -> None:
    for num_queries in (200, 200, 130, 200, 130):
        for name in SETTINGS:  # layers with settings of their own share a mask, where blocks and samples are the same
            flexproxy.build(*make_inputs(0, num_queries), config=SETTINGS[name])
    assert sorted(classified) == [130, 130, 200, 200]  # with forced blocks, and without


def test_masks_that_may_change_are_read_anew(keeps: None, classified: list[int]) -> None:
    """Of a mask of the caller, whose tensors may hold other values the next time; and without keeping, of any."""
    q, k = make_inputs(0)
    mask_mod = masks.shift(masks.causal, torch.zeros((), dtype=torch.int32))
    for _ in range(3):
        flexproxy.build(q, k, mask_mod=mask_mod, config=SETTINGS["gamma"])
    assert len(classified) == 3


def test_large_masks_are_not_kept(keeps: None, classified: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["flexproxy.pipeline"], "MAX_KEPT_PAIRS", 2 * 7 * 7 - 1)  # B Nq Nk, less one
    for num_queries in (200, 200, 190, 160, 160):
        flexproxy.build(*make_inputs(0, num_queries), config=SETTINGS["gamma"])
    assert classified == [200, 200, 190, 160]


def counted(maximum: int) -> tuple[Callable[[torch.device, int], Tensor], list[int]]:
    made: list[int] = []

    @cache.kept(maximum)
    def make(device: torch.device, number: int) -> Tensor:
        made.append(number)
        return torch.full((2,), number)

    return make, made


def test_no_more_is_kept_than_the_maximum(stream: SimpleNamespace) -> None:
    make, made = counted(2)
    for number in (1, 2, 1, 3, 1, 2):
        assert make(CUDA, number).tolist() == [number, number]
    assert made == [1, 2, 3, 2]


def test_what_is_kept_belongs_to_a_place(stream: SimpleNamespace) -> None:
    """Another device, stream, implementation, or inference mode has one of its own, and keeps it too."""
    make, made = counted(8)
    for _ in range(2):
        make(CUDA, 1)
        make(torch.device("cuda", 1), 1)
        with implementations.use("torch"):
            make(CUDA, 1)
        with torch.inference_mode():
            assert make(CUDA, 1).is_inference()
        stream.cuda_stream = 8
        make(CUDA, 1)
        stream.cuda_stream = 7
        assert not make(CUDA, 1).is_inference()
    assert len(made) == 5


def test_where_nothing_is_kept(stream: SimpleNamespace) -> None:
    """In the capture of a graph, under a mode, in a transform: neither made there, nor given there."""
    make, made = counted(8)
    kept = make(CUDA, 1)
    assert make(CUDA, 1) is kept
    for _ in range(2):
        stream.capturing = True
        assert make(CUDA, 1) is not kept
        stream.capturing = False
        with FakeTensorMode():
            assert make(CUDA, 1) is not kept
        torch.func.grad(lambda x: (x * make(CUDA, 1)[0]).sum())(torch.ones(2))
    assert len(made) == 1 + 2 * 3
    assert make(CUDA, 1) is kept


def test_a_trace_keeps_nothing(stream: SimpleNamespace) -> None:
    make, made = counted(8)

    @torch.compile(backend="eager", fullgraph=True)
    def traced(x: Tensor) -> Tensor:
        return x + make(CUDA, 1)

    assert traced(torch.ones(2)).tolist() == [2, 2]
    before = len(made)
    make(CUDA, 1)
    make(CUDA, 1)
    assert len(made) == before + 1
