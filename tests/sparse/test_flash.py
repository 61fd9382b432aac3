"""flash-attn-4 called directly: what it is asked for, on a CPU, and what comes back, where it is installed."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flexproxy
from flexproxy import ProxyConfig
from flexproxy.ops import compat
from flexproxy.sparse import flash, inference
from flexproxy.stages.lists import block_lists
from tests.layouts import LOADABLE, OTHERS, Layout, expanded, heads_first, odd, part
from tests.sparse.test_inference import assert_near, qkv

BLOCK = 32


def dense_from_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    causal: bool = False,
    mask_mod: Any = None,
    mask_block_cnt: Tensor,
    mask_block_idx: Tensor,
    full_block_cnt: Tensor,
    full_block_idx: Tensor,
    block_size: tuple[int, int],
) -> tuple[Tensor, None]:
    """What flash-attn-4 computes, in its layout ``[B, S, H, D]``; one of the two ways to say causal must be given."""
    assert causal != (mask_mod is not None)
    for x in (q, k, v):
        *others, last = x.stride()
        assert (x.data_ptr() % 16, last) == (0, 1)
        assert all(stride * x.element_size() % 16 == 0 for stride in others)
    num_queries, num_keys = q.shape[1], k.shape[1]
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    allowed = torch.zeros(*full_block_idx.shape[:2], num_queries, num_keys, dtype=torch.bool)
    for count, index, mask in ((mask_block_cnt, mask_block_idx, seen), (full_block_cnt, full_block_idx, None)):
        for b, h, i in torch.cartesian_prod(*map(torch.arange, count.shape)).tolist():
            for j in index[b, h, i, : count[b, h, i]].tolist():
                rows, columns = slice(i * block_size[0], (i + 1) * block_size[0]), slice(j * BLOCK, (j + 1) * BLOCK)
                allowed[b, h, rows, columns] = True if mask is None else mask[rows, columns]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2), None


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """flash-attn-4, as if it were installed."""
    modules: dict[str, dict[str, Any]] = {
        "cutlass": {"cute": types.SimpleNamespace(jit=lambda function: function)},
        "flash_attn": {},
        "flash_attn.cute": {"flash_attn_func": dense_from_lists, "utils": None},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(compat, "flash_backend_exists", lambda: True)
    monkeypatch.delitem(sys.modules, "flexproxy.sparse.flash_kernels", raising=False)
    kept = compat.flash_takes_lists, flash._kernels
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()
    sys.modules.pop("flexproxy.sparse.flash_kernels", None)


@pytest.mark.parametrize("longest_first", [False, True])
@pytest.mark.parametrize("layout", [*LOADABLE, *OTHERS])
def test_the_package_gets_lists_and_layouts_that_it_takes(layout: Layout, longest_first: bool, package: None) -> None:
    rng = torch.Generator().manual_seed(0)
    num_queries, num_keys = 70, 130

    def normal(heads: int, length: int) -> Tensor:
        return layout(torch.randn(2, heads, length, 16, generator=rng))

    q, k, v = normal(4, num_queries), normal(2, num_keys), normal(2, num_keys)
    assert flash.fits({"BACKEND": "FLASH"})
    selection = flexproxy.select(q, k, config=ProxyConfig(density=0.5, min_budget=BLOCK, block_size=BLOCK))
    lists = block_lists(selection.block_map(), selection.full)
    q, k, v = compat.loadable(q), compat.loadable(k), compat.loadable(v)
    out = flash.attend(q, k, v, lists, BLOCK, 0.3, longest_first)
    positions = torch.arange(num_queries)[:, None] + num_keys - num_queries
    kept = selection.block_map().repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[..., :num_queries, :num_keys]
    wanted = F.scaled_dot_product_attention(
        q, k, v, attn_mask=kept & (positions >= torch.arange(num_keys)), scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out, wanted)


def test_what_it_is_asked_for(package: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what has another kernel's options, nor of a version that takes no lists."""
    assert flash.fits({"BACKEND": "FLASH"})
    assert not flash.fits({})
    compat.flash_takes_lists.cache_clear()
    monkeypatch.setattr(sys.modules["flash_attn.cute"], "flash_attn_func", lambda q, k, v, causal=False: None)
    assert not flash.fits({"BACKEND": "FLASH"})


def test_looking_for_it_imports_no_compiler() -> None:
    look = "import sys, flexproxy.ops.compat as compat; compat.flash_backend_exists()"
    program = f"{look}; print('torch._inductor.kernel' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


@pytest.mark.gpu
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("shape", ["long", "ragged, a batch", "a chunk"])
def test_every_call_by_flash_is_right(shape: str, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the last rows among the others, and apart; keys that are a part of a larger tensor, and expanded ones."""
    if not (compat.is_hopper(torch.device("cuda", 0)) and compat.flash_takes_lists()):
        pytest.skip("needs a Hopper GPU and flash-attn-4")
    monkeypatch.setattr(inference, "MIN_APART_OF_FLASH", 32 if apart else 1000)
    calls: list[bool] = []
    attend = flash.attend

    def noted(*args: Any) -> Tensor:
        calls.append(args[-1])
        return attend(*args)

    monkeypatch.setattr(flash, "attend", noted)
    config = ProxyConfig(density=0.3, min_budget=128)
    for seed in range(3):
        q, k, v = qkv(shape, seed)
        for layout in (heads_first, part, odd, expanded):
            x = q, layout(k), v
            assert_near(flexproxy.attention(*x, config=config, when="always"), x, config)
    assert calls == [not apart] * 12
