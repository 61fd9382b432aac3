"""What an estimate chooses under the default mask, on a GPU, at little cost to the host.

NOTE [Replays]
A model calls with the same shapes in every layer, and up to some ten thousand tokens the host takes longer to start the
small kernels of an estimate than they run. So what an estimate chooses, and its lists, are captured as a CUDA graph
when a plan is met for the second time: the first call compiles the kernels. Only what reads q and k is launched by
itself, into the memory that the graph reads. A graph belongs to a stream and to a thread, for the next call writes to
the same memory; it holds that memory until MAX_KEPT others have been used since. Capturing waits for nothing.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Hashable

import torch
from torch import Tensor

from flexproxy.ops.cache import place_of
from flexproxy.ops.implementations import picked
from flexproxy.ops.operators import kernels, on_device_of
from flexproxy.pipeline import PreparedMask, Read, choose, count_rows, read_mask
from flexproxy.plan import Plan
from flexproxy.selection import Selection, selected_lists
from flexproxy.stages.lists import Lists
from flexproxy.stages.proxy import flat, proxy_of_heads

MAX_KEPT = 4
# Pairs of blocks, of all heads: at 32K tokens with 32 heads and blocks of 128. A graph of so many takes about 100 MiB,
# and beyond, the device takes longer than the host.
MAX_PAIRS = 2**21
KeptLists = tuple[Tensor, Lists]  # the blocks, bool [B, Hq, Nq, Nk], and the lists of them


def replayed(q: Tensor, k: Tensor, plan: Plan, rows_apart: int = 0, copies: bool = False) -> KeptLists | None:
    """The blocks that an estimate keeps under the default mask.

    Args:
        rows_apart: last rows that keep one block.
        copies: give tensors that stay as they are; the next call with this plan writes over others.

    Returns:
        None where nothing can be replayed: not on a GPU, in a trace or a capture, and for many blocks.
    """
    place = place_of(q.device) if q.is_cuda else None
    if place is None or _pairs(plan) > MAX_PAIRS or picked(q.device) != "triton":
        return None
    kept, lists = _replay_of((place, threading.get_ident()), q.device, plan, rows_apart).blocks_of(q, k)
    if not copies:
        return kept, lists
    return kept.clone(), (lists[0].clone(), lists[1].clone(), lists[2].clone(), lists[3].clone())


def lists_of(selection: Selection, rows_apart: int) -> KeptLists:
    """The same of a selection, whose counts change."""
    count = selection.count
    if rows_apart:
        count[:, :, -rows_apart:] = 1
    kept, *lists = selected_lists(selection.rank, count, selection.proxy_of, selection.admissible, selection.full)
    return kept, (lists[0], lists[1], lists[2], lists[3])


@functools.lru_cache(1024)
def _pairs(plan: Plan) -> int:
    num_q_blocks, num_k_blocks = plan.frame.num_blocks()
    return plan.frame.batch * plan.frame.num_heads * num_q_blocks * num_k_blocks


@functools.lru_cache(MAX_KEPT)
def _replay_of(_key: Hashable, device: torch.device, plan: Plan, rows_apart: int) -> Replay:
    return Replay(device, plan, rows_apart)


@functools.lru_cache(64)
def _streams_of(device: torch.device, _thread: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """For captures: two of torch's 32, which others get too when these are used up."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class Replay:
    """The blocks of one plan, again and again. See NOTE [Replays]. rows_apart: as in ``replayed``."""

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
        self._blocks: KeptLists | None = None

    def blocks_of(self, q: Tensor, k: Tensor) -> KeptLists:
        """Those of these queries and keys; the next call writes over them."""
        self._calls += 1
        with on_device_of(q):
            self._reader.read(q, k)
            if self._calls == 1:  # compiles the kernels
                return self._choose()
            if self._graph is None or self._blocks is None:
                self._graph, self._blocks = self._capture(q.device)
            self._graph.replay()
        return self._blocks

    def _choose(self, side: torch.cuda.Stream | None = None) -> KeptLists:
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
        return lists_of(selection, self._rows_apart)

    def _capture(self, device: torch.device) -> tuple[torch.cuda.CUDAGraph, KeptLists]:
        """A graph of ``_choose``, which is not run. (torch.cuda.graph would wait for the device first.)"""
        graph = torch.cuda.CUDAGraph()
        stream, side = _streams_of(device, threading.get_ident())
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                blocks = self._choose(None if self._plan.shares_rows else side)
            finally:
                graph.capture_end()
        return graph, blocks
