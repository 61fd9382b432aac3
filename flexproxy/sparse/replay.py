"""Inference under the default mask on a GPU, at little cost to the host.

NOTE [Replays]
A model calls ``attention`` with the same shapes in every layer, and up to some ten thousand tokens the host takes
longer to start the small kernels of an estimate than they run. So what an estimate chooses, and its lists, are captured
as a CUDA graph when a plan is met for the second time: the first call compiles the kernels. Only what reads q and k is
launched by itself, into the memory that the graph reads. A graph belongs to a stream and to a thread, for the next call
writes to the same memory; it holds that memory until MAX_KEPT others have been used since. Capturing waits for nothing.

NOTE [The last rows]
A dense row among sparse ones is one program for each head, which reads all keys, and the last that is started: the
others have ended long before. So the dense last rows keep one block in the lists, and are attended to by a kernel that
splits the keys among programs (FlashAttention-2); its output replaces theirs. flash-attn-4 can start the last rows
first, which is enough where a row has few blocks.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from flexproxy.ops.cache import kept, place_of
from flexproxy.ops.compat import loadable
from flexproxy.ops.implementations import picked
from flexproxy.ops.operators import kernels, on_device_of
from flexproxy.pipeline import PreparedMask, Read, check_memory, choose, count_rows, estimate, read_mask
from flexproxy.plan import Plan
from flexproxy.selection import Selection, selected_lists
from flexproxy.sparse import flash
from flexproxy.sparse.kernel import run_causal
from flexproxy.sparse.plan import KernelPlan
from flexproxy.stages.lists import Lists
from flexproxy.stages.proxy import flat, proxy_of_heads

MAX_KEPT = 4
# Pairs of blocks, of all heads: at 32K tokens with 32 heads and blocks of 128. A graph of so many takes about 100 MiB,
# and beyond, the device takes longer than the host.
MAX_PAIRS = 2**21
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
    place = place_of(q.device)
    q, k, v = loadable(q), loadable(k), loadable(v)
    frame, shapes = plan.frame, Values(q.dtype, q.shape[3], v.shape[3])
    by_flash = flash.fits(q, k, v, kernel.kernel_options)
    start = first_apart(plan, shapes, MIN_APART_OF_FLASH if by_flash else MIN_APART)
    rows = 0 if start is None else frame.dense_last_blocks
    replays = place is not None and _pairs(plan) <= MAX_PAIRS
    if shared:
        start, lists = shared[0]
    elif replays:
        lists = _replay_of((place, threading.get_ident()), q.device, plan, rows).lists_of(q, k)
    else:
        check_memory(q, k, plan)
        lists = _lists_of(estimate(q, k, read_mask(None, None, frame, q.device), plan), rows)
    if shared is not None and not shared:
        kept_lists = [x.clone() for x in lists] if replays else lists  # the next replay writes over them
        shared.append((start, (kept_lists[0], kept_lists[1], kept_lists[2], kept_lists[3])))
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
def _pairs(plan: Plan) -> int:
    num_q_blocks, num_k_blocks = plan.frame.num_blocks()
    return plan.frame.batch * plan.frame.num_heads * num_q_blocks * num_k_blocks


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


def _lists_of(selection: Selection, rows_apart: int) -> Lists:
    count = selection.count
    if rows_apart:
        count[:, :, -rows_apart:] = 1
    _, *lists = selected_lists(selection.rank, count, selection.proxy_of, selection.admissible, selection.full)
    return lists[0], lists[1], lists[2], lists[3]


@kept(64)
def _offset(device: torch.device, batch: int, num_before: int) -> Tensor:
    return torch.full((batch,), num_before, dtype=torch.int32, device=device)


@functools.lru_cache(MAX_KEPT)
def _replay_of(_key: Hashable, device: torch.device, plan: Plan, rows_apart: int) -> Replay:
    return Replay(device, plan, rows_apart)


@functools.lru_cache(64)
def _streams_of(device: torch.device, _thread: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """For captures: two of torch's 32, which others get too when these are used up."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class Replay:
    """The lists of one plan, again and again. See NOTE [Replays].

    rows_apart: last rows that keep one block in the lists.
    """

    def __init__(self, device: torch.device, plan: Plan, rows_apart: int) -> None:
        config = plan.config
        self._plan, self._rows_apart = plan, rows_apart
        self._mask: PreparedMask = read_mask(None, None, plan.frame, device)
        self._proxy_of = proxy_of_heads(plan.frame.groups, device)
        strides = 1 if config.chooses_queries else config.strides[0], config.strides[1]
        groups = plan.frame.groups, plan.key_groups
        pools = [(*flat(of_proxies), stride) for of_proxies, stride in zip(groups, strides, strict=True)]
        mask = self._mask
        probes = mask.probes if plan.needs_masses else None
        self._reader = kernels().Reader(pools, probes, mask.probed, mask.head_rows, config.block_size, plan.scale)
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._lists: Lists | None = None

    def lists_of(self, q: Tensor, k: Tensor) -> Lists:
        """The lists of these queries and keys; the next call writes over them."""
        self._calls += 1
        with on_device_of(q):
            self._reader.read(q, k)
            if self._calls == 1:  # compiles the kernels
                return self._choose()
            if self._graph is None or self._lists is None:
                self._graph, self._lists = self._capture(q.device)
            self._graph.replay()
        return self._lists

    def _choose(self, side: torch.cuda.Stream | None = None) -> Lists:
        """side: a stream for the budgets, beside the scores, at which they do not look; in a capture alone."""
        plan, mask, main = self._plan, self._mask, torch.cuda.current_stream()
        if side is not None:
            side.wait_stream(main)
        try:
            with torch.cuda.stream(side):
                q_proxy, k_proxy = self._reader.proxies()
                read = Read(q_proxy, k_proxy, self._reader.masses())
                count = None if plan.shares_rows else count_rows(read, mask, plan)
            selection = choose(read, mask, plan, self._proxy_of, count)
        finally:
            if side is not None:
                main.wait_stream(side)  # after an error too: else the capture cannot end
        return _lists_of(selection, self._rows_apart)

    def _capture(self, device: torch.device) -> tuple[torch.cuda.CUDAGraph, Lists]:
        """A graph of ``_choose``, which is not run. (torch.cuda.graph would wait for the device first.)"""
        graph = torch.cuda.CUDAGraph()
        stream, side = _streams_of(device, threading.get_ident())
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                lists = self._choose(None if self._plan.shares_rows else side)
            finally:
                graph.capture_end()
        return graph, lists
