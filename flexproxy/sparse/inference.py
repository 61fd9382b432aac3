"""Inference under the default mask on a GPU, at little cost to the host.

NOTE [The last rows]
A dense row among sparse ones is one program for each head, which reads all keys, and the last that is started: the
others have ended long before. So the dense last rows keep one block in the lists, and are attended to by a kernel that
splits the keys among programs (FlashAttention-2); its output replaces theirs. flash-attn-4 can start the last rows
first, which is enough where a row has few blocks.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from flexproxy.ops.cache import kept
from flexproxy.ops.implementations import picked
from flexproxy.pipeline import check_memory, estimate, read_mask
from flexproxy.plan import Plan
from flexproxy.replay import blocks_of, replayed
from flexproxy.sparse import flash
from flexproxy.sparse.kernel import prepared, run_causal
from flexproxy.sparse.plan import KernelPlan
from flexproxy.stages.lists import Lists

# Blocks of keys from which on dense rows are apart. With fewer, one more launch takes longer, or as long as it saves.
MIN_APART, MIN_APART_OF_FLASH = 32, 65


def fits(q: Tensor) -> bool:
    """Whether ``attend`` can do it, where a plan is for inference: on a GPU whose operators Triton carries out."""
    return q.is_cuda and picked(q.device) == "triton"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    kernel: KernelPlan,
    shared: list[tuple[int | None, Lists]] | None = None,
) -> Tensor:
    """``attention`` under the default mask, without gradients: ``[B, Hq, Sq, D]``.

    Args:
        shared: gets what is attended to, for calls with the same plan; they find it there and estimate nothing.

    Raises:
        NotCompiledError: compilation is switched off, and ``flex_attention`` is needed.
    """
    q, k, v = prepared(q, k, v, kernel.kernel_options)
    frame, shapes = plan.frame, Values(q.dtype, q.shape[3], v.shape[3])
    by_flash = flash.fits(kernel.kernel_options)
    start = first_apart(plan, shapes, MIN_APART_OF_FLASH if by_flash else MIN_APART)
    rows = 0 if start is None else frame.dense_last_blocks
    if shared:
        start, lists = shared[0]
    else:
        blocks = replayed(q, k, plan, rows, copies=shared is not None)
        if blocks is None:
            check_memory(q, k, plan)
            blocks = blocks_of(estimate(q, k, read_mask(None, None, frame, q.device), plan), rows)
        lists = blocks.lists
        del blocks  # the map of them, which is not needed
        if shared is not None:
            shared.append((start, lists))
    if by_flash:
        longest_first = start is None and frame.dense_last_blocks > 0
        out = flash.attend(q, k, v, lists, frame.block_size, kernel.scale, longest_first)
    else:
        offset = _offset(q.device, frame.batch, frame.num_keys - frame.num_queries)
        out = run_causal(q, k, v, offset, lists, frame.block_size, kernel.scale, kernel.kernel_options)
    if start is not None:
        # Aligned at the end, as this operator is by itself, and scaled_dot_product_attention is not.
        dense = torch.ops.aten._scaled_dot_product_flash_attention.default
        number = frame.num_queries - start
        last = dense(q.narrow(2, start, number), k, v, 0.0, True, False, scale=kernel.scale)[0]
        out.narrow(2, start, number).copy_(last)
    return out


class Values(NamedTuple):
    """What a plan of an estimate does not say of q, k and v."""

    dtype: torch.dtype
    head_dim: int
    value_dim: int


@functools.lru_cache(1024)
def first_apart(plan: Plan, values: Values, min_blocks: int) -> int | None:
    """The first query of the dense last rows; None where they stay among the others. See NOTE [The last rows].

    min_blocks: of keys, from which on they are apart.
    """
    frame = plan.frame
    num_q_blocks, num_k_blocks = frame.num_blocks()
    start = (num_q_blocks - frame.dense_last_blocks) * frame.block_size
    fits = values.dtype != torch.float32 and values.head_dim % 8 == 0 and values.value_dim == values.head_dim
    fits = fits and torch.backends.cuda.is_flash_attention_available()
    pays = num_k_blocks >= min_blocks and frame.dense_last_blocks > 0 and start > 0
    return start if fits and pays else None


@kept(64)
def _offset(device: torch.device, batch: int, num_before: int) -> Tensor:
    return torch.full((batch,), num_before, dtype=torch.int32, device=device)
