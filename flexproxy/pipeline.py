"""The algorithm: from queries and keys to a BlockMask, stage by stage.

ProxyAttn, "Guided Sparse Attention via Representative Heads", arXiv 2509.24745. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy import masks
from flexproxy._checks import check_config, check_masks, check_memory, check_queries_and_keys, check_scale, check_tables
from flexproxy.admissible import (
    Admissible,
    SampledMask,
    bits_at,
    classify_by_evaluation,
    classify_clauses,
    depends_on,
    summarize_rows,
)
from flexproxy.block_mask import compile_block_mask, dense_maps
from flexproxy.budget import block_masses, clip_counts, count_blocks, last_valid_queries
from flexproxy.clauses import ClauseStack, stack
from flexproxy.config import ProxyConfig
from flexproxy.masks import MaskMod
from flexproxy.proxy import Groups, head_groups, merge_heads, pool_heads, proxy_of_heads
from flexproxy.ranking import forced_counts, rank_blocks
from flexproxy.scores import block_scores
from flexproxy.selection import Selection


def select(
    q: Tensor,
    k: Tensor,
    *,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
    config: ProxyConfig | None = None,
    scale: float | None = None,
) -> Selection:
    """Estimate which blocks every head needs: the selection behind ``build``, to look at or to reuse.

    Args:
        q: queries ``[B, Hq, Sq, D]``, after the position embedding; fp32, fp16 or bf16, any strides.
        k: keys ``[B, Hkv, Skv, D]``, Sq <= Skv; Hkv divides Hq.
        mask_mod: the mask, one of ``flexproxy.masks``, ``and_masks`` / ``or_masks`` of them, or any function of
            ``(b, h, q_idx, kv_idx)``; the latter is evaluated for every pair of tokens. With neither mask given:
            causal, aligned at the end, so query i sits at position i + Skv - Sq.
        block_mask: the mask, already classified, with blocks of ``config.block_size``; ``mask_mod`` is then left alone.
        config: the settings; None is ``ProxyConfig()``.
        scale: factor of the attention scores; None is 1 / sqrt(D).

    Returns:
        Selection with ``rank [B, P, Nq, Nk]``, ``count [B, Hq]``, ``proxy_of [Hq]``. No gradient flows through it.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
    """
    return select_for(q, k, mask_mod, block_mask, config, scale, gradients=False, lists=False)


def select_for(
    q: Tensor,
    k: Tensor,
    mask_mod: MaskMod | None,
    block_mask: BlockMask | None,
    config: ProxyConfig | None,
    scale: float | None,
    gradients: bool,
    lists: bool,
) -> Selection:
    """``select``, for a BlockMask.

    Args:
        gradients: the BlockMask has the lists for them also if neither q nor k requires them.
        lists: the BlockMask will be made; where it would not fit in memory, say so now.
    """
    config = check_config(config)
    check_queries_and_keys(q, k)
    check_masks(mask_mod, block_mask, q, k, config.block_size)
    scale = check_scale(scale, q.shape[3])
    groups, k_groups = head_groups(config.num_proxies, config.groups, q.shape[1], k.shape[1])
    needs_gradients = torch.is_grad_enabled() and (gradients or q.requires_grad or k.requires_grad)
    if lists:
        check_memory(q, k, config, needs_gradients)
    q, k = q.detach(), k.detach()

    mask = _read_mask(mask_mod, block_mask, q, k, config, groups)

    # 1. Proxy heads, and their scores: one ranking of blocks for all heads of a proxy.
    q_stride, k_stride = config.strides
    q_proxy, k_proxy = pool_heads(q, groups, q_stride), pool_heads(k, k_groups, k_stride)
    admissible = merge_heads(mask.admissible.any, groups)
    rows = summarize_rows(admissible, merge_heads(mask.admissible.full, groups))
    q_cell, k_cell = (config.block_size // stride for stride in config.strides)
    # As much as one of the lists of the BlockMask will take, so that it does not show in the peak.
    workspace = min(max(4 * q.shape[0] * q.shape[1] * admissible.shape[2] * admissible.shape[3], 2**25), 2**30)
    scores = block_scores(
        q_proxy, k_proxy, *mask.sampled.tensors(), admissible, rows, q_cell, k_cell, k_stride, scale, workspace
    )
    forced = mask.offset, q.shape[2], config.block_size, config.sink_blocks, config.local_blocks  # see forced_blocks
    rank = rank_blocks(scores, admissible, rows, *forced)

    # 2. Dynamic budgets: one count for every head, from the last queries of its sequence.
    proxy_of = proxy_of_heads(groups, q.device)
    forced_count = forced_counts(mask.admissible.any, rows, proxy_of, *forced)
    count = _count_blocks(q, k, mask, rows, forced_count, config, scale)

    return Selection(
        rank=rank,
        count=count,
        proxy_of=proxy_of,
        _admissible=mask.admissible,
        _forced=forced_count,
        _mask_mod=mask.mask_mod,
        _block_size=config.block_size,
        _seq_lengths=(q.shape[2], k.shape[2]),
        _compute_q_blocks=needs_gradients,
    )


def build(
    q: Tensor,
    k: Tensor,
    *,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
    config: ProxyConfig | None = None,
    scale: float | None = None,
) -> BlockMask:
    """Build the per-head BlockMask of ProxyAttn, for ``flex_attention(q, k, v, block_mask=..., enable_gqa=True)``.

    Arguments and errors are those of ``select``.

    Returns:
        BlockMask ``[B, Hq, Sq, Skv]`` of every head's kept blocks, and within them the mask that was given. It has the
        lists that gradients need if q or k requires them.
    """
    return select_for(q, k, mask_mod, block_mask, config, scale, gradients=False, lists=True).block_mask()


def dense_block_mask(
    q: Tensor, k: Tensor, mask_mod: MaskMod | None, block_size: int, compute_q_blocks: bool
) -> BlockMask:
    """The BlockMask that keeps every admissible block."""
    mask_mod, admissible = classify(q, k, mask_mod, block_size)
    lengths = q.shape[2], k.shape[2]
    return compile_block_mask(admissible.any, admissible.full, mask_mod, block_size, lengths, compute_q_blocks)


def classify(q: Tensor, k: Tensor, mask_mod: MaskMod | None, block_size: int) -> tuple[MaskMod, Admissible]:
    """The mask, which is causal where none is given, and what it admits."""
    mask_mod = causal_at_end(q, k) if mask_mod is None else mask_mod
    # No samples are needed: one token of each block is as few as there can be.
    return mask_mod, _classify(mask_mod, q, k, block_size, (block_size, block_size), None).admissible


class _Mask(NamedTuple):
    """The caller's mask, as the stages need it."""

    mask_mod: MaskMod
    admissible: Admissible
    offset: Tensor  # integers [b], the position of query 0 among the keys
    sampled: SampledMask  # at the sampled queries and keys
    probes: Tensor  # int64 [b, h, block_size], the last valid queries, -1 where there are fewer
    probed: SampledMask  # by clauses at every query and key, or by bits at the probes and every key


class _Classified(NamedTuple):
    admissible: Admissible
    clauses: ClauseStack | None
    bits: Tensor | None


def causal_at_end(q: Tensor, k: Tensor) -> MaskMod:
    """The mask where none is given: query i sits at position i + Skv - Sq."""
    # The offset is a tensor, so that a new length does not recompile a kernel.
    offset = torch.full((q.shape[0],), k.shape[2] - q.shape[2], dtype=torch.int32, device=q.device)
    return masks.shift(masks.causal, offset)


def _classify(
    mask_mod: MaskMod, q: Tensor, k: Tensor, block_size: int, strides: tuple[int, int], groups: Groups | None
) -> _Classified:
    num_queries, num_keys = q.shape[2], k.shape[2]
    structure = masks.structure_of(mask_mod)
    check_tables(structure.tables, q)
    clauses = masks.clauses_of(structure, num_queries, num_keys, q.device)
    if clauses is not None:
        stacked = stack(clauses)
        return _Classified(classify_clauses(stacked, num_keys, block_size), stacked, None)
    on_batch, on_head = depends_on(mask_mod, q.device)
    admissible, bits = classify_by_evaluation(
        mask_mod,
        q.shape[0] if on_batch else 1,
        q.shape[1] if on_head else 1,
        num_queries,
        num_keys,
        block_size,
        strides,
        lambda mask: mask if groups is None else merge_heads(mask, groups),
        q.device,
    )
    return _Classified(admissible, None, bits)


def _read_mask(
    mask_mod: MaskMod | None, block_mask: BlockMask | None, q: Tensor, k: Tensor, config: ProxyConfig, groups: Groups
) -> _Mask:
    num_queries, num_keys, size = q.shape[2], k.shape[2], config.block_size
    num_q_blocks, num_k_blocks = -(-num_queries // size), -(-num_keys // size)
    if block_mask is not None:
        mask_mod = block_mask.mask_mod
    elif mask_mod is None:
        mask_mod = causal_at_end(q, k)
    admissible, clauses, bits = _classify(mask_mod, q, k, size, config.strides, groups)
    if block_mask is not None:
        some, full = dense_maps(block_mask, num_q_blocks, num_k_blocks)
        admissible = admissible._replace(any=some, full=full)

    offset = masks.structure_of(mask_mod).offset
    if not isinstance(offset, Tensor):
        offset = torch.full((1,), num_keys - num_queries if offset is None else offset, device=q.device)
    probes = last_valid_queries(admissible.valid, size)
    if clauses is not None:
        sampled, probed = SampledMask(_sampled(clauses, config.strides), None), SampledMask(clauses, None)
    else:
        sampled, probed = SampledMask(None, bits), SampledMask(None, bits_at(mask_mod, probes.clamp(min=0), num_keys))
    return _Mask(mask_mod, admissible, offset.reshape(-1), sampled, probes, probed)


def _sampled(clauses: ClauseStack, strides: tuple[int, int]) -> ClauseStack:
    """The clauses at the sampled queries and keys."""
    queries, keys = (slice(None, None, stride) for stride in strides)
    lo, hi, q_label, k_label = clauses
    labels = (None, None) if q_label is None or k_label is None else (q_label[..., queries], k_label[..., keys])
    return ClauseStack(lo[..., queries], hi[..., queries], *labels)


def _count_blocks(
    q: Tensor, k: Tensor, mask: _Mask, rows: Tensor, forced: Tensor, config: ProxyConfig, scale: float
) -> Tensor:
    """int32 ``[B, Hq]``. rows: of the proxies, ``summarize_rows``; forced: the most forced blocks of a row."""
    num_blocks = mask.admissible.any.shape[-1]
    max_blocks = num_blocks if config.max_blocks is None else config.max_blocks
    if (config.gamma if config.density is None else config.density) == 1.0:
        count = torch.full(q.shape[:2], num_blocks, dtype=torch.int32, device=q.device)
        return clip_counts(count, forced, config.min_blocks, max_blocks, num_blocks)
    if config.density is not None and mask.admissible.any.shape[1] > 1:  # of the heads
        rows = summarize_rows(mask.admissible.any, mask.admissible.full)
    masses = block_masses(q, k, mask.probes, *mask.probed.tensors(), config.block_size, scale)
    return count_blocks(masses, rows, forced, config.gamma, config.density, config.min_blocks, max_blocks)
