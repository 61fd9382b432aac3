"""The attention function that transformers calls in every layer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AttentionInterface

from flexproxy import ProxyConfig, Selection
from flexproxy.checks import check_selection
from flexproxy.integrations.transformers.masks import BLOCK_SIZE, ForwardMask, forward_mask_of
from flexproxy.integrations.transformers.observing import Call, now, observers_of, refuse_a_trace
from flexproxy.integrations.transformers.settings import is_decoder_attention, local_config, sharing_of, when_of
from flexproxy.ops.cache import place_of
from flexproxy.pipeline import PreparedMask, check_memory, estimate, read_mask
from flexproxy.plan import Frame, Plan, plan_estimate
from flexproxy.selection import mask_for
from flexproxy.sparse import inference, rows
from flexproxy.sparse.attention import attend_densely, attention
from flexproxy.sparse.kernel import NotCompiledError
from flexproxy.sparse.plan import Settings, When, plan_attention, reason_to_be_dense

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
    *,
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
    inputs = _Inputs(module, query, key, value, scaling, dropout, softcap, s_aux, others)
    observers = observers_of(module)
    if not observers:
        return _forward(inputs, attention_mask), None
    call = Call(module, query, key, attention_mask, now(query.device))
    out = _forward(inputs, attention_mask, call)
    call.end = now(query.device)
    for observer in observers:
        observer(call)
    return out, None


class _Inputs(NamedTuple):
    """What a layer attends with, besides its mask: as in ``attention_forward``."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    dropout: float
    softcap: float | None
    sinks: Tensor | None
    others: dict[str, Any]


def _forward(x: _Inputs, mask: Tensor | BlockMask | None, call: Call | None = None) -> Tensor:
    """``attention_forward``, ``[B, Sq, Hq, Dv]``; call: where it is told what is done and why."""
    if not isinstance(mask, BlockMask):
        why = _why_no_blocks(x, mask)
        if x.q.shape[2] >= BLOCK_SIZE and not torch.compiler.is_compiling():
            _warn_once(why)
        if call is not None:
            call.dense = why
        return _dense(x, mask)
    _check_parallelism()
    config, when = local_config(x.module, x.q.shape[1]), when_of(x.module)
    shared = forward_mask_of(mask)
    why_all = _why_all_blocks(x, config, shared, when)
    if call is not None:
        call.config, call.scale, call.dense = config, x.scale, why_all
    if why_all is not None:
        plain = x.softcap is None and x.sinks is None and shared is not None and shared.is_causal
        if shared is not None and (plain or x.q.shape[2] * x.k.shape[2] <= _MAX_TOKEN_PAIRS):
            tokens = shared.token_mask()
            return _dense(x, tokens if tokens is None else tokens.to(x.q.device))
        config, when = dataclasses.replace(config, gamma=1.0, density=None, max_budget=None), "auto"
    _check(x)
    if shared is not None and (x.q.device, config.block_size) != (mask.kv_indices.device, BLOCK_SIZE):
        mask = shared.block_mask(x.q.device, config.block_size)
    owned = shared is not None and not torch.compiler.is_compiling()
    shares = why_all is None and sharing_of(x.module) is not None
    plain = owned and x.softcap is None and x.sinks is None
    is_default = plain and shared is not None and shared.is_default  # attention has a faster way for it
    by_default = is_default and x.q.is_cuda and call is None
    if by_default and not shares:
        return attention(x.q, x.k, x.v, config=config, scale=x.scale, when=when).transpose(1, 2).contiguous()
    kept = vars(mask).setdefault("flexproxy_prepared", {}) if owned else {}
    if shares:
        if torch.compiler.is_compiling():
            refuse_a_trace("whose trace keeps no selection for layers to share", "configure it without share")
        # With the mask of the forward pass, which stays where accelerate copies its blocks for every layer.
        kept["selections"] = vars(mask if shared is None else shared).setdefault("flexproxy_selections", {})
        by_lists = _by_lists(x, kept["selections"], config, when) if by_default else None
        if by_lists is not None:
            return by_lists.transpose(1, 2).contiguous()
    out = _by_blocks(x._replace(sinks=_local(x.sinks)), mask, kept, config, when, call, is_default)
    return out.transpose(1, 2).contiguous()


def _why_no_blocks(x: _Inputs, mask: Tensor | None) -> str:
    """Why a layer without a mask by blocks is dense."""
    if x.q.shape[2] < BLOCK_SIZE:
        return f"fewer than {BLOCK_SIZE} new tokens"
    if not is_decoder_attention(x.module):
        return "encoders, cross-attention and other attention that is not causal run dense, as sdpa runs them"
    return (
        f"a causal layer got {'no mask' if mask is None else 'a mask by tokens'} instead of one that transformers' "
        "mask functions make, and runs dense; pass attention_mask as [B, S], or a BlockMask, for sparse attention"
    )


def _why_all_blocks(x: _Inputs, config: ProxyConfig, shared: ForwardMask | None, when: When) -> str | None:
    """Why an estimate would save nothing, by lengths, settings and the mask's window; None where it may save."""
    if not is_decoder_attention(x.module):
        return "the layer is not causal"
    if when == "always":
        return None
    why = reason_to_be_dense(x.q, x.k, config)
    if why is not None or shared is None or shared.window is None:
        return why
    # The keys of a row of blocks lie within window + block_size - 1 tokens, which may begin anywhere in a block.
    blocks = (shared.window + config.block_size - 3) // config.block_size + 2
    return "min_budget covers the sliding window" if blocks <= config.min_blocks else None


def _by_lists(x: _Inputs, lists: dict[Any, Any], config: ProxyConfig, when: When) -> Tensor | None:
    """Attention under the default mask by the lists of the layers that share; None where only ``_by_blocks`` can."""
    settings = Settings(config, x.scale, type(None), None, False, when)
    plan, sharing = plan_attention((x.q, x.k, x.v), None, None, settings), sharing_of(x.module)
    # What is run again for its gradients goes the other way, as must all layers that share with it.
    trains = x.module.training or torch.is_grad_enabled()
    if trains or sharing is None or plan.estimate is None or not plan.is_inference or not inference.fits(x.q):
        return None
    key = sharing.source, plan.estimate.frame, x.q.device
    if sharing.source == x.module.layer_idx:
        lists[key] = []
    elif not lists.get(key):
        return None
    out = None
    with contextlib.suppress(NotCompiledError):
        out = inference.attend(x.q, x.k, x.v, plan.estimate, plan.kernel, lists[key])
    if sharing.last:
        del lists[key]
    return out


def _by_blocks(
    x: _Inputs,
    block_mask: BlockMask,
    kept: dict[Any, Any],
    config: ProxyConfig,
    when: When,
    call: Call | None,
    is_default: bool,
) -> Tensor:
    """Attention under the blocks that are selected, or under all of the mask, ``[B, Hq, Sq, Dv]``.

    kept: the masks that layers before prepared, and their selections; belongs to ``block_mask``.
    is_default: the mask is the default one of ``attention``, and scores are as they are.
    """
    q, k, v, scale, sinks = x.q, x.k, x.v, x.scale, x.sinks
    gradients = torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v))
    if q.device.type == "cpu" and (sinks is not None or gradients):
        # The CPU kernel has neither a log-sum-exp nor gradients.
        if when == "always" or not config.keeps_all:
            plan = plan_estimate((q, k), None, block_mask, (config, scale))
            selection = _selection(x, None if is_default else block_mask, kept, plan)
            block_mask = selection.block_mask()
            if call is not None:
                call.note(selection)
        batch, heads = block_mask.kv_indices.shape[:2]
        tokens = create_mask(block_mask.mask_mod, batch, heads, q.shape[2], k.shape[2], device="cpu")
        return _with_scores(q, k, v, tokens, scale, x.softcap, sinks)
    score_mod = None if x.softcap is None else _softcap_mod(x.softcap)
    settings = Settings(config, scale, type(score_mod), None, sinks is not None, when)
    attention = plan_attention((q, k, v), None, block_mask, settings)
    if attention.estimate is None:
        result: Any = attend_densely(q, k, v, None, block_mask, attention, score_mod)
    else:
        selection = _selection(x, None if is_default else block_mask, kept, attention.estimate)
        if call is not None:
            call.note(selection)
        if is_default and rows.fits(q, k, v, selection.block_size):
            return rows.attend(q, k, v, selection)
        shares = sharing_of(x.module) is not None
        chosen = mask_for(selection, attention.kernel) if shares else attention.kernel.mask_of(selection)
        result = attention.kernel.run(q, k, v, chosen, score_mod, selection.block_mask)
    return result if sinks is None else _with_sinks(result[0], result[1], sinks)


def _selection(x: _Inputs, block_mask: BlockMask | None, kept: dict[Any, Any], plan: Plan) -> Selection:
    """The selection of the layer, or that of an earlier one which it shares, see ``configure``.

    block_mask: None is the default mask, of which an estimate knows more than lists tell.
    """
    layer, sharing = x.module.layer_idx, sharing_of(x.module)
    if sharing is None or sharing.source == layer:
        check_memory(x.q, x.k, plan)
        own = estimate(x.q, x.k, _prepared(block_mask, kept, plan.frame, x.q.device), plan)
        if sharing is not None:
            kept["selections"][layer] = own
        return own
    selection: Selection | None = kept["selections"].get(sharing.source)
    if selection is None:
        raise ValueError(
            f"share: expected layer {sharing.source} to select the blocks of layer {layer} earlier in the forward pass "
            "and under the same mask, got no selection; share between layers of one kind"
        )
    made_for = *selection.count.shape[:2], *selection.lengths
    check_selection(made_for, selection.count.device, x.q, x.k)
    if sharing.last and not x.module.training:  # gradient checkpointing runs the layers again
        del kept["selections"][sharing.source]
    return selection


def _prepared(block_mask: BlockMask | None, kept: dict[Any, Any], frame: Frame, device: torch.device) -> PreparedMask:
    """A mask as the estimate needs it, made by the first of the layers that share it."""
    place = place_of(device)
    if place is None or block_mask is None:  # the default one is kept by itself
        return read_mask(None, block_mask, frame, device)
    of_all, of_these = (place, frame.of_all_heads()), (place, frame)
    mask: PreparedMask | None = kept.get(of_all) or kept.get(of_these)
    if mask is None:
        mask = read_mask(None, block_mask, frame, device)
        kept[of_these if mask.differs_between_heads else of_all] = mask
    return mask


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


def _dense(x: _Inputs, mask: Tensor | None) -> Tensor:
    """As transformers' ``sdpa``, ``[B, Sq, Hq, Dv]``; with softcap or sinks, which it lacks, all scores at once."""
    q, k, v = x.q, x.k, x.v
    if x.softcap is None and x.sinks is None:
        sdpa = AttentionInterface()["sdpa"]
        out: Tensor = sdpa(x.module, q, k, v, mask, scaling=x.scale, dropout=x.dropout, **x.others)[0]
        return out
    _check(x)
    if mask is None and q.shape[2] > 1:  # as sdpa takes it: causal from the first key on
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    out = _with_scores(q, k, v, mask, x.scale, x.softcap, _local(x.sinks))
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


def _check(x: _Inputs) -> None:
    if x.dropout:
        raise ValueError(
            f"dropout: expected 0.0, for flex_attention has none, got {x.dropout}; use model.eval(), or set "
            "attention_dropout of the model's config to 0"
        )
    for name in _NOT_SUPPORTED:
        if x.others.get(name) is not None:
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
