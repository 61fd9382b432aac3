"""Triton kernels of stage 3 for packed documents: see NOTE [Documents in order].

One pass over tiles of keys gives the log-sum-exp of every probe, a second one the mass of every key. A document that
lies in one tile is done with there. Of any other each tile has a part, and another kernel combines them: of the
documents of a tile, only the first and the last may go on in others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.ops.kernels.block_logits import LOG2_E, _allowed
from flexproxy.ops.kernels.launch import Options, launch, power_of_2
from flexproxy.ops.kernels.tiles import masses_tile

if TYPE_CHECKING:
    from flexproxy.masks.sampled import SampledMask
    from flexproxy.stages.documents import Documents

PARTS = 64  # of one program

TILE_NUMBERS = [
    "lo_stride_c", "lo_stride_b", "lo_stride_s", "k_label_stride_c", "k_label_stride_b", "k_label_stride_s",
    "bits_stride_b", "bits_stride_h", "bits_stride_s", "listed_stride_b", "listed_stride_h", "listed_stride_r",
    "key_order_stride_b", "key_begin_stride_b", "probes_stride_b", "probes_stride_h", "probe_begin_stride_b",
    "probe_begin_stride_h", "num_queries", "num_keys", "heads", "group", "block_size", "head_dim", "scale_log2",
]  # fmt: skip


@triton.jit(do_not_specialize=TILE_NUMBERS)
def _tile_kernel(
    q, k, lo, hi, q_label, k_label, bits, listed, key_order, key_document, key_begin, probes, probe_document,
    probe_begin, partial, log_total, masses,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d, k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    lo_stride_c, lo_stride_b, lo_stride_s, k_label_stride_c, k_label_stride_b, k_label_stride_s,
    bits_stride_b, bits_stride_h, bits_stride_s, listed_stride_b, listed_stride_h, listed_stride_r,
    key_order_stride_b, key_begin_stride_b, probes_stride_b, probes_stride_h,
    probe_begin_stride_b, probe_begin_stride_h,
    num_queries, num_keys, heads, group, block_size, head_dim, scale_log2,
    MASSES: tl.constexpr, NUM_CLAUSES: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_LISTED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys, and the probes of their documents."""
    tile = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    place_ok = place < num_keys
    key = tl.load(key_order + b * key_order_stride_b + place, mask=place_ok, other=0)
    document = tl.load(key_document + b * key_order_stride_b + place, mask=place_ok, other=num_keys)
    first_document = tl.min(document)
    last_document = tl.max(tl.where(document < num_keys, document, -1))
    begins = probe_begin + b * probe_begin_stride_b + h * probe_begin_stride_h
    start = tl.load(begins + first_document)
    end = tl.load(begins + last_document + 1)
    dim = tl.arange(0, BLOCK_D)
    keys = tl.load(
        k + b * k_stride_b + (h // group) * k_stride_h + key[None, :] * k_stride_s + dim[:, None] * k_stride_d,
        mask=place_ok[None, :] & (dim < head_dim)[:, None],
        other=0.0,
    )  # [D, N]
    mass = tl.zeros([BLOCK_N], tl.float32)
    for first in tl.range(start, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        row_ok = row < end
        at = b * probes_stride_b + h * probes_stride_h + row
        query = tl.load(probes + at, mask=row_ok, other=0)
        own = tl.load(probe_document + at, mask=row_ok, other=-1)
        own_begin = tl.load(begins + own, mask=row_ok, other=0)
        queries = tl.load(
            q + b * q_stride_b + h * q_stride_h + query[:, None] * q_stride_s + dim[None, :] * q_stride_d,
            mask=row_ok[:, None] & (dim < head_dim)[None, :],
            other=0.0,
        )
        logits = tl.dot(queries, keys, input_precision="ieee") * scale_log2  # [M, N]
        ok = (own[:, None] == document[None, :]) & _allowed(
            lo, hi, q_label, k_label, bits, listed, b * lo_stride_b + query * lo_stride_s,
            b * bits_stride_b + h * bits_stride_h + (row - own_begin) * bits_stride_s,
            b * listed_stride_b + h * listed_stride_h + (query // block_size) * listed_stride_r, row_ok, key, place_ok,
            lo_stride_c, k_label_stride_c, k_label_stride_s, b * k_label_stride_b, 1, block_size, NUM_CLAUSES,
            HAS_LABELS, HAS_LISTED,
        )  # fmt: skip
        logits = tl.where(ok, logits, float("-inf"))
        if MASSES:
            total = tl.load(log_total + bh * num_queries + row, mask=row_ok, other=0.0)
            number = tl.load(begins + own + 1, mask=row_ok, other=1) - own_begin
            probability = tl.where(logits == float("-inf"), 0.0, tl.exp2(logits - total[:, None]))
            mass += tl.sum(probability / tl.maximum(number, 1).to(tl.float32)[:, None], 0)
        else:
            largest = tl.maximum(tl.max(logits, 1), -3e38)
            value = largest + tl.log2(tl.sum(tl.exp2(logits - largest[:, None]), 1))
            own_first = tl.load(key_begin + b * key_begin_stride_b + own, mask=row_ok, other=0)
            own_end = tl.load(key_begin + b * key_begin_stride_b + own + 1, mask=row_ok, other=0)
            goes_on = (own_first < tile * BLOCK_N) | (own_end > (tile + 1) * BLOCK_N)
            lane = tl.where(own == first_document, 0, 1)
            into = ((bh * tl.num_programs(0) + tile) * 2 + lane) * block_size + row - own_begin
            tl.store(partial + into, value, mask=row_ok & goes_on)
            tl.store(log_total + bh * num_queries + row, value, mask=row_ok & (goes_on == 0))
    if MASSES:
        tl.store(masses + bh * num_keys + place, tl.where(mass == mass, mass, 0.0), mask=place_ok)


COMBINE_NUMBERS = [
    "key_begin_stride_b", "probe_document_stride_b", "probe_document_stride_h", "probe_begin_stride_b",
    "probe_begin_stride_h", "num_queries", "num_keys", "tiles", "heads", "block_size",
]  # fmt: skip


@triton.jit(do_not_specialize=COMBINE_NUMBERS)
def _combine_kernel(
    key_begin, probe_document, probe_begin, partial, log_total,
    key_begin_stride_b, probe_document_stride_b, probe_document_stride_h, probe_begin_stride_b, probe_begin_stride_h,
    num_queries, num_keys, tiles, heads, block_size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of the probes whose documents lie in several tiles of BLOCK_N keys, from those of each tile."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = tl.load(
        probe_document + b * probe_document_stride_b + h * probe_document_stride_h + row,
        mask=row < num_queries,
        other=num_keys,
    )
    row_ok = own < num_keys
    slot = row - tl.load(probe_begin + b * probe_begin_stride_b + h * probe_begin_stride_h + own, mask=row_ok, other=0)
    begin = tl.load(key_begin + b * key_begin_stride_b + own, mask=row_ok, other=0)
    end = tl.load(key_begin + b * key_begin_stride_b + own + 1, mask=row_ok, other=0)
    first, last = begin // BLOCK_N, (end - 1) // BLOCK_N
    row_ok &= last > first
    start, stop = tl.min(tl.where(row_ok, first, tiles)), tl.max(tl.where(row_ok, last + 1, 0))
    largest = tl.full([BLOCK_M], -3e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for chunk in tl.range(start, stop, BLOCK_T):
        tile = (chunk + tl.arange(0, BLOCK_T))[:, None]
        lane = tl.where((tile == first[None, :]) & (begin % BLOCK_N != 0)[None, :], 1, 0)
        at = ((bh * tiles + tile) * 2 + lane) * block_size + slot[None, :]
        ok = row_ok[None, :] & (tile >= first[None, :]) & (tile <= last[None, :])
        part = tl.load(partial + at, mask=ok, other=float("-inf"))
        new_largest = tl.maximum(largest, tl.max(part, 0))
        # A maximum drops NaN, a sum keeps it.
        total = total * tl.exp2(largest - new_largest) + tl.sum(tl.exp2(part - new_largest[None, :]), 0)
        largest = new_largest
    tl.store(log_total + bh * num_queries + row, largest + tl.log2(total), mask=row_ok)


PARTS_NUMBERS = ["part_document_stride_b", "part_key_stride_b", "num_keys", "heads"]


@triton.jit(do_not_specialize=PARTS_NUMBERS)
def _parts_kernel(
    part_document, part_key, masses, parts, part_document_stride_b, part_key_stride_b, num_keys, heads,
    PARTS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Masses of PARTS parts, from those of their keys."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    part = tl.program_id(0) * PARTS + tl.arange(0, PARTS)
    document = tl.load(part_document + b * part_document_stride_b + part, mask=part < num_keys, other=num_keys)
    ok = document < num_keys
    begin = tl.load(part_key + b * part_key_stride_b + part, mask=ok, other=0)
    end = tl.load(part_key + b * part_key_stride_b + part + 1, mask=ok, other=0)
    mass = tl.zeros([PARTS], tl.float32)
    for start in tl.range(0, tl.max(end - begin), BLOCK_K):
        key = (begin + start)[:, None] + tl.arange(0, BLOCK_K)[None, :]
        mass += tl.sum(tl.load(masses + bh * num_keys + key, mask=key < end[:, None], other=0.0), 1)
    tl.store(parts + bh * num_keys + part, mass, mask=ok)


CUMULATIVE_NUMBERS = ["part_document_stride_b", "part_begin_stride_b", "num_keys", "heads"]


@triton.jit(do_not_specialize=CUMULATIVE_NUMBERS)
def _cumulative_kernel(
    part_document, part_begin, parts, cumulative, part_document_stride_b, part_begin_stride_b, num_keys, heads,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Mass of the heaviest parts of its document down to each of PARTS parts; equals in order."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    part = tl.program_id(0) * PARTS + tl.arange(0, PARTS)
    at = part_document + b * part_document_stride_b
    document = tl.load(at + part, mask=part < num_keys, other=num_keys)
    ok = document < num_keys
    mass = tl.load(parts + bh * num_keys + part, mask=ok, other=0.0)
    total = mass
    begins = part_begin + b * part_begin_stride_b
    start, end = tl.load(begins + tl.min(document)), tl.load(begins + tl.max(tl.where(ok, document, -1)) + 1)
    for first in tl.range(start, end, PARTS):
        r = first + tl.arange(0, PARTS)
        other = tl.load(parts + bh * num_keys + r, mask=r < end, other=-1.0)[:, None]
        same = tl.load(at + r, mask=r < end, other=-1)[:, None] == document[None, :]
        ahead = same & ((other > mass[None, :]) | ((other == mass[None, :]) & (r[:, None] < part[None, :])))
        total += tl.sum(tl.where(ahead, other, 0.0), 0)
    tl.store(cumulative + bh * num_keys + part, tl.where(ok, total, 0.0), mask=part < num_keys)


def document_masses(
    q: Tensor, k: Tensor, mask: SampledMask, documents: Documents, block_size: int, scale: float
) -> Tensor:
    """``flexproxy.stages.documents.document_masses``."""
    batch, heads, num_queries, head_dim = q.shape
    num_keys = k.shape[2]
    shape = masses_tile(q.dtype, head_dim, q.device, block_size)
    tiles = -(-num_keys // shape.keys)
    partial = torch.empty(batch, heads, tiles, 2, block_size, dtype=torch.float32, device=q.device)
    log_total = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=q.device)
    masses = torch.empty(batch, heads, num_keys, dtype=torch.float32, device=q.device)
    order = documents

    def over_tiles(of_keys: bool) -> None:
        launch(
            _tile_kernel,
            (tiles, batch * heads, 1),
            Options(shape.warps, stages=1),
            q=q,
            k=k,
            lo=mask.lo,
            hi=mask.hi,
            q_label=mask.q_label,
            k_label=mask.k_label,
            bits=mask.bits,
            listed=mask.listed,
            key_order=order.key_order,
            key_document=order.key_document,
            key_begin=order.key_begin,
            probes=order.probes,
            probe_document=order.probe_document,
            probe_begin=order.probe_begin,
            partial=partial,
            log_total=log_total,
            masses=masses,
            num_queries=num_queries,
            num_keys=num_keys,
            heads=heads,
            group=heads // k.shape[1],
            block_size=block_size,
            head_dim=head_dim,
            scale_log2=scale * LOG2_E,
            MASSES=of_keys,
            NUM_CLAUSES=0 if mask.lo is None else mask.lo.shape[0],
            HAS_LABELS=mask.q_label is not None,
            HAS_LISTED=mask.listed is not None,
            BLOCK_D=power_of_2(head_dim, 16, 256),
            BLOCK_M=shape.rows,
            BLOCK_N=shape.keys,
        )

    over_tiles(of_keys=False)
    launch(
        _combine_kernel,
        (-(-num_queries // 64), batch * heads, 1),
        key_begin=order.key_begin,
        probe_document=order.probe_document,
        probe_begin=order.probe_begin,
        partial=partial,
        log_total=log_total,
        num_queries=num_queries,
        num_keys=num_keys,
        tiles=tiles,
        heads=heads,
        block_size=block_size,
        BLOCK_M=64,
        BLOCK_N=shape.keys,
        BLOCK_T=16,
    )
    over_tiles(of_keys=True)
    parts, cumulative = torch.empty_like(masses), torch.empty_like(masses)
    grid = -(-num_keys // PARTS), batch * heads, 1
    launch(
        _parts_kernel,
        grid,
        part_document=order.part_document,
        part_key=order.part_key,
        masses=masses,
        parts=parts,
        num_keys=num_keys,
        heads=heads,
        PARTS=PARTS,
        BLOCK_K=power_of_2(block_size, 16, 128),
    )
    launch(
        _cumulative_kernel,
        grid,
        part_document=order.part_document,
        part_begin=order.part_begin,
        parts=parts,
        cumulative=cumulative,
        num_keys=num_keys,
        heads=heads,
        PARTS=PARTS,
    )
    return cumulative
