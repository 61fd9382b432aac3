"""Correctness before any time is taken: a speed-up of a wrong result is none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

import flexproxy
from benchmarks.baselines import METHODS, to_block_mask
from benchmarks.contenders import HEAD_DIM, NUM_Q_HEADS, flex, inputs, kernel_variants
from flexproxy import ProxyConfig, masks, reference
from flexproxy.proxy import head_groups, pool_heads
from tests.oracle import Case, check_count, check_rank, expect

LENGTH = 2000  # ragged: no multiple of a block, of a tile or of the stride's window
SCALE = HEAD_DIM**-0.5


def check_selection(num_proxies: int) -> None:
    """Ranks and counts are those of the specification, by the checks of the test suite."""
    q, k, v = inputs(LENGTH)
    q, k, v = q[:, :8], k[:, :2], v[:, :2]
    config = ProxyConfig(num_proxies=num_proxies, gamma=0.5, min_budget=256)
    groups, k_groups = head_groups(num_proxies, None, q.shape[1], k.shape[1])
    case = Case(q, k, v, config, "default", None, [0])
    expected = expect(case, pool_heads(q, groups, config.stride), pool_heads(k, k_groups, config.stride))
    selection = flexproxy.select(q, k, config=config)
    try:
        check_rank(selection.rank.cpu(), expected)
        check_count(selection.count.cpu(), expected, config)
    except AssertionError as error:
        raise SystemExit(
            f"correctness gate failed: selection with P = {num_proxies}: {error}; nothing was timed"
        ) from None


def check_attention() -> None:
    """Sparse output is dense attention under the selection's tokens: with every kernel, and with the peers' blocks."""
    q, k, v = inputs(LENGTH)
    causal = create_mask(masks.causal, 1, 1, LENGTH, LENGTH, device="cuda")
    config = ProxyConfig(density=0.3, min_budget=256)
    blocks = flexproxy.select(q, k, config=config).block_map()
    allowed = _tokens(blocks) & causal
    exact, own_error = _exact(q, k, v, allowed)
    block_mask = flexproxy.build(q, k, config=config)
    for name, options in kernel_variants(q, k).items():
        _compare(f"kernel options {name!r}", flex(q, k, v, block_mask, options), exact, own_error)
    _compare("attention", flexproxy.attention(q, k, v, config=config), exact, own_error)
    for name, method in METHODS.items():
        blocks = method.select(q, k, 0.5)
        exact, own_error = _exact(q, k, v, _tokens(blocks) & causal)
        out = flex(q, k, v, to_block_mask(blocks, LENGTH), flexproxy.kernel_options(q, k))
        _compare(name, out, exact, own_error)


def _tokens(blocks: Tensor) -> Tensor:
    """A map of blocks over tokens: bool ``[1, Hq, S, S]``."""
    return blocks.repeat_interleave(128, 2)[:, :, :LENGTH].repeat_interleave(128, 3)[..., :LENGTH]


def _exact(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> tuple[Tensor, float]:
    """Dense attention in double precision, and the error of SDPA in bf16."""
    per_group = NUM_Q_HEADS // k.shape[1]
    parts = [
        reference.attention(
            q[:, h : h + per_group], k[:, g : g + 1], v[:, g : g + 1], allowed[:, h : h + per_group], SCALE
        )
        for g, h in enumerate(range(0, NUM_Q_HEADS, per_group))
    ]
    exact = torch.cat(parts, 1)
    own = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    return exact, (own.double() - exact).abs().max().item()


def _compare(name: str, out: Tensor, exact: Tensor, own_error: float) -> None:
    error = (out.double() - exact).abs().max().item()
    if not error <= 2 * own_error + torch.finfo(out.dtype).eps * exact.abs().max().item():
        raise SystemExit(
            f"correctness gate failed: {name}: error {error:.2e}, SDPA's own {own_error:.2e}; nothing was timed"
        )
