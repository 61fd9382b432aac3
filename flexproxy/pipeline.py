"""The algorithm: from queries and keys to a BlockMask, stage by stage.

ProxyAttn, "Guided Sparse Attention via Representative Heads", arXiv 2509.24745. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy import masks
from flexproxy.checks import check_free_memory
from flexproxy.config import ProxyConfig
from flexproxy.masks.blocks import (
    Admissible,
    classify_by_evaluation,
    classify_clauses,
    confined,
    depends_on,
    first_blocks,
    summarize_rows,
    valid_queries,
)
from flexproxy.masks.clauses import stack
from flexproxy.masks.mods import shifted
from flexproxy.masks.sampled import SampledMask, evaluate_bits, evaluated_at
from flexproxy.masks.sequences import sequence_rows
from flexproxy.masks.structure import MaskMod, check_tables, clauses_of, documents_of, structure_of
from flexproxy.ops.cache import kept
from flexproxy.ops.operators import capturable
from flexproxy.plan import Frame, Plan, plan_estimate
from flexproxy.selection import Selection
from flexproxy.stages.budget import block_masses, clip_counts, count_blocks, last_valid_queries, rows_with_count
from flexproxy.stages.documents import Documents, document_counts, document_masses, first_probes, order_documents
from flexproxy.stages.lists import compile_block_mask, dense_maps
from flexproxy.stages.proxy import merge_heads, outlying_queries, pool_heads, proxy_of_heads
from flexproxy.stages.ranking import ForcedRule, forced_counts, rank_blocks
from flexproxy.stages.scores import Sampling, block_scores
from flexproxy.stages.sharing import shared_counts, total_blocks


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
        Selection with ``rank [B, P, Nq, Nk]``, ``count [B, Hq, Nq]``, ``proxy_of [Hq]``. No gradient flows through it.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
    """
    plan = plan_estimate((q, k), mask_mod, block_mask, (config, scale))
    return estimate(q, k, read_mask(mask_mod, block_mask, plan.frame, q.device), plan)


class Read(NamedTuple):
    """What an estimate takes from q and k; the rest of it looks at nothing else.

    q_proxy, k_proxy: the proxy heads, ``[B, P, sampled queries or Sq, D]`` and ``[B, P, sampled keys, D]``.
    masses: of the budgets, fp32 ``[B, Hq, Nk]``, or by document; None where the plan needs none.
    """

    q_proxy: Tensor
    k_proxy: Tensor
    masses: Tensor | None


def estimate(q: Tensor, k: Tensor, mask: PreparedMask, plan: Plan) -> Selection:
    """``select`` by its plan, under a mask prepared for it."""
    proxy_of = proxy_of_heads(plan.frame.groups, q.device)
    return choose(read(q.detach(), k.detach(), mask, plan), mask, plan, proxy_of)


def read(q: Tensor, k: Tensor, mask: PreparedMask, plan: Plan) -> Read:
    """The first pass over queries and keys: proxy heads, and the masses of the last queries."""
    config = plan.config
    q_stride, k_stride = config.strides
    q_proxy = pool_heads(q, plan.frame.groups, 1 if config.chooses_queries else q_stride)
    k_proxy = pool_heads(k, plan.key_groups, k_stride)
    masses = None
    if plan.needs_masses:
        if isinstance(mask.probes, Documents):
            masses = document_masses(q, k, mask.probed, mask.probes, config.block_size, plan.scale)
        else:
            masses = block_masses(q, k, mask.probes, mask.probed, mask.head_rows, config.block_size, plan.scale)
    return Read(q_proxy, k_proxy, masses)


def choose(x: Read, mask: PreparedMask, plan: Plan, proxy_of: Tensor, count: Tensor | None = None) -> Selection:
    """The blocks of every head, from what was read.

    Args:
        proxy_of: of ``proxy_of_heads``.
        count: of ``count_rows``, where it is known.
    """
    config, groups = plan.config, plan.frame.groups

    # 1. Scores of the proxy heads: one ranking of blocks for all heads of a proxy.
    chosen, sampled = None, mask.sampled
    if config.chooses_queries:
        chosen = outlying_queries(x.q_proxy, merge_heads(mask.admissible.valid, groups), config.strides[0])
        if sampled.lo is None:
            sampled = _evaluated_at(chosen, mask, plan.frame, proxy_of)
    q_cell, k_cell = (config.block_size // stride for stride in config.strides)
    sampling = Sampling(q_cell, k_cell, config.strides[1], chosen)
    # As much as two of the lists of the BlockMask will take, so that it does not show in the peak.
    pairs = plan.frame.batch * plan.frame.num_heads * math.prod(mask.some.shape[2:])
    workspace = min(max(8 * pairs, 2**26), 2**30)
    scores = block_scores(x.q_proxy, x.k_proxy, sampled, mask.some, mask.rows, sampling, plan.scale, workspace)
    rank = rank_blocks(scores, mask.some, mask.rows, mask.rule)
    head_rank = None
    if mask.admissible.any.shape[1] > 1:  # a head walks the ranking of its proxy over its own blocks
        head_rank = rank_blocks(-rank[:, proxy_of].float(), mask.admissible.any, mask.head_rows, mask.rule)

    # 2. Dynamic budgets: a count for every row of a head, from the last queries of its sequence.
    if plan.shares_rows:
        ranked = scores, rank, proxy_of
        if head_rank is not None:
            ranked = scores[:, proxy_of], head_rank, torch.arange(len(proxy_of), device=rank.device)
        count = _share_blocks(x, mask, plan, ranked)
    elif count is None:
        count = count_rows(x, mask, plan)

    return Selection(
        rank=rank,
        head_rank=head_rank,
        count=count,
        proxy_of=proxy_of,
        admissible=mask.admissible.any,
        full=mask.admissible.full,
        forced=mask.forced,
        allowed=mask.mask_mod,
        block_size=config.block_size,
        lengths=(plan.frame.num_queries, plan.frame.num_keys),
        gradients=plan.gradients,
        scale=plan.scale,
    )


def check_memory(q: Tensor, k: Tensor, plan: Plan) -> None:
    """Raise before memory is taken, where the BlockMask of a long sequence cannot fit on its GPU."""
    if plan.much_memory and not torch.cuda.is_current_stream_capturing():  # in a graph the driver cannot be asked
        check_free_memory(q, k, plan.config, plan.gradients)


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
    check_tables(structure_of(mask_mod).tables, q)
    # No samples are needed: one token of each block is as few as there can be.
    frame = Frame(q.shape[0], q.shape[1], q.shape[2], k.shape[2], block_size, (block_size, block_size), (0, 1), 0, ())
    return mask_mod, _classify(mask_mod, None, frame, q.device).admissible


class PreparedMask(NamedTuple):
    """The mask, as the stages need it: all that does not depend on the values of q and k."""

    mask_mod: MaskMod
    admissible: Admissible
    some: Tensor  # bool [b, p, Nq, Nk], admissible blocks of the proxies
    rows: Tensor  # int32 [b, p, Nq, 7], summarize_rows of the proxies
    head_rows: Tensor  # int32 [b, 1 or Hq, Nq, 7], of the heads
    rule: ForcedRule
    forced: Tensor  # int32 [b, 1 or Hq], the most forced blocks of a row
    sampled: SampledMask  # at the sampled queries and keys; empty if it must be evaluated at queries chosen later
    probes: Tensor | Documents  # int64 [b, h, block_size], the last valid queries, -1 where there are fewer
    probed: SampledMask  # by clauses at every query and key, or by bits at the probes (of its document) and every key
    evaluated: MaskMod  # the mask, with the lists that confine it

    @property
    def differs_between_heads(self) -> bool:
        return self.admissible.any.shape[1] > 1 or self.admissible.valid.shape[1] > 1


class _Classified(NamedTuple):
    admissible: Admissible
    mask: SampledMask  # by clauses, at every query and key; or by bits, at the sampled ones
    evaluated: MaskMod


def causal_at_end(q: Tensor, k: Tensor) -> MaskMod:
    """The mask where none is given: query i sits at position i + Skv - Sq."""
    return _causal_at_end(q.device, q.shape[0], k.shape[2] - q.shape[2])


def _causal_at_end(device: torch.device, batch: int, num_before: int) -> MaskMod:
    # The offset is a tensor, so that a new length does not recompile a kernel.
    offset = capturable(torch.full((batch,), num_before, dtype=torch.int32, device=device))
    return shifted(masks.causal, offset)


def _classify(mask_mod: MaskMod, listed: Tensor | None, frame: Frame, device: torch.device) -> _Classified:
    """listed: bool ``[b, h, Nq, Nk]``, the blocks to which lists confine the mask; None for all."""
    clauses = clauses_of(structure_of(mask_mod), frame.num_queries, frame.num_keys, device)
    if clauses is not None:
        stacked = stack(clauses)
        admissible = classify_clauses(stacked, frame.num_keys, frame.block_size)
        if listed is not None:
            valid = valid_queries(stacked, listed, frame.num_keys, frame.block_size)
            admissible = Admissible(admissible.any & listed, admissible.full & listed, valid)
        return _Classified(admissible, SampledMask(*stacked, listed=listed), mask_mod)
    if listed is not None:
        mask_mod = confined(mask_mod, capturable(listed), frame.block_size)
    on_batch, on_head = depends_on(mask_mod, device)
    shape = frame.batch if on_batch else 1, frame.num_heads if on_head else 1, frame.num_queries, frame.num_keys
    q_stride, k_stride = frame.strides
    admissible, mask = classify_by_evaluation(
        mask_mod,
        shape,
        frame.block_size,
        (q_stride or frame.block_size, k_stride),
        lambda mask: merge_heads(mask, frame.groups) if frame.groups else mask,
        device,
    )
    return _Classified(admissible, mask, mask_mod)


def read_mask(
    mask_mod: MaskMod | None, block_mask: BlockMask | None, frame: Frame, device: torch.device
) -> PreparedMask:
    """The mask of a call, causal where none is given, as the stages need it."""
    if block_mask is not None:
        mask_mod = block_mask.mask_mod
    elif mask_mod is None:
        # A trace keeps nothing, and would be made again where the size passes the limit.
        keep = not torch.compiler.is_compiling() and frame.batch * math.prod(frame.num_blocks()) <= MAX_KEPT_PAIRS
        return (_kept_causal if keep else _read_causal)(device, frame.of_all_heads())
    return _prepare(mask_mod, block_mask, frame, device)


def _read_causal(device: torch.device, frame: Frame) -> PreparedMask:
    """The mask where none is given, which is the same for all heads."""
    return _prepare(_causal_at_end(device, frame.batch, frame.num_keys - frame.num_queries), None, frame, device)


# Of blocks: with more the device takes longer than the host. A mask of so many takes 3 MiB with blocks of 128.
MAX_KEPT_PAIRS = 2**20
_kept_causal = kept(8)(_read_causal)


def _prepare(mask_mod: MaskMod, block_mask: BlockMask | None, frame: Frame, device: torch.device) -> PreparedMask:
    """block_mask: its lists are part of the mask, whose function ``mask_mod`` is."""
    structure, groups = structure_of(mask_mod), frame.groups
    listed = None if block_mask is None else dense_maps(block_mask, *frame.num_blocks())[0]
    admissible, known, evaluated = _classify(mask_mod, listed, frame, device)
    is_known = known.lo is not None
    begin = torch.zeros(1, dtype=torch.int32, device=device) if is_known else first_blocks(admissible.any)
    q_label, k_label = documents_of(structure, frame.num_queries, frame.num_keys, device) or (None, None)

    def rows_of(part: Admissible) -> Tensor:
        size, dense_last_blocks = frame.block_size, frame.dense_last_blocks
        sequence = sequence_rows(part.valid, begin, q_label, k_label, frame.num_keys, size, dense_last_blocks)
        batch = max(len(part.any), len(sequence))
        any_, full = (x.expand(batch, -1, -1, -1) for x in (part.any, part.full))
        return summarize_rows(any_, full, sequence.expand(batch, -1, -1, -1))

    of_proxies = Admissible(*(merge_heads(x, groups) for x in admissible))
    rows = head_rows = rows_of(of_proxies)
    if admissible.any.shape[1] > 1:
        head_rows = rows_of(admissible)
    rule = frame.rule(structure.offset(frame.num_keys - frame.num_queries, device))
    forced = forced_counts(admissible.any, head_rows, rule)
    probes: Tensor | Documents
    if structure.packed and q_label is not None and k_label is not None:
        probes = order_documents(admissible.valid, q_label, k_label, frame.block_size)
    else:
        probes = last_valid_queries(admissible.valid, frame.block_size)
    if is_known:
        sampled, probed = known.every(*frame.strides), known
        if listed is not None:
            sampled = sampled._replace(listed=merge_heads(listed, groups))
    else:
        sampled = SampledMask() if frame.strides[0] is None else known
        probed = _evaluated_at_probes(evaluated, probes, frame)
    return PreparedMask(
        mask_mod, admissible, of_proxies.any, rows, head_rows, rule, forced, sampled, probes, probed, evaluated
    )


def _evaluated_at_probes(mask_mod: MaskMod, probes: Tensor | Documents, frame: Frame) -> SampledMask:
    """By bits ``[b, h, block_size, Skv]``; for every key at the probes of its document, where there are documents."""
    if isinstance(probes, Tensor):
        return evaluated_at(mask_mod, probes.clamp(min=0), frame.num_keys)
    first, probe = capturable(first_probes(probes)), capturable(probes.probes)

    def query(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return probe[b, h, (first[b, h, key] + row).clamp(max=frame.num_queries - 1)]

    shape = *probe.shape[:2], frame.block_size, frame.num_keys
    return evaluate_bits(mask_mod, shape, query, probe.device)


def _evaluated_at(chosen: Tensor, mask: PreparedMask, frame: Frame, proxy_of: Tensor) -> SampledMask:
    """The mask at the chosen queries of every proxy, merged over its heads where these differ, and the sampled keys."""
    merge = None
    if mask.admissible.valid.shape[1] > 1:
        chosen, merge = chosen[:, proxy_of], lambda x: merge_heads(x, frame.groups)
    return evaluated_at(mask.evaluated, chosen, frame.num_keys, frame.strides[1], merge)


def count_rows(x: Read, mask: PreparedMask, plan: Plan) -> Tensor:
    """How many blocks every row keeps, unless rows share: int32 ``[B, Hq, Nq]``. It looks at the masses alone."""
    config, rows, num_blocks = plan.config, mask.head_rows, mask.some.shape[-1]
    heads = plan.frame.batch, plan.frame.num_heads
    max_blocks = num_blocks if config.max_blocks is None else config.max_blocks
    bounds = mask.forced, config.min_blocks, max_blocks
    gamma, density, masses = config.gamma, config.density, x.masses
    if isinstance(mask.probes, Documents):
        if masses is None:
            masses = x.k_proxy.new_zeros(*heads, plan.frame.num_keys, dtype=torch.float32)
            gamma, density = math.inf, None
        return document_counts(masses, mask.probes, rows, gamma, density, *bounds)
    if masses is None:
        count = torch.full(heads, num_blocks, dtype=torch.int32, device=rows.device)
        return rows_with_count(clip_counts(count, *bounds, num_blocks), rows, num_blocks)
    return count_blocks(masses, rows, mask.forced, gamma, density, config.min_blocks, max_blocks)


def _share_blocks(x: Read, mask: PreparedMask, plan: Plan, ranked: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """int32 ``[B, Hq, Nq]``. ranked: as in ``shared_counts``."""
    config, rows = plan.config, mask.head_rows
    count = count_rows(x, mask, plan) if config.density is None else None
    total = total_blocks(rows, count, (plan.frame.batch, plan.frame.num_heads), config.density)
    max_blocks = mask.some.shape[-1] if config.max_blocks is None else config.max_blocks
    return shared_counts(*ranked, rows, mask.forced, total, config.min_blocks, max_blocks)
