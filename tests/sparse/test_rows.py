"""Inference on a CPU: gathered blocks give what dense attention under the selection gives, and compile nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flexproxy
from flexproxy import ProxyConfig, masks
from flexproxy.sparse import kernel, rows
from tests.accuracy import allowed_pairs, assert_accurate

# Batch, query heads, key heads, queries, keys, head dimension; dtype; settings.
CASES: dict[str, tuple[tuple[int, int, int, int, int, int], torch.dtype, dict[str, Any]]] = {
    "counts differ": ((1, 8, 2, 1024, 1024, 32), torch.float32, {"gamma": 0.5, "min_budget": 32}),
    "one proxy, a ragged batch": ((2, 4, 2, 700, 700, 64), torch.float32, {"density": 0.4, "num_proxies": 1}),
    "proxies within a key head, a chunk": ((1, 4, 1, 200, 712, 80), torch.bfloat16, {"gamma": 0.6, "num_proxies": 4}),
    "groups across key heads": ((1, 4, 2, 500, 500, 64), torch.float16, {"gamma": 0.6, "groups": [1, 0, 0, 1]}),
    "nothing forced": ((1, 2, 2, 500, 500, 16), torch.float32, {"gamma": 0.3, "sink_blocks": 0, "local_blocks": 1}),
    "two dense rows": ((1, 2, 1, 640, 640, 32), torch.float32, {"density": 0.2, "dense_last_blocks": 2}),
    "less than a block": ((1, 2, 1, 40, 168, 32), torch.float32, {"gamma": 0.5}),
}


def qkv(shape: tuple[int, int, int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_q_heads, num_kv_heads, num_queries, num_keys, dim = shape
    generator = torch.Generator().manual_seed(num_keys)
    # Heads of different sharpness, so that their budgets differ; tokens before heads, as models have them.
    sharp = torch.linspace(0.5, 4.0, num_q_heads)[:, None]
    q = sharp * torch.randn(batch, num_queries, num_q_heads, dim, generator=generator)
    k, v = torch.randn(2, batch, num_keys, num_kv_heads, dim, generator=generator)
    return q.transpose(1, 2).to(dtype), k.transpose(1, 2).to(dtype), v.transpose(1, 2).to(dtype)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """``flex_attention`` is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("flex_attention was called")

    monkeypatch.setattr(kernel, "run_compiled", refuse)


@pytest.mark.parametrize("name", CASES)
def test_output_is_dense_attention_under_the_selection(
    name: str, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in pieces of few keys, and where the blocks of one row are more than are gathered at once."""
    shape, dtype, settings = CASES[name]
    config = ProxyConfig(**{"block_size": 32, "min_budget": 64} | settings)
    q, k, v = qkv(shape, dtype)
    selection = flexproxy.select(q, k, config=config)
    causal = masks.shift(masks.causal, k.shape[2] - q.shape[2])
    allowed = allowed_pairs(selection, causal, *selection.lengths, config.block_size)
    out = flexproxy.attention(q, k, v, config=config, when="always")
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert_accurate(out, q, k, v, allowed, selection.scale)
    monkeypatch.setattr(rows, "MAX_KEYS", 96)
    monkeypatch.setattr(rows, "MAX_GATHERED", 3 * 32 * shape[5])
    assert_accurate(rows.attend(q, k, v, selection), q, k, v, allowed, selection.scale)
    if name == "counts differ":
        assert len(set(selection.count[0, :4, -2].tolist())) > 2


def test_scale_and_dropped_keys(uncompiled: None) -> None:
    """The scale is the caller's; a key that no head keeps may hold anything."""
    q, k, v = qkv((1, 2, 1, 512, 512, 32), torch.float32)
    config = ProxyConfig(block_size=32, min_budget=64, density=0.3, dense_last_blocks=0)
    selection = flexproxy.select(q, k, config=config, scale=0.3)
    wanted = flexproxy.attention(q, k, v, config=config, scale=0.3, when="always")
    other = rows.attend(q, k, v, selection)
    assert torch.equal(wanted, other)
    never = ~selection.block_map()[0, :, 10].any(0)  # of the queries of one row of blocks
    blocks = never.nonzero()[:, 0]
    assert len(blocks) > 2
    k, v = k.clone(), v.clone()
    k.unflatten(2, (16, 32))[:, :, blocks] = torch.nan
    v.unflatten(2, (16, 32))[:, :, blocks] = torch.nan
    assert torch.equal(rows.attend(q, k, v, selection)[:, :, 320:352], wanted[:, :, 320:352])


def test_what_it_leaves_to_flex_attention() -> None:
    q, k, v = qkv((1, 2, 1, 64, 96, 16), torch.float32)
    assert rows.fits(q, k, v, 32)
    assert not rows.fits(q, k[:, :, 1:], v[:, :, 1:], 32)
    assert not rows.fits(q, k, v[..., 1:], 32)
    assert not rows.fits(q.to("meta"), k.to("meta"), v.to("meta"), 32)
