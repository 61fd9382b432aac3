"""Triton kernel of stage 2: the largest log-probability of every block pair. See NOTE [One pass]."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexproxy.ops.kernels.block_logits import block_logits, combine_splits
from flexproxy.ops.kernels.launch import launch, power_of_2
from flexproxy.ops.kernels.tiles import scores_tile

if TYPE_CHECKING:
    from flexproxy.masks.sampled import SampledMask
    from flexproxy.stages.scores import Sampling

NUMBERS = [
    "admissible_stride_b", "admissible_stride_h", "first_block", "num_q_blocks", "num_columns", "num_k_blocks",
    "rows_in_buffer", "splits", "heads", "ln_2",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _scores_kernel(
    values, partial, admissible, scores,
    admissible_stride_b, admissible_stride_h, first_block, num_q_blocks, num_columns, num_k_blocks, rows_in_buffer,
    splits, heads, ln_2,
    CELL: tl.constexpr, BLOCK_CELL: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Scores of one query block and BLOCK_J key blocks: max over the rows of (value - lse), natural logarithm."""
    in_buffer = tl.program_id(0)
    i = first_block + in_buffer
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // heads, bh % heads
    admissible_at = admissible + b * admissible_stride_b + h * admissible_stride_h + i.to(tl.int64) * num_k_blocks
    some = tl.load(admissible_at + j, mask=j < num_k_blocks, other=0) != 0
    score = tl.full([BLOCK_J], float("-inf"), tl.float32)
    bad = tl.zeros([BLOCK_J], tl.int32)
    if tl.max(some.to(tl.int32)) > 0:
        block_at = values + (bh * tl.num_programs(0) + in_buffer) * num_columns * CELL
        for start in tl.range(0, CELL, BLOCK_CELL):
            in_cell = start + tl.arange(0, BLOCK_CELL)
            row = in_buffer * CELL + in_cell
            row_ok = (in_cell < CELL) & (row < rows_in_buffer)
            lse = combine_splits(partial + bh * splits * rows_in_buffer + row, splits, rows_in_buffer, row_ok, 16)
            for c in tl.static_range(COLUMNS):
                column = j.to(tl.int64) * COLUMNS + c
                value = tl.load(
                    block_at + column[:, None] * CELL + in_cell[None, :],
                    mask=some[:, None] & (column < num_columns)[:, None] & row_ok[None, :],
                    other=float("-inf"),
                )
                relative = tl.where(value == float("-inf"), value, value - lse[None, :])
                not_a_number = relative != relative
                bad += tl.sum(not_a_number.to(tl.int32), 1)
                score = tl.maximum(score, tl.max(tl.where(not_a_number, float("-inf"), relative), 1))
    score = tl.where(bad > 0, float("nan"), score * ln_2)
    tl.store(scores + (bh * num_q_blocks + i) * num_k_blocks + j, score, mask=j < num_k_blocks)


def block_scores(
    q: Tensor,
    k: Tensor,
    mask: SampledMask,
    admissible: Tensor,
    summary: Tensor,
    sampling: Sampling,
    scale: float,
    workspace: int,
) -> Tensor:
    """``flexproxy.stages.scores.block_scores``, as many rows of blocks at a time as the workspace has room for."""
    q_cell, k_cell, key_step, chosen = sampling
    batch, proxies, num_rows = q.shape[:3] if chosen is None else chosen.shape
    num_q_blocks, num_k_blocks = admissible.shape[2:]
    tile = scores_tile(q.dtype, q.shape[3], q.device)
    columns = -(-k_cell // tile.keys)
    blocks_per_part = max(1, workspace // (4 * batch * proxies * num_k_blocks * columns * q_cell))
    scores = torch.empty(batch, proxies, num_q_blocks, num_k_blocks, dtype=torch.float32, device=q.device)
    block_cell = power_of_2(q_cell, 2, 32)
    block_j = 4096 // block_cell
    for start in range(0, num_q_blocks, blocks_per_part):
        stop = min(start + blocks_per_part, num_q_blocks)
        rows = slice(start * q_cell, min(stop * q_cell, num_rows))
        logits = block_logits(
            q,
            k,
            mask,
            tile,
            scale,
            rows=rows,
            q_cell=q_cell,
            k_cell=k_cell,
            key_step=key_step,
            row_index=chosen,
            summary=summary,
        )
        launch(
            _scores_kernel,
            (stop - start, -(-num_k_blocks // block_j), batch * proxies),
            values=logits.values,
            partial=logits.partial,
            admissible=admissible,
            scores=scores,
            first_block=start,
            num_q_blocks=num_q_blocks,
            num_columns=logits.values.shape[3],
            num_k_blocks=num_k_blocks,
            rows_in_buffer=logits.partial.shape[3],
            splits=logits.partial.shape[2],
            heads=proxies,
            ln_2=math.log(2),
            CELL=q_cell,
            BLOCK_CELL=block_cell,
            COLUMNS=columns,
            BLOCK_J=block_j,
        )
        del logits  # its memory is that of the next part
    return scores
