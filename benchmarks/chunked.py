"""Prompts in chunks: a cache with room for all of them, and dense attention by the fastest kernels that torch has.

A chunk's queries are the last of its keys, so its causal mask is aligned at the lower right. For that, transformers'
``sdpa`` makes a mask by tokens, which only torch's slower kernels take, and copies the keys for every query head. These
two make no mask and copy nothing:

- ``in_two_parts``: cuDNN for the keys before the chunk, which every query sees, and cuDNN for the chunk itself, causal
  from the first key on; joined by their log-sum-exps.
- ``lower_right``: FlashAttention-2, which takes the alignment as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import DynamicLayer

TWO_PARTS, LOWER_RIGHT = "sdpa_in_two_parts", "sdpa_lower_right"  # inside transformers


class RoomyLayer(DynamicLayer):
    """The cache of a layer in one buffer, as servers have it: what was there is not copied for each chunk."""

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room, self.length = room, 0
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.buffers:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (key_states, value_states)]
        begin, self.length = self.length, self.length + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin : self.length] = new
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values


def roomy_cache(layers: int, room: int) -> Cache:
    return Cache(layers=[RoomyLayer(room) for _ in range(layers)])


def cudnn_with_lse(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, Sq, D]``, and log-sum-exp ``[B, Hq, Sq, 1]``, fp32."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, is_causal=is_causal, scale=scale
    )
    return out, lse.view(*q.shape[:3], 1)


def in_two_parts(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    before = k.shape[2] - q.shape[2]
    own, own_lse = cudnn_with_lse(q, k[:, :, before:], v[:, :, before:], True, scale)
    if not before:
        return own
    cached, cached_lse = cudnn_with_lse(q, k[:, :, :before], v[:, :, :before], False, scale)
    return _joined()(own, own_lse, cached, cached_lse)


@functools.cache
def _joined() -> Callable[..., Tensor]:
    """Outputs over two sets of keys as that over both, in fp32 inside: compiled, in one pass."""

    def join(own: Tensor, own_lse: Tensor, cached: Tensor, cached_lse: Tensor) -> Tensor:
        return torch.lerp(own.float(), cached.float(), torch.sigmoid(cached_lse - own_lse)).to(own.dtype)

    compiled: Callable[..., Tensor] = torch.compile(join)
    return compiled


def lower_right(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    bias: Any = causal_lower_right(q.shape[2], k.shape[2])
    out: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True)
    return out


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    TWO_PARTS: in_two_parts,
    LOWER_RIGHT: lower_right,
}


def register() -> None:
    """They become attentions of transformers, without a mask: for prompts without padding."""
    for name, attend in ATTENTIONS.items():

        def forward(
            module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, *, scaling: float, attend: Any = attend, **_: Any
        ) -> tuple[Tensor, None]:
            return attend(q, k, v, scaling).transpose(1, 2).contiguous(), None

        AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, lambda **_: None)
