"""What the layers of a model of transformers attend with, one layer at a time, while it reads some texts densely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from flexproxy import ProxyConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
"""Called with the index of a layer, and what it attends with, which lives as long as the call."""


@torch.no_grad()
def read(model: PreTrainedModel, tokens: Tensor, block_size: int, look: Look) -> None:
    """Let a model read tokens ``[B, S]`` with dense attention, and look at each layer with causal self-attention.

    The model is then as it was. The head that gives logits does not run.

    Args:
        block_size: of the masks that are given.
    """
    with _observed(model, block_size, look):
        model.base_model(input_ids=tokens.to(model.device), use_cache=False)


@contextmanager
def _observed(model: PreTrainedModel, block_size: int, look: Look) -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from flexproxy.integrations.transformers import NAME, configuration, configure
    from flexproxy.integrations.transformers.attention import attention_forward
    from flexproxy.integrations.transformers.settings import all_modules, attention_layers

    layers = attention_layers(model)
    observed = {id(module) for module in all_modules(layers)}

    def observe(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **others: Any
    ) -> tuple[Tensor, None]:
        if id(module) in observed and isinstance(attention_mask, BlockMask):
            block_mask = _in_blocks_of(attention_mask, block_size, query.device)
            look(int(module.layer_idx), Layer(query, key, block_mask, others.get("scaling")))  # type: ignore[arg-type]
        return attention_forward(module, query, key, value, attention_mask, **others)

    before = configuration(model)
    configure(model, ProxyConfig(gamma=1.0))
    try:
        # Of this mapping alone, in front of what is registered: another function cannot be taken out again.
        ALL_ATTENTION_FUNCTIONS[NAME] = observe
        with _implementation(model, NAME):
            yield
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop(NAME, None)
        configure(model, before)


@contextmanager
def _implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Set the attention of a model and of the models in it, inside."""
    from transformers import PreTrainedModel

    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
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
