"""The attention function that transformers calls in every layer."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AttentionInterface

from flexproxy import ProxyConfig
from flexproxy.integrations.transformers.masks import BLOCK_SIZE, ForwardMask, forward_mask_of
from flexproxy.integrations.transformers.observing import Call, now, observers_of
from flexproxy.integrations.transformers.settings import is_decoder_attention, local_config, when_of
from flexproxy.pipeline import select_for
from flexproxy.sparse.attention import Built, When, attend, why_dense

# Token pairs up to which a dense layer takes a mask token by token, as it does in transformers.
_MAX_TOKEN_PAIRS = 2048**2
# What changes the scores or the keys, and has no counterpart here.
_NOT_SUPPORTED = ("position_bias", "indices", "block_indices", "head_mask")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: sparse for the prefill of a causal decoder, otherwise dense.

    Dense is what has no BlockMask (see ``forward_mask``): decoding, encoders, cross-attention, a mask of the caller's
    own given token by token; and what a budget would keep whole.

    Args:
        module: the attention module; its settings are those of ``configure``.
        query, key, value: ``[B, Hq, Sq, D]``, ``[B, Hkv, Skv, D]``, ``[B, Hkv, Skv, Dv]``.
        attention_mask: what ``forward_mask`` gave, or the caller.
        scaling: factor of the scores; None is 1 / sqrt(D).
        dropout: must be 0.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        s_aux: attention sinks ``[Hq]``, logits of one more key without a value.
        others: what else transformers passes; for a dense layer, ``sdpa`` gets it.

    Returns:
        ``[B, Sq, Hq, Dv]``, and None: there are no attention weights.

    Raises:
        ValueError: something is asked for that sparse attention does not have; the message says what.
    """
    if others.get("output_attentions"):
        raise ValueError(
            "output_attentions: expected False, for no attention weights are ever formed, got True; use "
            'model.set_attn_implementation("eager") for them'
        )
    arguments = module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, others
    observers = observers_of(module)
    if not observers:
        return _forward(*arguments), None
    call = Call(module, query, key, attention_mask, now(query.device))
    out = _forward(*arguments, call=call)
    call.end = now(query.device)
    for observer in observers:
        observer(call)
    return out, None


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
    others: dict[str, Any],
    call: Call | None = None,
) -> Tensor:
    """``attention_forward``, ``[B, Sq, Hq, Dv]``; call: where it is told what is done and why."""
    if not isinstance(attention_mask, BlockMask):
        why = _why_no_blocks(module, query, attention_mask)
        if query.shape[2] >= BLOCK_SIZE and not torch.compiler.is_compiling():
            _warn_once(why)
        if call is not None:
            call.dense = why
        return _dense(module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, others)
    _check_parallelism()
    config = local_config(module, query.shape[1])
    shared = forward_mask_of(attention_mask)
    when = when_of(module)
    why_all = _why_all_blocks(module, query, key, config, shared, when)
    if call is not None:
        call.config, call.scale, call.dense = config, scaling, why_all
    if why_all is not None:
        plain = softcap is None and s_aux is None and shared is not None and shared.is_causal
        if shared is not None and (plain or query.shape[2] * key.shape[2] <= _MAX_TOKEN_PAIRS):
            tokens = shared.token_mask()
            tokens = tokens if tokens is None else tokens.to(query.device)
            return _dense(module, query, key, value, tokens, scaling, dropout, softcap, s_aux, others)
        config, when = dataclasses.replace(config, gamma=1.0, density=None, max_budget=None), "auto"
    _check(dropout, others)
    block_mask = attention_mask
    if shared is not None and (query.device, config.block_size) != (block_mask.kv_indices.device, BLOCK_SIZE):
        block_mask = shared.block_mask(query.device, config.block_size)
    built = None if call is None else call.note
    out = _flex(query, key, value, block_mask, config, scaling, softcap, _local(s_aux), built, when)
    return out.transpose(1, 2).contiguous()


def _why_no_blocks(module: nn.Module, query: Tensor, mask: Tensor | None) -> str:
    """Why a layer without a mask by blocks is dense."""
    if query.shape[2] < BLOCK_SIZE:
        return f"fewer than {BLOCK_SIZE} new tokens"
    if not is_decoder_attention(module):
        return "encoders, cross-attention and other attention that is not causal run dense, as sdpa runs them"
    return (
        f"a causal layer got {'no mask' if mask is None else 'a mask by tokens'} instead of one that transformers' "
        "mask functions make, and runs dense; pass attention_mask as [B, S], or a BlockMask, for sparse attention"
    )


def _why_all_blocks(
    module: nn.Module, q: Tensor, k: Tensor, config: ProxyConfig, shared: ForwardMask | None, when: When
) -> str | None:
    """Why an estimate would save nothing, by lengths, settings and the mask's window; None where it may save."""
    if not is_decoder_attention(module):
        return "the layer is not causal"
    if when == "always":
        return None
    why = why_dense(q, k, config)
    if why is not None or shared is None or shared.window is None:
        return why
    # The keys of a row of blocks lie within window + block_size - 1 tokens, which may begin anywhere in a block.
    blocks = (shared.window + config.block_size - 3) // config.block_size + 2
    return "min_budget covers the sliding window" if blocks <= config.min_blocks else None


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    config: ProxyConfig,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    built: Built | None,
    when: When,
) -> Tensor:
    """Attention under the selection, ``[B, Hq, Sq, Dv]``; built: as in ``attend``."""
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type == "cpu" and (sinks is not None or gradients):
        # The CPU kernel has neither a log-sum-exp nor gradients.
        if when == "always" or not config.keeps_all:
            selection = select_for(q, k, None, block_mask, config, scale, gradients=False, lists=True)
            block_mask = selection.block_mask()
            if built is not None:
                built(selection)
        batch, heads = block_mask.kv_indices.shape[:2]
        mask = create_mask(block_mask.mask_mod, batch, heads, q.shape[2], k.shape[2], device="cpu")
        return _with_scores(q, k, v, mask, scale, softcap, sinks)
    score_mod = None if softcap is None else _softcap_mod(softcap)
    wants_lse = sinks is not None
    result: Any = attend(q, k, v, None, block_mask, config, scale, score_mod, None, wants_lse, when, built=built)
    return result if sinks is None else _with_sinks(result[0], result[1], sinks)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Output ``[B, Hq, Sq, Dv]`` once sinks have taken their share of every row's probability.

    exp(lse) / (exp(lse) + exp(sink)) is left for the keys; lse: ``[B, Hq, Sq]``.
    """
    share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
    return (out * share[..., None]).to(out.dtype)


def _softcap_mod(softcap: float) -> Any:
    def softcapped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return softcapped


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
    others: dict[str, Any],
) -> Tensor:
    """As transformers' ``sdpa``, ``[B, Sq, Hq, Dv]``; with softcap or sinks, which it lacks, all scores at once."""
    if softcap is None and sinks is None:
        sdpa = AttentionInterface()["sdpa"]
        out: Tensor = sdpa(module, query, key, value, mask, scaling=scaling, dropout=dropout, **others)[0]
        return out
    _check(dropout, others)
    if mask is None and query.shape[2] > 1:  # as sdpa takes it: causal from the first key on
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
    out = _with_scores(query, key, value, mask, scaling, softcap, _local(sinks))
    return out.transpose(1, 2).contiguous()


def _with_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Dense attention ``[B, Hq, Sq, Dv]``, the softmax in fp32; all scores at once.

    mask: bool, or floats to add, ``[b, 1 or Hq, Sq, Skv]``.
    """
    kv_heads, heads_per_kv = k.shape[1], q.shape[1] // k.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    # The query heads of a key head go with the queries, so no key is copied.
    together = q.unflatten(1, (kv_heads, heads_per_kv)).flatten(2, 3)
    scores = (together @ k.transpose(2, 3)).float() * scale
    scores = scores.unflatten(2, (heads_per_kv, -1)).flatten(1, 2)  # [B, Hq, Sq, Skv]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        mask = mask[..., : k.shape[2]]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    maximum = scores.amax(-1, keepdim=True)
    if sinks is not None:
        maximum = torch.maximum(maximum, sinks.float()[:, None, None])
    maximum = maximum.detach().masked_fill(maximum == -torch.inf, 0.0)
    weights = (scores - maximum).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks.float()[:, None, None] - maximum).exp()
    weights = (weights / total.clamp(min=torch.finfo(torch.float32).tiny)).to(v.dtype)
    grouped = weights.unflatten(1, (kv_heads, heads_per_kv)).flatten(2, 3) @ v
    out: Tensor = grouped.unflatten(2, (heads_per_kv, -1)).flatten(1, 2)
    return out


def _local(sinks: Tensor | None) -> Tensor | None:
    """The sinks of this rank's heads, where they are a sharded parameter."""
    to_local = getattr(sinks, "to_local", None)
    return sinks if to_local is None else to_local()


def _check(dropout: float, others: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"dropout: expected 0.0, for flex_attention has none, got {dropout}; use model.eval(), or set "
            "attention_dropout of the model's config to 0"
        )
    for name in _NOT_SUPPORTED:
        if others.get(name) is not None:
            raise ValueError(
                f"{name}: expected None, for there is no sparse attention with it, got a value; use "
                'attn_implementation="sdpa" or "eager" for this model'
            )


def _check_parallelism() -> None:
    """torch's ``context_parallel`` gives a rank a piece of the sequence, and replaces SDPA by one that joins them."""
    if str(F.scaled_dot_product_attention.__module__).startswith("torch.distributed"):
        raise ValueError(
            "context_parallel: expected whole sequences, got pieces, between which only sdpa attends; use tensor "
            'parallelism, or attn_implementation="sdpa"'
        )


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"flexproxy: {message}", stacklevel=2)
