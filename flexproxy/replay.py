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
from typing import NamedTuple

import torch
from torch import Tensor

from flexproxy.masks.structure import MaskMod
from flexproxy.ops.cache import place_of
from flexproxy.ops.implementations import picked
from flexproxy.ops.operators import kernels, on_device_of
from flexproxy.pipeline import PreparedMask, Read, choose, count_rows, read, read_mask
from flexproxy.plan import Plan
from flexproxy.selection import Selection, selected_lists
from flexproxy.stages.lists import Lists
from flexproxy.stages.proxy import flat, proxy_of_heads

MAX_KEPT = 4
# Beyond these the device takes longer than the host, and the memory that is kept grows with them. Pairs of blocks, of
# all heads: at 32K tokens with 32 heads and blocks of 128 a graph takes about 100 MiB. Rows of the proxy heads, which
# take up to 128 MiB with a head dimension of 128.
MAX_PAIRS, MAX_PROXY_ROWS = 2**21, 2**19


class Blocks(NamedTuple):
    """What a BlockMask needs: the kept blocks, bool ``[B, Hq, Nq, Nk]``, the lists of them, and the mask within."""

    kept: Tensor
    lists: Lists
    allowed: MaskMod


def replayed(q: Tensor, k: Tensor, plan: Plan, rows_apart: int = 0, copies: bool = False) -> Blocks | None:
    """The blocks that an estimate keeps under the default mask.

    Args:
        rows_apart: last rows that keep one block.
        copies: give tensors that stay as they are; the next call with this plan writes over others.

    Returns:
        None where nothing is replayed: not on a GPU, in a trace or a capture, and where it would not pay.
    """
    place = place_of(q.device) if q.is_cuda else None
    if place is None or not _pays(plan) or picked(q.device) != "triton":
        return None
    blocks = _replay_of((place, threading.get_ident()), q.device, plan, rows_apart).blocks(q, k)
    if not copies:
        return blocks
    kept, lists, allowed = blocks
    return Blocks(kept.clone(), (lists[0].clone(), lists[1].clone(), lists[2].clone(), lists[3].clone()), allowed)


def blocks_of(selection: Selection, rows_apart: int) -> Blocks:
    """The same of a selection under a mask that all heads share; its counts change."""
    count = selection.count
    if rows_apart:
        count[:, :, -rows_apart:] = 1
    kept, *lists = selected_lists(selection.rank, count, selection.proxy_of, selection.admissible, selection.full)
    return Blocks(kept, (lists[0], lists[1], lists[2], lists[3]), selection.allowed)


@functools.lru_cache(1024)
def _pays(plan: Plan) -> bool:
    """Whether a plan is within what is replayed."""
    frame, (q_stride, k_stride) = plan.frame, plan.frame.strides
    num_q_blocks, num_k_blocks = frame.num_blocks()
    pairs = frame.batch * frame.num_heads * num_q_blocks * num_k_blocks
    sampled = frame.num_queries // (q_stride or 1) + frame.num_keys // k_stride
    return pairs <= MAX_PAIRS and frame.batch * len(frame.groups) * sampled <= MAX_PROXY_ROWS


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
        self._blocks: Blocks | None = None

    def blocks(self, q: Tensor, k: Tensor) -> Blocks:
        """Those of these queries and keys; the next call writes over them."""
        self._calls += 1
        with on_device_of(q):
            self._reader.read(q, k)
            if self._calls == 1:
                # Compiles and loads kernels, which no capture should do: also those that read in one of the caller's.
                read(q, k, self._mask, self._plan)
                return self._choose(None)
            if self._graph is None or self._blocks is None:
                self._graph, self._blocks = self._capture(q.device)
            self._graph.replay()
        return self._blocks

    def _choose(self, side: torch.cuda.Stream | None) -> Blocks:
        """side: a stream for the budgets, beside the scores, at which they do not look; None for the same."""
        plan, mask, main = self._plan, self._mask, torch.cuda.current_stream()
        if side is not None:
            side.wait_stream(main)
        try:
            with torch.cuda.stream(side):
                q_proxy, k_proxy = self._reader.proxies()
                known = Read(q_proxy, k_proxy, self._reader.masses())
                count = None if plan.shares_rows else count_rows(known, mask, plan)
            selection = choose(known, mask, plan, self._proxy_of, count)
        finally:
            if side is not None:
                main.wait_stream(side)  # after an error too: else the capture cannot end
        return blocks_of(selection, self._rows_apart)

    def _capture(self, device: torch.device) -> tuple[torch.cuda.CUDAGraph, Blocks]:
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
