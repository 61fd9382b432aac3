"""Masks that differ between the heads of a proxy, and BlockMasks whose lists are stricter than their functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import flexproxy
from flexproxy import ProxyConfig, masks, stats
from flexproxy.masks.structure import MaskMod
from tests.accuracy import skip_unless_flex_compiles


def windows(*sizes: int) -> MaskMod:
    size = torch.tensor(sizes)
    return lambda b, h, q, k: (q >= k) & (q - k < size[h])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_head_that_sees_itself_alone(compiled: bool) -> None:
    """The second head of the proxy sees one key, its own: its output is v, whatever the first head ranks."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 1024, 32, generator=generator) for heads in (2, 1, 1))
    mask_mod, config = windows(1024, 1), ProxyConfig(num_proxies=1, min_budget=0, local_blocks=2)
    if compiled:
        skip_unless_flex_compiles("cpu")
        out = flexproxy.attention(q, k, v, mask_mod=mask_mod, config=config, when="always")
    else:
        out = flex_attention(
            q, k, v, block_mask=flexproxy.build(q, k, mask_mod=mask_mod, config=config), enable_gqa=True
        )
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out[:, 1:], v)


def test_heads_of_a_proxy_keep_their_budgets() -> None:
    """Every row of a head with the narrower window keeps ``min_budget``, or all that the head may see."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, heads, 8192, 16, generator=generator) for heads in (2, 1))
    selection = flexproxy.select(q, k, mask_mod=windows(8192, 2048))
    kept, admissible = selection.block_map().sum(-1), selection.admissible.expand(1, 2, -1, -1).sum(-1)
    assert torch.equal(kept, torch.minimum(selection.count, admissible))
    assert bool((kept >= admissible.clamp(max=16)).all())


def test_lists_are_part_of_the_mask() -> None:
    """Given by lists, or by a function that looks them up, a mask is the same: in ranks, counts and masses."""
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, heads, 4096, 32, generator=generator) for heads in (2, 1))
    k[:, :, :128] += 2 * q[:, :1, -128:].mean(2, keepdim=True)  # a sink, which the lists leave out
    number = 32
    blocks = torch.ones(number, number).tril().bool()
    blocks[2:, 0] = False
    count = blocks.sum(-1, dtype=torch.int32)[None, None]
    index = blocks.int().argsort(dim=-1, descending=True, stable=True).int()[None, None]
    given = BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=128, mask_mod=masks.causal)
    config = ProxyConfig(gamma=0.9, min_budget=0)
    by_function = masks.and_masks(masks.causal, lambda b, h, q, k: blocks[q // 128, k // 128])
    wanted = flexproxy.select(q, k, mask_mod=by_function, config=config)
    got = flexproxy.select(q, k, block_mask=given, config=config)
    assert torch.equal(got.count, wanted.count)
    assert torch.equal(got.block_map(), wanted.block_map())
    rows = torch.arange(3968, 4096, 16)
    mass = stats.recovered_mass(q, k, got, rows=rows)
    torch.testing.assert_close(mass, stats.recovered_mass(q, k, wanted, rows=rows))
    assert float(mass.min()) > 0.9
