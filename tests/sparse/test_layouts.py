"""Queries, keys and values that lie anywhere in memory: kernels of others fail there, or return other numbers."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import flexproxy
from flexproxy import ProxyConfig, masks
from flexproxy.ops import compat
from flexproxy.sparse import attention as sparse_attention
from flexproxy.sparse import kernel as sparse_kernel
from flexproxy.sparse.plan import plan_attention
from tests.layouts import LOADABLE, OTHERS, Layout, expanded, part, tokens_first
from tests.sparse.test_inference import assert_near, qkv


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_copied(dtype: torch.dtype) -> None:
    """Not what can be loaded as it is, nor rows of a length that no copy helps."""
    x = torch.randn(2, 4, 9, 64).to(dtype)
    for layout in [*LOADABLE, expanded]:
        taken = layout(x)
        assert compat.loadable(taken) is taken
    for layout in OTHERS:
        copy = compat.loadable(layout(x))
        assert torch.equal(copy, x)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
    assert compat.loadable(expanded(x), expanded=False).is_contiguous()
    rows_of_7 = x[..., :7].contiguous()
    assert compat.loadable(rows_of_7) is rows_of_7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [part, expanded, *OTHERS])
def test_any_layout_on_a_cpu(layout: Layout, dtype: torch.dtype) -> None:
    config = ProxyConfig(density=0.5, block_size=64, min_budget=64)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 512, 32, generator=rng).to(dtype) for heads in (4, 2, 2))
    for x in ((layout(q), layout(k), layout(v)), (layout(q), k, v), (q, layout(k), v), (q, k, layout(v))):
        out = flexproxy.attention(*x, config=config, when="always")
        wanted = flexproxy.attention(*(y.contiguous() for y in x), config=config, when="always")
        torch.testing.assert_close(out, wanted)


def test_dense_and_compiled_attention_prepare_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is seen by what the kernels get; copies are for a GPU alone."""
    q, k, v = (torch.randn(1, heads, 128, 16) for heads in (4, 2, 2))
    zeros = torch.zeros_like(v)
    for module in (sparse_attention, sparse_kernel):
        monkeypatch.setattr(module, "prepared", lambda q, k, v, options=None: (q, k, zeros))
    monkeypatch.setattr(sparse_kernel, "run_compiled", lambda q, k, v, **_: v)
    assert not flexproxy.attention(q, k, v, config=ProxyConfig(gamma=1.0)).any()
    assert not flexproxy.attention(q, k, v, mask_mod=masks.causal, when="always").any()


def test_where_there_is_an_address() -> None:
    """Modes that only watch get the tensors themselves."""
    x, seen = torch.zeros(2, 3), []

    def note(y: Tensor) -> Tensor:
        seen.append(compat.has_address(y))
        return y

    with FlopCounterMode(display=False):
        note(x)
    note(torch.nn.Parameter(x))
    with FakeTensorMode() as mode:
        note(mode.from_tensor(x))
    torch.vmap(note)(x)
    torch.func.grad(lambda y: note(y).sum())(x)
    assert seen == [True, True, False, False, False]


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["dense", "sparse", "with the log-sum-exp"])
@pytest.mark.parametrize("package", [True, False])
@pytest.mark.parametrize("layout", [part, expanded, *OTHERS])
@pytest.mark.parametrize("shape", ["long", "short"])
def test_any_layout(shape: str, layout: Layout, package: bool, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all, of the keys, and of the queries, which replays; other values each time. With flash-attn-4 and without."""
    if not package:
        monkeypatch.setattr(compat, "flash_backend_exists", lambda: False)
    config = ProxyConfig(gamma=1.0) if how == "dense" else ProxyConfig(density=0.3, min_budget=128)
    arguments: dict[str, Any] = {"config": config, "when": "auto" if how == "dense" else "always"}
    with mock.patch.dict(plan_attention.plans, clear=True):
        usual = tokens_first  # of qkv
        for seed, (of_q, of_k, of_v) in enumerate(((layout,) * 3, (usual, layout, usual), (layout, usual, usual))):
            q, k, v = qkv(shape, seed)
            x = of_q(q), of_k(k), of_v(v)
            if how == "with the log-sum-exp":
                out = flexproxy.attention(*x, **arguments, return_lse=True)[0]
            else:
                out = flexproxy.attention(*x, **arguments)
            assert_near(out, x, config)
