"""The sequences of a mask: in which block each begins, and which rows of blocks are its last.

A sequence is a document, or what is left without padding. Where a mask has neither, all of it is one sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexproxy.masks.clauses import dense_labels
from flexproxy.ops.operators import Output, Size, operator
from flexproxy.ops.tensors import pad_to_multiple


def _shape(a: Any) -> Output:
    batch = max(a.valid.shape[0], a.begin.shape[0], 1 if a.q_label is None else a.q_label.shape[0])
    return (batch, a.valid.shape[1], -(-a.valid.shape[2] // a.block_size), 2), torch.int32


@operator(_shape, has_kernel=False)
def sequence_rows(
    valid: Tensor,
    begin: Tensor,
    q_label: Tensor | None,
    k_label: Tensor | None,
    num_keys: Size,
    block_size: int,
    dense_last_blocks: int,
) -> Tensor:
    """For every row of blocks, the first block of its sequence, and whether it is dense: int32 ``[b, h, Nq, 2]``.

    The first block is Nk where no query of the row has one; of several sequences in a row, that of the first counts.
    Dense (1, else 0) are the last ``dense_last_blocks`` rows of every sequence, by valid queries.

    Args:
        valid: bool ``[b, h, Sq]``, the query has an allowed key.
        begin: int32 ``[b]``, the first block where there are no labels.
        q_label, k_label: integers ``[b, Sq]`` and ``[b, Skv]``, equal within a sequence, negative in none; or None.
    """
    num_blocks = -(-num_keys // block_size)
    query = torch.arange(valid.shape[2], device=valid.device)
    if q_label is None or k_label is None:
        first = torch.where(valid, begin[:, None, None], num_blocks)
        last = torch.where(valid, query, -1).amax(-1, keepdim=True)
    else:
        q_label, k_label = dense_labels(q_label, k_label)
        batch = max(len(valid), len(q_label))
        valid = valid.expand(batch, -1, -1) & (q_label >= 0)[:, None]
        key = torch.arange(num_keys, device=valid.device).expand_as(k_label)
        key = torch.where(k_label >= 0, key, num_keys)  # padding does not count for the label 0
        begins = torch.full_like(k_label, num_keys).scatter_reduce_(1, k_label.clamp(min=0), key, "amin")
        own = q_label.clamp(min=0)
        first = torch.where(valid, (begins.gather(1, own) // block_size)[:, None], num_blocks)
        own = own[:, None].expand_as(valid)
        ends = torch.full((*valid.shape[:2], num_keys), -1, device=valid.device)
        ends = ends.scatter_reduce_(2, own, torch.where(valid, query, -1), "amax")
        last = ends.gather(2, own)
    dense = valid & (query // block_size > last // block_size - dense_last_blocks)
    rows = pad_to_multiple(first, -1, block_size, num_blocks).unflatten(-1, (-1, block_size)).amin(-1)
    dense_rows = pad_to_multiple(dense, -1, block_size, False).unflatten(-1, (-1, block_size)).any(-1)
    return torch.stack([rows, dense_rows], -1).to(torch.int32)
