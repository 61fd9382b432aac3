"""A model of transformers whose prefill runs under a method's blocks, with the same sparse kernel for all methods."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from benchmarks.baselines import to_block_mask
from benchmarks.baselines.blocks import BLOCK_SIZE, CHUNK_ELEMENTS, causal_blocks, grouped_logits, widen
from benchmarks.quality.methods import Method, Place
from flexproxy.ops.compat import lse_arguments
from flexproxy.sparse.kernel import run_flex
from flexproxy.sparse.kernel_options import tiles_of

_NAME = "flexproxy_quality"  # what the attention is called inside transformers
_NOT_SUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")  # they change the scores that blocks are chosen by

Density = dict[int, list[list[float]]]
"""Kept blocks / causal blocks of every sequence and head, by layer."""
_FULL = "full_attention"


@contextmanager
def prefill_by(model: Any, method: Method) -> Iterator[Density]:
    """Inside of a ``with`` statement, the model's attention is that of a method; afterwards what it was.

    Layers that do not attend to everything before a token (sliding windows) stay dense. Yields the densities of the
    last forward pass, of the other layers, which dense attention leaves empty.

    Raises:
        ValueError: inside, where the model's attention has what blocks cannot be chosen for, or where there is padding.
    """
    density: Density = {}
    before = model.config._attn_implementation
    if method.select is not None:
        AttentionInterface.register(_NAME, _Attention(method, density, full_layers(model)))
        AttentionMaskInterface.register(_NAME, _mask)
    model.set_attn_implementation("sdpa" if method.select is None else _NAME)
    try:
        yield density
    finally:
        model.set_attn_implementation(before)


def full_layers(model: Any) -> list[int]:
    """Indices of the layers that attend to everything before a token.

    Raises:
        ValueError: there are none.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # transformers' older models: all layers alike
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        kinds = [_FULL if window is None else "sliding_attention"] * config.num_hidden_layers
    found = [layer for layer, kind in enumerate(kinds) if kind == _FULL]
    if not found:
        raise ValueError(
            f"model: expected layers that attend to everything, got {', '.join(sorted(set(kinds)))}; use another model"
        )
    return found


class _Attention:
    """The attention function that transformers calls in every layer."""

    def __init__(self, method: Method, density: Density, layers: Sequence[int]) -> None:
        self.method, self.density, self.layers = method, density, layers

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **others: Any
    ) -> tuple[Tensor, None]:
        layer = module.layer_idx
        if layer not in self.layers:
            dense: tuple[Tensor, None] = AttentionInterface()["sdpa"](
                module, query, key, value, mask, scaling=scaling, **others
            )
            return dense
        for name in _NOT_SUPPORTED:
            if others.get(name) is not None:
                raise ValueError(f"model: expected attention without {name}, got one with it; use another model")
        assert self.method.select is not None
        head_dim = query.shape[3]
        # The baselines' factor is 1 / sqrt(D); whatever the model's differs by goes into the queries.
        query = query if math.isclose(scaling, head_dim**-0.5) else query * (scaling * head_dim**0.5)
        block_map = self.method.select(query, key, Place(layer, self.layers.index(layer), len(self.layers)))
        self.density[layer] = _densities(block_map)
        if self.method.correct is not None:
            out, lse = attention_with_lse(query, key, value, block_map)
            out = self.method.correct(query, key, value, out, lse, block_map)
        else:
            block_mask, arguments = _flex_arguments(query, key, block_map)
            out = cast(Tensor, run_flex(query, key, value, block_mask, arguments))
        return out.transpose(1, 2).contiguous(), None  # [B, S, Hq, D]


def _flex_arguments(q: Tensor, k: Tensor, block_map: Tensor) -> tuple[BlockMask, dict[str, Any]]:
    options = tiles_of(BLOCK_SIZE, q.device.type)
    arguments = {"enable_gqa": q.shape[1] != k.shape[1], "kernel_options": options}
    return to_block_mask(block_map, q.shape[2]), arguments


def _mask(*args: Any, mask_function: Any, attention_mask: Tensor | None = None, **others: Any) -> Tensor | None:
    """The mask function: blocks are causal by themselves, other layers have sdpa's; what would be lost is refused."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("attention_mask: expected sequences without padding, got padding; run them one by one")
    if mask_function is causal_mask_function:
        return None
    mask: Tensor | None = AttentionMaskInterface()["sdpa"](*args, mask_function=mask_function, **others)
    return mask


def _densities(block_map: Tensor) -> list[list[float]]:
    """Of every sequence and head."""
    blocks = block_map.shape[-1]
    kept: list[list[float]] = (block_map.sum((2, 3)).double() / (blocks * (blocks + 1) // 2)).tolist()
    return kept


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention over the kept blocks, and the log-sum-exp of its scores.

    The compiled CPU kernel gives no log-sum-exp: there it is dense arithmetic. Arguments and result as of
    ``dense_with_lse``.
    """
    if not q.is_cuda:
        return dense_with_lse(q, k, v, block_map)
    block_mask, arguments = _flex_arguments(q, k, block_map)
    return cast("tuple[Tensor, Tensor]", run_flex(q, k, v, block_mask, arguments | lse_arguments()))


def dense_with_lse(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention over the kept blocks, and the log-sum-exp of its scores: dense arithmetic, in chunks.

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
