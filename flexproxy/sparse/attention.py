"""The last stage: sparse attention in one call, and dense attention where sparse cannot pay."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy.checks import check_kernel_options
from flexproxy.config import ProxyConfig
from flexproxy.masks.structure import MaskMod
from flexproxy.ops import compat
from flexproxy.pipeline import check_memory, dense_block_mask, estimate, read_mask
from flexproxy.sparse import inference, rows
from flexproxy.sparse.kernel import NotCompiledError, Result, prepared
from flexproxy.sparse.plan import AttentionPlan, Settings, When, plan_attention


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
    when: When = ...,
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
    when: When = ...,
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
    when: When = "auto",
) -> Result:
    """ProxyAttn in one call: builds the mask, then runs compiled ``flex_attention`` with it.

    On a CPU, where the mask is the default one and queries begin at a block of keys, ``scaled_dot_product_attention``
    of the kept blocks takes its place, which is faster and compiles nothing. In inference under the default mask,
    where ``flexproxy.kernel_options`` picks ``BACKEND="FLASH"``, flash-attn-4 is called directly, which takes the host
    less time.

    Dense where sparse cannot pay: fewer queries than a block (decoding), every row's budget covers all keys, the
    settings keep every block, or the estimate takes longer than what it saves, as on a GPU for short sequences.
    ``why_dense`` says which it will be.

    Args:
        q: queries ``[B, Hq, Sq, D]``, after the position embedding; fp32, fp16 or bf16, any strides.
        k, v: keys and values ``[B, Hkv, Skv, D]``, Sq <= Skv; Hkv divides Hq.
        mask_mod, block_mask, config, scale: as in ``build``.
        score_mod: change of the scores, as in ``flex_attention``. The estimate of the blocks does not see it.
        kernel_options: as in ``flex_attention``; None is ``flexproxy.kernel_options(q, k)``.
        return_lse: also return the log-sum-exp of the scores, fp32 ``[B, Hq, Sq]``; not on a CPU.
        when: "auto", or "always" for sparse attention whatever it costs.

    Returns:
        ``[B, Hq, Sq, D]``, of any strides, or that and the log-sum-exp. Rows without an allowed key are 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
    """
    options = check_kernel_options(kernel_options)
    settings = Settings(config, scale, type(score_mod), options, return_lse, when)
    plan = plan_attention((q, k, v), mask_mod, block_mask, settings)
    if plan.estimate is None:
        return attend_densely(q, k, v, mask_mod, block_mask, plan, score_mod)
    if plan.is_inference and inference.fits(q):
        with contextlib.suppress(NotCompiledError):
            return inference.attend(q, k, v, plan.estimate, plan.kernel)
    check_memory(q, k, plan.estimate)
    mask = read_mask(mask_mod, block_mask, plan.estimate.frame, q.device)
    selection = estimate(q, k, mask, plan.estimate)
    if plan.is_inference and rows.fits(q, k, v, plan.block_size):
        return rows.attend(q, k, v, selection)
    return plan.kernel.run(q, k, v, plan.kernel.mask_of(selection), score_mod, selection.block_mask)


def attend_densely(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_mod: MaskMod | None,
    block_mask: BlockMask | None,
    plan: AttentionPlan,
    score_mod: Any = None,
) -> Result:
    """``attention`` where the plan is dense."""
    if plan.by_sdpa:
        kernel, is_causal = plan.kernel, q.shape[2] > 1
        q, k, v = prepared(q, k, v)
        asks = plan.asks_for_cudnn and torch.backends.cuda.cudnn_sdp_enabled()
        with compat.cudnn_first() if asks else contextlib.nullcontext():
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=is_causal, scale=kernel.scale, enable_gqa=kernel.gqa
            )
    if block_mask is None:
        block_mask = dense_block_mask(q, k, mask_mod, plan.block_size, plan.kernel.gradients)
    return plan.kernel.run(q, k, v, block_mask, score_mod)
