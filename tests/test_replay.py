"""Estimates that are replayed give what ``select`` gives, and ``build`` the masks of it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

import flexproxy
from flexproxy import ProxyConfig, building, masks, replay
from flexproxy.ops import implementations
from flexproxy.plan import plan_estimate
from flexproxy.stages.lists import block_lists
from tests.sparse.test_inference import CONFIGS, SHAPES, assert_near, qkv


def assert_same(ours: BlockMask, theirs: BlockMask) -> None:
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name
    assert (ours.shape, ours.BLOCK_SIZE) == (theirs.shape, theirs.BLOCK_SIZE)
    batch, heads, num_queries, num_keys = ours.shape
    positions = (
        torch.arange(0, size, step, device=ours.kv_indices.device)
        for size, step in ((batch, 1), (heads, 1), (num_queries, 37), (num_keys, 29))
    )
    grid = torch.meshgrid(*positions, indexing="ij")
    assert torch.equal(ours.mask_mod(*grid), theirs.mask_mod(*grid))


def test_a_mask_of_replayed_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only under the default mask, and where no gradients are needed, whose lists it would lack."""
    config = ProxyConfig(block_size=32, density=0.5, min_budget=32)
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, length, 16, generator=rng) for heads, length in ((4, 150), (2, 200)))
    selection, wanted = flexproxy.select(q, k, config=config), flexproxy.build(q, k, config=config)
    replayed = mock.Mock(side_effect=lambda *_, **__: replay.blocks_of(selection, 0))
    monkeypatch.setattr(building, "replayed", replayed)
    assert_same(flexproxy.build(q, k, config=config), wanted)
    assert replayed.call_count == 1
    assert replayed.call_args.kwargs["copies"], "the next call would write over the mask"
    for mask in (masks.causal, masks.sliding_window(70)):
        flexproxy.build(q, k, mask_mod=mask, config=config)
    flexproxy.build(q, k, block_mask=wanted, config=config)
    assert flexproxy.build(q.requires_grad_(), k, config=config).q_indices is not None
    assert replayed.call_count == 1


def test_what_is_replayed() -> None:
    """Up to 32K tokens of 32 heads, and where proxy heads do not take much memory."""

    def pays(length: int, batch: int = 1, **settings: Any) -> bool:
        q, k = (torch.empty(1).expand(batch, heads, length, 128) for heads in (32, 8))
        return replay._pays(plan_estimate((q, k), None, None, (ProxyConfig(**settings), None)))

    assert pays(32768)
    assert pays(8192, batch=16)
    assert pays(32768, sharing="rows", query_stride=16)
    assert not pays(32768, batch=2)
    assert not pays(32769)
    assert not pays(2**18, block_size=1024)
    assert not pays(32768, num_proxies=32, stride=1, query_stride=8, query_choice="outlier")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_are_those_of_select(shape: str, name: str) -> None:
    """The first one, and those that replay; no later one writes over them."""
    config, found = CONFIGS[name], []
    for seed in range(4):
        q, k, _ = qkv(shape, seed)
        found.append((flexproxy.build(q, k, config=config), flexproxy.select(q, k, config=config).block_mask()))
    for ours, theirs in found:
        assert_same(ours, theirs)


@pytest.mark.gpu
def test_build_in_a_graph_of_the_caller() -> None:
    config, (q, k, _) = CONFIGS["density"], qkv("long", 0)
    for _ in range(3):
        flexproxy.build(q, k, config=config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = flexproxy.build(q, k, config=config)
    for ours, theirs in zip((q, k), qkv("long", 5), strict=False):
        ours.copy_(theirs)
    graph.replay()
    assert_same(mask, flexproxy.select(q, k, config=config).block_mask())


@pytest.mark.parametrize("settings", [{}, {"sharing": "rows"}, {"groups": (0, 1, 1, 0)}])
def test_blocks_are_those_of_select(
    settings: dict[str, Any], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, which captures nothing, what would be captured runs again."""
    device = implementation
    if implementations.chosen() != "triton":
        pytest.skip("a replay is made of kernels")
    config = ProxyConfig(block_size=32, stride=2, density=0.5, min_budget=32, **settings)
    rng = torch.Generator().manual_seed(0)
    again = None
    for call in range(3):
        q, k = (torch.randn(1, heads, length, 16, generator=rng).to(device) for heads, length in ((4, 70), (2, 100)))
        if again is None:
            again = replay.Replay(q.device, plan_estimate((q, k), None, None, (config, None)), 0)
        if device == "cpu":
            monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
            if call:
                monkeypatch.setattr(again, "_graph", mock.Mock())
                again._reader.read(q, k)
                monkeypatch.setattr(again, "_blocks", again._choose(None))
        blocks, selection = again.blocks(q, k), flexproxy.select(q, k, config=config)
        assert torch.equal(blocks.kept, selection.block_map())
        for ours, theirs in zip(blocks.lists, block_lists(blocks.kept, selection.full), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_memory_of_old_replays_is_given_back() -> None:
    replay._replay_of.cache_clear()
    for length in range(3000, 3000 + 128 * (replay.MAX_KEPT + 3), 128):
        q, k, v = (x[:, :, :length] for x in qkv("long", 0))
        for _ in range(3):
            flexproxy.attention(q, k, v, config=CONFIGS["density"], when="always")
    assert replay._replay_of.cache_info().currsize == replay.MAX_KEPT


@pytest.mark.gpu
def test_an_error_in_a_capture_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call is right, and torch's memory can still be given back."""
    config, x = ProxyConfig(density=0.35, min_budget=128), qkv("long", 0)
    flexproxy.attention(*x, config=config, when="always")

    def fail(*_: object) -> None:
        raise MemoryError("in the capture")

    with monkeypatch.context() as broken:
        broken.setattr(replay, "choose", fail)
        with pytest.raises(MemoryError, match="in the capture"):
            flexproxy.attention(*x, config=config, when="always")
    torch.cuda.empty_cache()
    for _ in range(2):
        assert_near(flexproxy.attention(*x, config=config, when="always"), x, config)
