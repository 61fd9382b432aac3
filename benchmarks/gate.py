"""Correctness before any time is taken: a speed-up of a wrong result is none."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

import flexproxy
from benchmarks.baselines import METHODS, to_block_mask
from benchmarks.baselines.blocks import BLOCK_SIZE
from benchmarks.contenders import flex, inputs, kernel_variants
from flexproxy import ProxyConfig, masks, reference
from tests.oracle import Case, check_count, check_rank, check_shares, expect, pooled, recorded_scores

LENGTH = 2000  # ragged: no multiple of a block or a tile
WHOLE = 2048  # whole blocks, for which other kernels are compiled


def check_selection(config: ProxyConfig) -> None:
    """Ranks and counts are those of the specification, by the checks of the test suite."""
    q, k, v = inputs(LENGTH)
    q, k, v = q[:, :8], k[:, :2], v[:, :2]
    config = replace(config, gamma=0.5, min_budget=256)
    case = Case(q, k, v, config, "default", None, [0])
    expected = expect(case, *pooled(case))
    with recorded_scores() as scores:
        selection = flexproxy.select(q, k, config=config)
    try:
        check_rank(selection.rank.cpu(), expected)
        if config.sharing == "rows":
            check_shares(case, selection, scores[0], expected)
        else:
            check_count(selection.count.cpu(), expected, config)
    except AssertionError as error:
        raise SystemExit(f"correctness gate failed: selection with {config}: {error}; nothing was timed") from None


def check_attention(every: bool) -> None:
    """Sparse output is dense attention under the tokens of the selected blocks.

    every: with the mask of ``build``, and with the peers' selections too, not only as ``flexproxy.attention`` does it
        by default.
    """
    for length in (LENGTH, WHOLE):
        q, k, v = inputs(length)
        config = ProxyConfig(density=0.3, min_budget=256)
        blocks = flexproxy.select(q, k, config=config).block_map()
        exact, own_error = _exact(q, k, v, blocks)
        block_mask = flexproxy.build(q, k, config=config)
        for name, variant in kernel_variants().items():
            with variant():
                out = flexproxy.attention(q, k, v, config=config, when="always")
                compare(f"attention, kernel {name!r}", out, exact, own_error)
                if every:
                    out = flex(q, k, v, block_mask, flexproxy.kernel_options(q, k))
                    compare(f"kernel {name!r}", out, exact, own_error)
    if not every:
        return
    for name, method in METHODS.items():
        blocks = method.select(q, k, 0.5)
        exact, own_error = _exact(q, k, v, blocks)
        out = flex(q, k, v, to_block_mask(blocks, WHOLE), flexproxy.kernel_options(q, k))
        compare(name, out, exact, own_error)


def _exact(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> tuple[Tensor, float]:
    """Dense attention over the causal tokens of some blocks ``[1, Hq, N, N]``, in fp64, and SDPA's error in bf16."""
    length = q.shape[2]
    tokens = blocks.repeat_interleave(BLOCK_SIZE, 2)[:, :, :length].repeat_interleave(BLOCK_SIZE, 3)[..., :length]
    allowed = tokens & create_mask(masks.causal, 1, 1, length, length, device=str(q.device))
    exact = reference.attention(q, k, v, allowed, q.shape[-1] ** -0.5)
    own = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    return exact, (own.double() - exact).abs().max().item()


def compare(name: str, out: Tensor, exact: Tensor, own_error: float) -> None:
    """Stop where the error is more than twice own_error, that of SDPA, and a rounding. name: what it is of, or ""."""
    error = (out.double() - exact).abs().max().item()
    if not error <= 2 * own_error + torch.finfo(out.dtype).eps * exact.abs().max().item():
        what = f"{name}: " if name else ""
        raise SystemExit(
            f"correctness gate failed: {what}error {error:.2e}, SDPA's own {own_error:.2e}; nothing more was timed"
        )
