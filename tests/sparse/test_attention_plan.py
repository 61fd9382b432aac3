"""What a call of attention is planned to do, and attention with a selection again and again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, noop_mask

import flexproxy
from flexproxy import ProxyConfig, masks
from flexproxy.ops import compat
from flexproxy.sparse import kernel as sparse_kernel
from flexproxy.sparse import rows
from flexproxy.sparse.plan import AttentionPlan, KernelPlan, Settings, plan_attention
from tests.accuracy import allowed_pairs, assert_accurate, cpu_kernel_exists, skip_unless_flex_compiles

BLOCK = 32
CONFIG = ProxyConfig(block_size=BLOCK, min_budget=0, gamma=0.6)

Call = tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]


def qkv(length: int = 128, batch: int = 1, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(batch, heads, length, 16, generator=generator).to(device) for heads in (4, 2, 2))
    return q, k, v


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """A stand-in of the compiled kernel, and what it was called with."""
    seen: list[Call] = []

    def run(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
        seen.append(((q, k, v), arguments))
        return q

    monkeypatch.setattr(sparse_kernel, "run_compiled", run)
    monkeypatch.setattr(rows, "fits", lambda *_: False)  # what a CPU does instead
    return seen


def halved(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return score / 2


def plan(
    length: int = 128, mask_mod: Any = None, score_mod: Any = None, options: Any = None, config: Any = CONFIG, **x: Any
) -> AttentionPlan:
    settings = Settings(config, None, type(score_mod), options, x.pop("return_lse", False), **x)
    return plan_attention(qkv(length), mask_mod, None, settings)


def test_a_dense_plan_says_why_and_a_sparse_one_how() -> None:
    dense, sparse = plan(config=ProxyConfig()), plan()
    assert dense.dense == "min_budget covers all keys" == flexproxy.why_dense(*qkv()[:2])
    assert (dense.estimate, dense.by_sdpa) == (None, True)
    assert sparse.dense is flexproxy.why_dense(*qkv()[:2], CONFIG) is None
    assert sparse.estimate is not None
    assert sparse.kernel == KernelPlan(0.25, True, False, detach=True, listed=True, lse=False, kernel_options={})
    assert "listed=True" in repr(sparse)
    always = plan(config=ProxyConfig(), when="always")
    assert always.dense is None
    assert always.estimate is not None
    for changes in ({"mask_mod": masks.causal}, {"score_mod": halved}):
        assert not plan(config=ProxyConfig(), **changes).by_sdpa


@pytest.fixture
def asks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """Each time that cuDNN is asked for, on what counts as a Hopper GPU, with a torch that can be asked."""
    asked: list[None] = []

    def cudnn_first() -> AbstractContextManager[None]:
        asked.append(None)
        return nullcontext()

    monkeypatch.setattr(compat, "is_hopper", lambda device: True)
    monkeypatch.setattr(compat, "_SDPA_KERNEL", {"set_priority"})
    monkeypatch.setattr(compat, "cudnn_first", cudnn_first)
    with mock.patch.dict(plan_attention.plans, clear=True):
        yield asked


@pytest.mark.parametrize(("by_itself", "if_asked", "calls"), [(1, 3, 2), (3, 3, 1), (1, 1, 1)])
def test_cudnn_is_asked_for_where_torch_takes_another_kernel(
    by_itself: int, if_asked: int, calls: int, asks: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the plan, and again by each call where that helps; 3 is cuDNN."""
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: if_asked if asks else by_itself)
    q, k, v = qkv()
    out = flexproxy.attention(q, k, v)
    assert len(asks) == calls
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def test_cudnn_is_not_asked_for(asks: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where gradients are needed, and where the caller has switched it off."""
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: 3 if asks else 1)
    q, k, v = qkv()
    with torch.no_grad():
        flexproxy.attention(q.clone().requires_grad_(), k, v)
    assert not asks
    flexproxy.attention(q, k, v)
    assert len(asks) == 2
    with sdpa_kernel(SDPBackend.MATH):
        flexproxy.attention(q, k, v)
    assert len(asks) == 2


def test_dense_calls_under_vmap(asks: list[None]) -> None:
    """Which has no rule for the question."""
    q, k, v = qkv()
    out = torch.vmap(flexproxy.attention)(q[None], k[None], v[None])
    torch.testing.assert_close(out[0], F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.gpu
def test_dense_attention_on_a_hopper_gpu_is_cudnns(dtype: torch.dtype) -> None:
    """Or what torch takes where cuDNN has no kernel, as in fp32."""
    if not compat.is_hopper(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("not a Hopper GPU")
    q, k, v = (x.to(dtype) for x in qkv(length=1024, device="cuda"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        out = flexproxy.attention(q, k, v)
    names = [event.key for event in profile.key_averages()]
    assert any("cudnn" in name for name in names) == (dtype == torch.bfloat16), names
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


@pytest.mark.parametrize(("num_queries", "config"), [(1, ProxyConfig(min_budget=0)), (200, ProxyConfig(gamma=1.0))])
def test_sparse_whatever_it_costs(num_queries: int, config: ProxyConfig, calls: list[Call]) -> None:
    """``when="always"``: with one query, and with settings that keep every block."""
    q, k, v = qkv(200)
    flexproxy.attention(q[:, :, :num_queries], k, v, config=config)
    assert calls == [], "dense by SDPA"
    flexproxy.attention(q[:, :, :num_queries], k, v, config=config, when="always")
    ((_, arguments),) = calls
    selection = flexproxy.select(q[:, :, :num_queries], k, config=config)
    assert torch.equal(arguments["block_mask"].kv_indices, selection.block_mask().kv_indices)


def test_options_of_the_caller(calls: list[Call]) -> None:
    for options in ({"num_warps": 4}, {"num_warps": 8}, {"WRITE": [1]}):  # a list is no key, and is passed on
        flexproxy.attention(*qkv(), config=CONFIG, kernel_options=options)
        assert calls[-1][1]["kernel_options"] == options
    flexproxy.attention(*qkv(), config=CONFIG)
    assert calls[-1][1]["kernel_options"] == {}


def test_flash_gets_a_mask_with_membership_where_it_may_be_trivial() -> None:
    flash = (("BACKEND", "FLASH"),)
    assert plan(options=flash).kernel.listed
    assert plan(options=flash, mask_mod=masks.full).kernel.listed
    assert not plan(options=flash, mask_mod=noop_mask).kernel.listed
    assert plan(mask_mod=noop_mask).kernel.listed


def test_gradients_are_planned_where_they_are_recorded(device: str) -> None:
    """With a ``score_mod``, which may capture a parameter, they hang on the mode alone."""
    settings = Settings(CONFIG, None, type(halved), None, False)
    x = qkv(device=device)

    def gradients() -> bool:
        return plan_attention(x, None, None, settings).kernel.gradients

    with torch.no_grad():
        assert not gradients()
    assert gradients()
    with torch.no_grad():
        assert not gradients()


def test_tensors_that_require_gradients_where_none_are_recorded(calls: list[Call]) -> None:
    """The CPU kernel refuses them. A call before, in another mode, changes nothing."""
    x = qkv()
    flexproxy.attention(*x, config=CONFIG, score_mod=halved)
    for tensor in x:
        tensor.requires_grad_()
    with torch.no_grad():
        flexproxy.attention(*x, config=CONFIG, score_mod=halved)
    assert not any(tensor.requires_grad for tensor in calls[-1][0])


# ---------------------------------------------------------------------------------------------- Selection.attention


def test_attention_with_a_selection_makes_lists_once(calls: list[Call]) -> None:
    q, k, v = qkv()
    selection = flexproxy.select(q, k, config=CONFIG, scale=0.5)
    flexproxy.attention(q, k, v, config=CONFIG, scale=0.5)
    for _ in range(2):
        selection.attention(q, k, v)
    (_, theirs), (_, ours), (_, again) = calls
    assert again["block_mask"] is ours["block_mask"]
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(ours["block_mask"], name), getattr(theirs["block_mask"], name))
    assert {name: x for name, x in ours.items() if name != "block_mask"} == {
        name: x for name, x in theirs.items() if name != "block_mask"
    }
    assert ours["scale"] == 0.5
    selection.attention(q + 1, k, v, score_mod=halved, kernel_options={"num_warps": 4})
    assert calls[-1][1]["score_mod"] is halved
    assert calls[-1][1]["kernel_options"] == {"num_warps": 4}


def test_lists_are_kept_for_each_need(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """Membership where FLASH may forget the lists; lists for gradients where they are needed; none in a mode."""
    q, k, v = qkv()
    selection = flexproxy.select(q, k, mask_mod=noop_mask, config=CONFIG)
    places = ["first", "first", None, None]
    monkeypatch.setattr("flexproxy.selection.place_of", lambda device: places.pop(0))
    for _ in range(4):
        selection.attention(q, k, v)
    first, second, *others = (arguments["block_mask"] for _, arguments in calls)
    assert first is second
    assert len({id(block_mask) for block_mask in (first, *others)}) == 3
    places += ["first"] * 2
    selection.attention(q, k, v, kernel_options={"BACKEND": "FLASH"})
    assert calls[-1][1]["block_mask"].mask_mod is not noop_mask
    assert first.mask_mod is noop_mask
    monkeypatch.setattr("flexproxy.sparse.plan.check_attention_options", lambda *_: None)  # a CPU has no gradients
    selection.attention(q, k, v.requires_grad_())
    assert calls[-1][1]["block_mask"].q_indices is not None
    assert not selection.gradients


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_keeps_lists_of_its_own(copied: Callable[[Any], Any], calls: list[Call]) -> None:
    q, k, v = qkv()
    selection = flexproxy.select(q, k, config=CONFIG)
    selection.attention(q, k, v)
    copied(selection).attention(q, k, v)
    first, second = (arguments["block_mask"] for _, arguments in calls)
    assert isinstance(first, BlockMask)
    assert first is not second
    assert torch.equal(first.kv_indices, second.kv_indices)


def test_tensors_that_do_not_fit_a_selection() -> None:
    q, k, v = qkv()
    selection = flexproxy.select(q, k, config=CONFIG)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"q, k: expected B, Hq, Sq, Skv = \(1, 4, 128, 128\), for which"):
            selection.attention(q[:, :, :64], k, v)
        with pytest.raises(ValueError, match="q: expected a tensor on cpu, where the selection is, got one on meta"):
            selection.attention(*(x.to("meta") for x in (q, k, v)))
        with pytest.raises(ValueError, match="v: expected Hkv, Skv"):
            selection.attention(q, k, v[:, :, :64])
        with pytest.raises(TypeError, match="kernel_options: expected a dict"):
            selection.attention(q, k, v, kernel_options=[])  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="score_mod: expected a function"):
            selection.attention(q, k, v, score_mod=1.0)
        with pytest.raises(TypeError, match="return_lse: expected a bool"):
            selection.attention(q, k, v, return_lse=1)  # type: ignore[call-overload]


@pytest.mark.skipif(not cpu_kernel_exists(), reason="this torch's dynamo cannot trace masks")
def test_attention_with_a_selection_in_a_trace() -> None:
    """Made in the trace or before it."""
    q, k, v = qkv()
    selection = flexproxy.select(q, k, config=CONFIG)
    allowed = allowed_pairs(selection, masks.causal, 128, 128, BLOCK)
    ways: tuple[Callable[..., Tensor], ...] = (
        lambda q, k, v: flexproxy.select(q, k, config=CONFIG).attention(q, k, v),
        selection.attention,
    )
    for way in ways:
        torch._dynamo.reset()
        assert_accurate(torch.compile(way, fullgraph=True, backend="eager")(q, k, v), q, k, v, allowed)
    assert selection._kept == {}


@pytest.mark.slow
def test_attention_with_a_selection_is_attention(device: str) -> None:
    skip_unless_flex_compiles(device)
    q, k, v = qkv(200, 2, device)
    real = (torch.arange(200) >= torch.tensor([[0], [70]])).to(device)
    mask_mod = masks.and_masks(masks.causal, masks.padding(real))
    selection = flexproxy.select(q, k, mask_mod=mask_mod, config=CONFIG)
    want = flexproxy.attention(q, k, v, mask_mod=mask_mod, config=CONFIG, when="always")
    for _ in range(2):
        assert torch.equal(selection.attention(q, k, v), want)
    assert_accurate(want, q, k, v, allowed_pairs(selection, mask_mod, 200, 200, BLOCK))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_attention_with_a_selection_in_a_cuda_graph() -> None:
    """Captured once and replayed with new values; what is made in the capture is not kept."""
    q, k, v = (x.bfloat16().repeat(1, 1, 1, 4) for x in qkv(1024, device="cuda"))
    selection = flexproxy.select(q, k, config=ProxyConfig(min_budget=0, gamma=0.6))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        selection.attention(q, k, v)
    torch.cuda.current_stream().wait_stream(side)
    kept = dict(selection._kept)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = selection.attention(q, k, v)
    assert selection._kept == kept
    for seed in range(2):
        q.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.testing.assert_close(out, selection.attention(q, k, v))
    assert len(selection._kept) == 2, "a list of each stream"
