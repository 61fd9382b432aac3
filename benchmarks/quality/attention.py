"""A model of transformers whose prefill runs under a method's blocks, with the same sparse kernel for all methods."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from benchmarks.baselines import mean_correction, to_block_mask
from benchmarks.baselines.blocks import BLOCK_SIZE, CHUNK_ELEMENTS, causal_blocks, grouped_logits, widen
from benchmarks.quality.methods import Method
from flexproxy.sparse.kernel import run_flex
from flexproxy.sparse.kernel_options import tiles_of

_NAME = "flexproxy_quality"  # what the attention is called inside transformers
_NOT_SUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")  # they change the scores that blocks are chosen by

Density = dict[int, list[float]]
"""Kept blocks / causal blocks of every head, by layer."""


@contextmanager
def prefill_by(model: Any, method: Method) -> Iterator[Density]:
    """Inside of a ``with`` statement, the model's attention is that of a method; afterwards what it was.

    Yields the densities of the last forward pass, which dense attention leaves empty.

    Raises:
        ValueError: inside, where the model's attention is not plain causal attention of one sequence.
    """
    density: Density = {}
    before = model.config._attn_implementation
    if method.select is not None:
        AttentionInterface.register(_NAME, _Attention(method, density))
        AttentionMaskInterface.register(_NAME, _no_mask)
    model.set_attn_implementation("sdpa" if method.select is None else _NAME)
    try:
        yield density
    finally:
        model.set_attn_implementation(before)


class _Attention:
    """The attention function that transformers calls in every layer."""

    def __init__(self, method: Method, density: Density) -> None:
        self.method, self.density = method, density

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: None, scaling: float, **others: Any
    ) -> tuple[Tensor, None]:
        for name in _NOT_SUPPORTED:
            if others.get(name) is not None:
                raise ValueError(f"model: expected attention without {name}, got one with it; use another model")
        assert self.method.select is not None
        length, head_dim = query.shape[2:]
        # The baselines' factor is 1 / sqrt(D); whatever the model's differs by goes into the queries.
        query = query if math.isclose(scaling, head_dim**-0.5) else query * (scaling * head_dim**0.5)
        block_map = self.method.select(query, key)
        self.density[module.layer_idx] = _densities(block_map)
        if self.method.corrected:
            out, lse = attention_with_lse(query, key, value, block_map)
            out = mean_correction(query, key, value, out, lse, block_map)
        else:
            options = tiles_of(BLOCK_SIZE, query.device.type)
            arguments = {"enable_gqa": query.shape[1] != key.shape[1], "kernel_options": options}
            out = cast(Tensor, run_flex(query, key, value, to_block_mask(block_map, length), arguments))
        return out.transpose(1, 2).contiguous(), None  # [B, S, Hq, D]


def _no_mask(*_: Any, mask_function: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """The mask function: the blocks are causal by themselves; what would be lost in silence is refused."""
    if mask_function is not causal_mask_function:
        raise ValueError("model: expected causal layers, got a sliding window or another mask; use another model")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("attention_mask: expected one sequence without padding, got padding; run them one by one")


def _densities(block_map: Tensor) -> list[float]:
    blocks = block_map.shape[-1]
    kept: list[float] = (block_map[0].sum((1, 2)).double() / (blocks * (blocks + 1) // 2)).tolist()
    return kept


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention over the kept blocks, and the log-sum-exp of its scores: dense arithmetic, in chunks.

    The compiled CPU kernel gives no log-sum-exp. For quality alone: it takes the time of dense attention.

    Args:
        q: ``[B, Hq, S, D]``.
        k, v: ``[B, Hkv, S, D]``.
        block_map: bool ``[B, Hq, N, N]``, the diagonal among the kept blocks.

    Returns:
        ``[B, Hq, S, D]`` as q, and fp32 or wider ``[B, Hq, S]``.
    """
    batch, heads, length, head_dim = q.shape
    num_blocks = block_map.shape[-1]
    block_map = block_map & causal_blocks(num_blocks, q.device)
    position = torch.arange(length, device=q.device)
    out, lse = torch.empty_like(q), widen(q.new_empty(batch, heads, length))
    step = max(1, CHUNK_ELEMENTS // (batch * heads * length * BLOCK_SIZE))
    for start in range(0, num_blocks, step):
        end = min((start + step) * BLOCK_SIZE, length)  # what comes later is not seen
        rows = slice(start * BLOCK_SIZE, end)
        logits = widen(grouped_logits(q[:, :, rows], k[:, :, :end])).div_(math.sqrt(head_dim))
        kept = block_map[:, :, start : start + step].repeat_interleave(BLOCK_SIZE, 2)[:, :, : logits.shape[2]]
        kept = kept.repeat_interleave(BLOCK_SIZE, 3)[..., :end] & (position[rows, None] >= position[:end])
        maximum = logits.masked_fill_(~kept, -torch.inf).amax(-1, keepdim=True)
        weights = logits.sub_(maximum).exp_()
        total = weights.sum(-1, keepdim=True)
        lse[:, :, rows] = (maximum + total.log())[..., 0]
        summed = (weights.unflatten(1, (k.shape[1], -1)) @ widen(v)[:, :, None, :end]).flatten(1, 2)
        out[:, :, rows] = (summed / total).to(q.dtype)
    return out, lse
