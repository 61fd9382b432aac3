"""The queries, keys and masks of a model's layers, one layer at a time, while it reads some texts densely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy import ProxyConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flexproxy.integrations.transformers.observing import Call


class Layer(NamedTuple):
    """What one layer attends with.

    q, k: ``[B, Hq, S, D]`` and ``[B, Hkv, S, D]``, after the position embedding.
    block_mask: the layer's own mask, ``[B, 1, S, S]``.
    scale: factor of the scores; None is 1 / sqrt(D).
    """

    q: Tensor
    k: Tensor
    block_mask: BlockMask
    scale: float | None


Look: TypeAlias = Callable[[int, Layer], None]
"""Called with the index of a layer and what it attends with, which is freed after the call."""


@torch.no_grad()
def read(model: PreTrainedModel, tokens: Tensor, block_size: int, look: Look) -> None:
    """Let a model read tokens ``[B, S]`` with dense attention, and look at each layer with causal self-attention.

    Only this model is observed, and afterwards it is as it was. The head that gives logits does not run.

    Args:
        block_size: of the masks that are given.
    """
    from flexproxy.integrations.transformers.observing import observe
    from flexproxy.integrations.transformers.settings import configuration, configure

    def see(call: Call) -> None:
        if isinstance(call.mask, BlockMask):
            block_mask = _in_blocks_of(call.mask, block_size, call.query.device)
            look(call.layer, Layer(call.query, call.key, block_mask, call.scale))

    before = configuration(model)
    configure(model, ProxyConfig(gamma=1.0))
    try:
        with _flexproxy_attention(model), observe(model, see):
            model.base_model(input_ids=tokens.to(model.device), use_cache=False)
    finally:
        configure(model, before)


@contextmanager
def _flexproxy_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use flexproxy's attention in a model and in the models inside of it."""
    from transformers import PreTrainedModel

    from flexproxy.integrations.transformers import NAME

    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):  # outer ones first: they set the inner
            config._attn_implementation = implementation


def _in_blocks_of(block_mask: BlockMask, block_size: int, device: torch.device) -> BlockMask:
    """The mask of a forward pass, in blocks of a size."""
    from flexproxy.integrations.transformers.masks import forward_mask_of

    if (block_mask.kv_indices.device, block_mask.BLOCK_SIZE) == (device, (block_size, block_size)):
        return block_mask
    shared = forward_mask_of(block_mask)
    if shared is None:  # of the model's own making
        raise ValueError(
            f"block_size: expected {block_mask.BLOCK_SIZE[0]}, as in the mask that this model makes itself, got "
            f"{block_size}; use ProxyConfig(block_size={block_mask.BLOCK_SIZE[0]})"
        )
    return shared.block_mask(device, block_size)
