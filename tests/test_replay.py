"""Estimates that are replayed give what ``select`` gives, and ``build`` the masks of it."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import flexproxy
from flexproxy import ProxyConfig, building, masks, pipeline, replay
from flexproxy.ops import implementations
from flexproxy.plan import plan_estimate
from flexproxy.stages.lists import block_lists
from tests.caches import forget_tensors
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


class Again:
    """In place of ``Captures`` where nothing can be captured: what runs again, and writes to the same tensors."""

    def capture(self, work: Any) -> tuple[Any, replay.Blocks]:
        first = work(None)

        def run() -> None:
            kept, lists, _ = work(None)
            for old, new in zip((first.kept, *first.lists), (kept, *lists), strict=True):
                old.copy_(new)

        for tensor in (first.kept, *first.lists):
            tensor.zero_()
        return mock.Mock(replay=run), first


def captures(device: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    if implementations.chosen() != "triton":
        pytest.skip("a replay is made of kernels")
    if device != "cpu":
        return replay.Captures(torch.cuda.Stream(), torch.cuda.Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return Again()


FREE: dict[str, Any] = {"sink_blocks": 0, "local_blocks": 1, "dense_last_blocks": 0}  # or most of few blocks is forced
SMALL: dict[str, Any] = FREE | {"block_size": 32, "stride": 2, "density": 0.5, "min_budget": 32}


def small(device: str, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, heads, length, 16, generator=rng).to(device) for heads, length in ((4, 70), (2, 150)))
    return q, k


def assert_of_select(blocks: replay.Blocks | None, q: Tensor, k: Tensor, config: ProxyConfig) -> None:
    selection = flexproxy.select(q, k, config=config)
    assert blocks is not None
    assert torch.equal(blocks.kept, selection.block_map())
    for ours, theirs in zip(blocks.lists, block_lists(blocks.kept, selection.full), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("settings", [{}, {"sharing": "rows"}, {"groups": (0, 1, 1, 0)}])
def test_blocks_are_those_of_select(
    settings: dict[str, Any], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None at the first call; those of the second, which captures, and copies are never written over."""
    config = ProxyConfig(**SMALL | settings)
    q, k = small(implementation, 0)
    again = replay.Replay(captures(implementation, monkeypatch), plan_estimate((q, k), None, None, (config, None)), 0)
    assert again.blocks(q, k) is None
    found = []
    for seed in range(3):
        q, k = small(implementation, seed)
        blocks = again.blocks(q, k, copies=seed == 1)
        assert_of_select(blocks, q, k, config)
        assert blocks is not None
        found.append((blocks.kept, blocks.kept.clone()))
    assert not torch.equal(found[1][1], found[2][1]), "or nothing would be seen of what is written over"
    assert all(torch.equal(kept, then) for kept, then in found)
    assert again._captured is not None
    logits = again._captured[0]._reader._logits
    if logits is not None:
        assert logits.values.untyped_storage().nbytes() == 4 * 1024, "640 numbers, in few sizes"
    assert found[2][0].data_ptr() == again._captured[-1].kept.data_ptr()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: out of memory"), RuntimeError("broken")]
)
def test_where_a_capture_fails(error: Exception, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no memory the ordinary way is left; other errors are the caller's, until a later call succeeds."""
    config = ProxyConfig(**SMALL)
    q, k = small(implementation, 0)
    made = captures(implementation, monkeypatch)
    again = replay.Replay(made, plan_estimate((q, k), None, None, (config, None)), 0)
    again.blocks(q, k)
    with monkeypatch.context() as failing:
        failing.setattr(made, "capture", mock.Mock(side_effect=error))
        if "memory" in str(error) or isinstance(error, torch.OutOfMemoryError):
            assert again.blocks(q, k) is None
            assert again.blocks(q, k) is None
            assert made.capture.call_count == 1
            return
        with pytest.raises(RuntimeError, match="broken"):
            again.blocks(q, k)
    for _ in range(2):
        assert_of_select(again.blocks(q, k), q, k, config)


def test_captures_share_the_memory_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as a graph holds it; after an error the next one has other memory. A capture ends in any case."""
    graphs = [mock.Mock(pool=mock.Mock(return_value=n)) for n in range(4)]
    made = iter(graphs)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: next(made))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    main, side, current, given = mock.Mock(), mock.Mock(), mock.Mock(), mock.Mock()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    captures = replay.Captures(main, side)
    work = mock.Mock(side_effect=[given, given, RuntimeError("broken"), given])
    for _ in range(2):
        captures.capture(work)
    with pytest.raises(RuntimeError, match="broken"):
        captures.capture(work)
    captures.capture(work)
    assert [graph.capture_begin.call_args.kwargs["pool"] for graph in graphs] == [None, 0, 1, None]
    assert all(graph.capture_end.call_count == 1 for graph in graphs)
    assert work.call_args_list == [mock.call(side)] * 4
    assert main.wait_stream.call_args_list == [mock.call(current)] * 4, "or torch writes what is being read"
    assert current.wait_stream.call_args_list == [mock.call(main)] * 3


def test_nothing_is_replayed_where_a_capture_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch's own allocator: another, or none that keeps any."""
    backend, replays_on = mock.Mock(return_value="native"), mock.Mock()
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", backend)
    monkeypatch.setattr(replay, "_memory_can_be_captured", replay._memory_can_be_captured.__wrapped__)
    monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
    for name, value in {"place_of": "here", "_pays": True, "picked": "triton"}.items():
        monkeypatch.setattr(replay, name, mock.Mock(return_value=value))
    monkeypatch.setattr(replay, "_replays_on", replays_on)
    q, plan = mock.Mock(is_cuda=True), mock.Mock()
    assert replay.replayed(q, q, plan) is replays_on.return_value.return_value.blocks.return_value
    for name in ("cudaMallocAsync", "pluggable"):
        backend.return_value = name
        assert replay.replayed(q, q, plan) is None
    backend.return_value = "native"
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    assert replay.replayed(q, q, plan) is None


def test_more_plans_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn each is new at every call; as many as are kept are not."""
    q, k = small("cpu", 0)
    plans = [
        plan_estimate((q, k), None, None, (ProxyConfig(**SMALL | {"density": 0.3 + n / 10}), None))
        for n in range(replay.MAX_KEPT + 1)
    ]
    monkeypatch.setattr(replay, "_streams_of", lambda *_: (None, None))
    begin = mock.Mock(return_value=None)
    monkeypatch.setattr(replay.Replay, "_begin", begin)
    replay_of = replay._replays_on.__wrapped__(q.device)
    for _ in range(3):
        for plan in plans:
            assert replay_of("key", 0, plan, 0).blocks(q, k) is None
    assert not begin.called
    for plan in plans[1:]:
        replay_of("key", 0, plan, 0).blocks(q, k)
    assert begin.call_count == replay.MAX_KEPT


def test_captures_of_many_streams_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would leave memory behind that is of use to nobody."""
    monkeypatch.setattr(replay, "_streams_of", lambda *_: (None, None))
    replay_of = replay._replays_on.__wrapped__(torch.device("cpu"))
    first, second = ([replay_of(stream, 0, mock.Mock(), 0)._captures for stream in range(32)] for _ in range(2))
    assert len(set(first)) == 32
    assert first == second


@pytest.mark.gpu
@pytest.mark.parametrize("step", [-128, 128])
def test_graphs_share_their_memory(step: int) -> None:
    """Those of many lengths, the longest first or last: most find room where others were."""
    forget_tensors()
    torch.cuda.empty_cache()
    lengths = range(4224, 4224 - 20 * 128, -128)
    for length in lengths if step < 0 else reversed(lengths):
        x = [tensor[:, :, :length].contiguous() for tensor in qkv("long", 0)]
        for _ in range(3):
            flexproxy.attention(*x, config=CONFIGS["density"], when="always")
    segments = [s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] != (0, 0)]
    assert 0 < sum(s["total_size"] for s in segments) <= 12 * 2**20, "of their own they would have 4 MiB each"


@pytest.mark.gpu
def test_plans_in_turn() -> None:
    """Graphs write to the same memory, and not over what calls gave."""
    calls = [
        ("long", "density", True),
        ("long", "defaults", True),
        ("a chunk", "density", False),
        ("short", "rows", False),
    ]
    assert len(calls) <= replay.MAX_KEPT
    found: list[Any] = []
    for seed in range(5):
        for shape, name, attends in calls:
            q, k, v = qkv(shape, seed)
            if attends:
                found.append(flexproxy.attention(q, k, v, config=CONFIGS[name], when="always"))
            else:
                found.append(flexproxy.build(q, k, config=CONFIGS[name]))
    for seed in range(5):
        for shape, name, attends in calls:
            x, given = qkv(shape, seed), found.pop(0)
            if attends:
                assert_near(given, x, CONFIGS[name])
            else:
                assert_same(given, flexproxy.select(*x[:2], config=CONFIGS[name]).block_mask())


@pytest.mark.gpu
def test_in_inference_mode() -> None:
    """In turn with calls outside of it."""
    config = CONFIGS["density"]
    for seed in range(8):
        with torch.inference_mode(seed % 2 == 0):
            x = qkv("long", seed)
            assert_near(flexproxy.attention(*x, config=config, when="always"), x, config)


@pytest.mark.gpu
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_an_error_in_a_capture_ends_it(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call is right, and torch's memory can still be given back; where memory is short the call is, too."""
    config, x, choose = ProxyConfig(density=0.35, min_budget=128), qkv("long", 0), pipeline.choose
    forget_tensors()
    flexproxy.attention(*x, config=config, when="always")

    def fail(*arguments: Any) -> Any:
        chosen = choose(*arguments)
        if torch.cuda.is_current_stream_capturing():
            raise error("in the capture")
        return chosen

    with monkeypatch.context() as broken:
        broken.setattr(replay, "choose", fail)
        if error is MemoryError:
            with pytest.raises(MemoryError, match="in the capture"):
                flexproxy.attention(*x, config=config, when="always")
        else:
            assert_near(flexproxy.attention(*x, config=config, when="always"), x, config)
    torch.cuda.empty_cache()
    for _ in range(3):
        assert_near(flexproxy.attention(*x, config=config, when="always"), x, config)
