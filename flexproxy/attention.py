"""The last stage: sparse attention in one call, and dense attention where sparse cannot pay."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flexproxy import _compat
from flexproxy._checks import (
    check_attention_options,
    check_config,
    check_masks,
    check_queries_and_keys,
    check_scale,
    check_values,
)
from flexproxy.config import ProxyConfig
from flexproxy.kernel_options import fit_to_blocks
from flexproxy.kernel_options import kernel_options as best_kernel_options
from flexproxy.masks import MaskMod
from flexproxy.pipeline import dense_block_mask, select_for


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask_mod: MaskMod | None = ...,
    block_mask: BlockMask | None = ...,
    config: ProxyConfig | None = ...,
    scale: float | None = ...,
    score_mod: Any = ...,
    kernel_options: dict[str, Any] | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask_mod: MaskMod | None = ...,
    block_mask: BlockMask | None = ...,
    config: ProxyConfig | None = ...,
    scale: float | None = ...,
    score_mod: Any = ...,
    kernel_options: dict[str, Any] | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
    config: ProxyConfig | None = None,
    scale: float | None = None,
    score_mod: Any = None,
    kernel_options: dict[str, Any] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """ProxyAttn in one call: builds the mask, then runs compiled ``flex_attention`` with it.

    Dense where sparse cannot pay: fewer queries than a block (decoding), every row's budget covers all keys, or the
    settings keep every block.

    Args:
        q: queries ``[B, Hq, Sq, D]``, after the position embedding; fp32, fp16 or bf16, any strides.
        k, v: keys and values ``[B, Hkv, Skv, D]``, Sq <= Skv; Hkv divides Hq.
        mask_mod, block_mask, config, scale: as in ``build``.
        score_mod: change of the scores, as in ``flex_attention``. The estimate of the blocks does not see it.
        kernel_options: as in ``flex_attention``; None is ``flexproxy.kernel_options(q, k)``.
        return_lse: also return the log-sum-exp of the scores, fp32 ``[B, Hq, Sq]``; not on a CPU.

    Returns:
        ``[B, Hq, Sq, D]``, or that and the log-sum-exp. Rows without an allowed key are 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
    """
    config = check_config(config)
    check_queries_and_keys(q, k)
    check_values(v, q, k)
    check_masks(mask_mod, block_mask, q, k, config.block_size)
    check_attention_options(q, k, v, score_mod, kernel_options, return_lse)
    scale = check_scale(scale, q.shape[3])
    num_queries, num_keys = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    # A score_mod may capture a parameter that requires gradients, where q, k and v do not.
    gradients = v.requires_grad or score_mod is not None
    if not torch.is_grad_enabled():  # the CPU kernel refuses tensors that could require gradients
        q, k, v = q.detach(), k.detach(), v.detach()

    if _dense_pays(num_queries, num_keys, config):
        no_mask_needed = num_queries in (1, num_keys)
        if mask_mod is None and block_mask is None and score_mod is None and not return_lse and no_mask_needed:
            return F.scaled_dot_product_attention(q, k, v, is_causal=num_queries > 1, scale=scale, enable_gqa=gqa)
        if block_mask is None:
            needs_gradients = torch.is_grad_enabled() and (gradients or q.requires_grad or k.requires_grad)
            block_mask = dense_block_mask(q, k, mask_mod, config.block_size, needs_gradients)
    else:
        block_mask = select_for(q, k, mask_mod, block_mask, config, scale, gradients).block_mask()

    options = best_kernel_options(q, k) if kernel_options is None else kernel_options
    arguments: dict[str, Any] = {
        "score_mod": score_mod,
        "block_mask": block_mask,
        "scale": scale,
        "enable_gqa": gqa,
        "kernel_options": fit_to_blocks(options, config.block_size, q.device.type),
    }
    if return_lse:
        arguments |= _compat.lse_arguments()
    if torch.compiler.is_compiling():
        result = flex_attention(q, k, v, **arguments)
    else:
        with _compat.many_lengths():
            result = _compat.compiled_flex_attention(q.device.type)(q, k, v, **arguments)
    return (result[0], _compat.lse_of(result[1])) if return_lse else result


def _dense_pays(num_queries: int, num_keys: int, config: ProxyConfig) -> bool:
    """Whether the estimate could save nothing: it reads all keys for a block of queries, and needs blocks to drop."""
    return num_queries < config.block_size or num_keys <= config.min_blocks * config.block_size or config.keeps_all
