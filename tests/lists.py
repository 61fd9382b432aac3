"""The lists of a BlockMask, read entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


def read_lists(number: Tensor | None, index: Tensor | None, num_blocks: int) -> Tensor:
    """Lists ``[b, h, Nq]`` and ``[b, h, Nq, columns]`` as a map, bool ``[b, h, Nq, num_blocks]``, on the CPU.

    Looks at the first ``number`` entries of every row and at nothing else; none may come twice.
    """
    assert number is not None
    assert index is not None
    blocks = torch.zeros(*number.shape, num_blocks, dtype=torch.bool)
    numbers, rows = number.flatten().tolist(), index.flatten(0, 2).tolist()
    for row, (n, entries) in enumerate(zip(numbers, rows, strict=True)):
        for entry in entries[:n]:
            assert not blocks.view(-1, num_blocks)[row, entry], "listed twice"
            blocks.view(-1, num_blocks)[row, entry] = True
    return blocks


def partial_blocks(block_mask: BlockMask, num_blocks: int) -> Tensor:
    """The blocks in which ``mask_mod`` is evaluated: bool ``[b, h, Nq, Nk]``."""
    return read_lists(block_mask.kv_num_blocks, block_mask.kv_indices, num_blocks)


def full_blocks(block_mask: BlockMask, num_blocks: int) -> Tensor:
    """The blocks in which it is not: bool ``[b, h, Nq, Nk]``; a mask without full lists has none."""
    if block_mask.full_kv_num_blocks is None:
        return torch.zeros_like(partial_blocks(block_mask, num_blocks))
    return read_lists(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, num_blocks)
