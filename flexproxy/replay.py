"""What an estimate chooses under the default mask, on a GPU, at little cost to the host.

NOTE [Replays]
A model calls with the same shapes in every layer, and up to some ten thousand tokens the host takes longer to start the
small kernels of an estimate than they run. So what an estimate chooses, and its lists, are captured as a CUDA graph
when a plan is met for the second time, after the same steps have run once more; the third call is the first replay.
Only what reads q and k is launched by itself, into memory that the graph reads. Capturing waits for nothing.

All graphs of a stream, a thread and a mode write to the same memory, so what one gave lasts until another runs. (If
each had its own, torch could use that of a dropped graph for nothing else until the GPU is full.) On each GPU the last
MAX_KEPT are kept; where more plans take turns, call by call, each is new every time, and none is captured. A plan for
whose graph there was no memory is not captured as long as it is among the last.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from flexproxy.masks.structure import MaskMod
from flexproxy.ops.cache import place_of
from flexproxy.ops.implementations import picked
from flexproxy.ops.operators import kernels, on_device_of
from flexproxy.pipeline import PreparedMask, Read, choose, count_rows, read_mask
from flexproxy.plan import Plan
from flexproxy.selection import Selection, selected_lists
from flexproxy.stages.lists import Lists
from flexproxy.stages.proxy import flat, proxy_of_heads

MAX_KEPT = 4
# Beyond these the device takes about as long as the host, and the memory that is kept grows with them. Pairs of blocks
# of all heads, those of 32K tokens with 32 heads and blocks of 128: a graph keeps 9 bytes for each. Rows of the proxy
# heads: up to 128 MiB with a head dimension of 128.
MAX_PAIRS, MAX_PROXY_ROWS = 2**21, 2**19
# Streams whose captures are kept, each counted once for a thread and a mode. Torch hands out the same 32 in turn.
MAX_STREAMS = 64


class Blocks(NamedTuple):
    """What a BlockMask needs: the kept blocks, bool ``[B, Hq, Nq, Nk]``, the lists of them, and the mask within."""

    kept: Tensor
    lists: Lists
    allowed: MaskMod


def replayed(q: Tensor, k: Tensor, plan: Plan, rows_apart: int = 0, copies: bool = False) -> Blocks | None:
    """The blocks that an estimate keeps under the default mask.

    Args:
        rows_apart: last rows that keep one block.
        copies: give tensors that stay as they are; others may be written over by the next call of this thread.

    Returns:
        None where nothing is replayed: at the first call with a plan, not on a GPU, in a trace or a capture, and where
        it would not pay.
    """
    place = place_of(q.device) if q.is_cuda else None
    if place is None or not _pays(plan) or picked(q.device) != "triton" or not _memory_can_be_captured():
        return None
    return _replays_on(q.device)(place, threading.get_ident(), plan, rows_apart).blocks(q, k, copies)


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


@functools.cache
def _memory_can_be_captured() -> bool:
    """Not where torch caches none, and not of another allocator, which might hand it out again."""
    return "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ and torch.cuda.get_allocator_backend() == "native"


@functools.cache
def _replays_on(device: torch.device) -> Callable[[Hashable, int, Plan, int], Replay]:
    """The last replays on a GPU, by their place (of ``place_of``), thread, plan and ``rows_apart``."""

    @functools.lru_cache(MAX_STREAMS)  # the memory of one that is dropped is of use to nobody until the GPU is full
    def captures_of(_place: Hashable, thread: int) -> Captures:
        return Captures(*_streams_of(device, thread))

    @functools.lru_cache(MAX_KEPT)
    def replay_of(place: Hashable, thread: int, plan: Plan, rows_apart: int) -> Replay:
        return Replay(captures_of(place, thread), plan, rows_apart)

    return replay_of


@functools.lru_cache(MAX_STREAMS)
def _streams_of(device: torch.device, _thread: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """For captures: two of torch's 32, which others get too when these are used up."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class Captures:
    """Captures whose graphs share their memory. See NOTE [Replays]. main, side: streams for them."""

    def __init__(self, main: torch.cuda.Stream, side: torch.cuda.Stream) -> None:
        self._main, self._side = main, side
        self._last: torch.cuda.CUDAGraph | None = None  # holds the memory

    def capture(self, work: Callable[[torch.cuda.Stream], Blocks]) -> tuple[torch.cuda.CUDAGraph, Blocks]:
        """A graph of what ``work`` does, with a stream beside its own; it is not run, and what it gave has no values.

        ``torch.cuda.graph`` would wait for the device first.
        """
        graph, last, current = torch.cuda.CUDAGraph(), self._last, torch.cuda.current_stream()
        self._last = None  # after an error the next capture begins with other memory
        pool = None if last is None else last.pool()
        # Torch up to 2.10 begins with a write to the state of random numbers, which a graph of the caller may read.
        self._main.wait_stream(current)
        with torch.cuda.stream(self._main):
            with torch.inference_mode(False):  # else torch up to 2.10 refuses later captures outside of that mode
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                blocks = work(self._side)
            finally:
                graph.capture_end()
        current.wait_stream(self._main)
        self._last = graph
        return graph, blocks


class Replay:
    """The blocks of one plan, again and again. See NOTE [Replays]. rows_apart: as in ``replayed``."""

    def __init__(self, captures: Captures, plan: Plan, rows_apart: int) -> None:
        self._captures, self._plan, self._rows_apart = captures, plan, rows_apart
        self._met, self._full = False, False
        self._captured: tuple[_Steps, torch.cuda.CUDAGraph, Blocks] | None = None

    def blocks(self, q: Tensor, k: Tensor, copies: bool = False) -> Blocks | None:
        """Those of these queries and keys, or None as from ``replayed``, which also says what ``copies`` are."""
        if self._full or not self._met:
            self._met = True
            return None
        with on_device_of(q):
            if self._captured is None:
                return self._begin(q, k)
            steps, graph, (kept, lists, allowed) = self._captured
            steps.read(q, k)
            graph.replay()
            if copies:
                kept, lists = kept.clone(), (lists[0].clone(), lists[1].clone(), lists[2].clone(), lists[3].clone())
        return Blocks(kept, lists, allowed)

    def _begin(self, q: Tensor, k: Tensor) -> Blocks | None:
        """The blocks, and a graph for those of later calls; None where the GPU is full, now and from now on."""
        try:
            steps = _Steps(q.device, self._plan, self._rows_apart)
            steps.read(q, k)
            blocks = steps.choose(None)  # and loads kernels, which no capture should do
            self._captured = steps, *self._captures.capture(steps.choose)
        except RuntimeError as error:
            # A capture can take nothing of what torch keeps for others. The driver's own error has no type.
            if not (isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)):
                raise
            self._full = True
            return None
        return blocks


class _Steps:
    """The estimate of one plan, in two steps: what reads q and k, into the same memory each time, and the rest."""

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

    def read(self, q: Tensor, k: Tensor) -> None:
        self._reader.read(q, k)

    def choose(self, side: torch.cuda.Stream | None) -> Blocks:
        """From what was read. side: a stream for the budgets, beside the scores, at which they do not look."""
        plan, mask, main = self._plan, self._mask, torch.cuda.current_stream()
        if plan.shares_rows:
            side = None
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
