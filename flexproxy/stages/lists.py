"""Stage 6, BlockMask: from maps of blocks to the lists that the kernels read, and back.

NOTE [Lists]
The kernels of torch read the lists on terms that nothing checks. So here: head dimension Hq (or 1), contiguous, int32,
partial and full lists of the same shape, ascending, and the true sequence lengths. FLEXATTENTION traps 4, 5, 6 and 8.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy.checks import check_rows
from flexproxy.masks.mods import and_masks
from flexproxy.masks.structure import MaskMod
from flexproxy.ops.compat import from_kv_blocks
from flexproxy.ops.operators import operator

Lists = tuple[Tensor, Tensor, Tensor, Tensor]


def compile_block_mask(
    kept: Tensor,
    full: Tensor,
    mask_mod: MaskMod,
    block_size: int,
    seq_lengths: tuple[int, int],
    compute_q_blocks: bool,
) -> BlockMask:
    """A BlockMask of the kept blocks ``[B, H, Nq, Nk]``, of which those in ``full`` skip ``mask_mod``.

    full: bool ``[b, h, Nq, Nk]``, broadcast; a block that is full but not kept is dropped.
    compute_q_blocks: also make the transposed lists that gradients need.
    """
    return of_lists(block_lists(kept, full), mask_mod, block_size, seq_lengths, compute_q_blocks)


def of_lists(
    lists: Lists, mask_mod: MaskMod, block_size: int, seq_lengths: tuple[int, int], compute_q_blocks: bool
) -> BlockMask:
    """A BlockMask of the lists of ``block_lists``."""
    partial_number, partial_index, full_number, full_index = lists
    return from_kv_blocks(
        partial_number,
        partial_index,
        full_number,
        full_index,
        block_size=(block_size, block_size),
        mask_mod=mask_mod,
        seq_lengths=seq_lengths,
        compute_q_blocks=compute_q_blocks,
    )


@operator(lambda a: [(a.kept.shape[:3], torch.int32), (a.kept.shape, torch.int32)] * 2)
def block_lists(kept: Tensor, full: Tensor) -> Lists:
    """Numbers ``[B, H, Nq]`` and indices ``[B, H, Nq, Nk]`` of partial, then of full blocks. See NOTE [Lists]."""
    return (*_ascending(kept & ~full), *_ascending(kept & full))


def _ascending(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and their indices in ascending order, those of the others behind."""
    index = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).contiguous(), index.to(torch.int32).contiguous()


def dense_maps(block_mask: BlockMask, num_q_blocks: int, num_k_blocks: int) -> tuple[Tensor, Tensor]:
    """The blocks of a BlockMask: any (partial or full) and full, bool ``[b, h, Nq, Nk]``."""
    partial = _dense(block_mask.kv_num_blocks, block_mask.kv_indices, num_q_blocks, num_k_blocks)
    if block_mask.full_kv_num_blocks is None or block_mask.full_kv_indices is None:
        return partial, torch.zeros_like(partial)
    full = _dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, num_q_blocks, num_k_blocks)
    return partial | full, full


def _dense(number: Tensor, index: Tensor, num_q_blocks: int, num_k_blocks: int) -> Tensor:
    """Lists to a map. Entries past a row's number mean nothing; there may be more rows than query blocks."""
    number, index = number[:, :, :num_q_blocks], index[:, :, :num_q_blocks]
    column = torch.arange(index.shape[-1], device=index.device)
    place = torch.where(column < number[..., None], index, num_k_blocks).to(torch.int64)
    place = place.clamp(0, num_k_blocks)
    dense = torch.zeros(*place.shape[:-1], num_k_blocks + 1, dtype=torch.bool, device=index.device)
    return dense.scatter_(-1, place, True)[..., :num_k_blocks]


def and_block_masks(a: BlockMask, b: BlockMask) -> BlockMask:
    """The intersection of two masks, block by block: a block is full only where both are.

    Args:
        a, b: masks for the same lengths with the same square blocks; batch and head dimensions are equal or 1.

    Returns:
        A BlockMask whose ``mask_mod`` is the conjunction of both, with lists for gradients if one of them has these.

    Raises:
        TypeError: one of them is no BlockMask.
        ValueError: lengths, block sizes, dimensions or devices differ.
    """
    for name, mask in (("a", a), ("b", b)):
        if not isinstance(mask, BlockMask):
            raise TypeError(f"{name}: expected a BlockMask, got {type(mask).__name__}; make one with create_block_mask")
        check_rows(name, mask)
    block_size = a.BLOCK_SIZE[0]
    if a.BLOCK_SIZE != b.BLOCK_SIZE or a.BLOCK_SIZE[1] != block_size:
        raise ValueError(
            f"b: expected the square blocks of a, {tuple(a.BLOCK_SIZE)}, got {tuple(b.BLOCK_SIZE)}; make both with the "
            "same BLOCK_SIZE"
        )
    lengths = tuple(a.shape[-2:])
    if lengths != tuple(b.shape[-2:]):
        raise ValueError(
            f"b: expected a mask for Sq, Skv = {lengths}, as a, got {tuple(b.shape[-2:])}; make both for one length"
        )
    if a.kv_indices.device != b.kv_indices.device:
        raise ValueError(
            f"b: expected a mask on {a.kv_indices.device}, as a, got {b.kv_indices.device}; move it with .to(device)"
        )
    for dim, name in enumerate(("batch", "head")):
        sizes = a.kv_indices.shape[dim], b.kv_indices.shape[dim]
        if sizes[0] != sizes[1] and 1 not in sizes:
            raise ValueError(
                f"b: expected a {name} dimension of {sizes[0]}, as a, or 1, got {sizes[1]}; make both for one batch"
            )
    num_q_blocks, num_k_blocks = (-(-length // block_size) for length in lengths)
    a_any, a_full = dense_maps(a, num_q_blocks, num_k_blocks)
    b_any, b_full = dense_maps(b, num_q_blocks, num_k_blocks)
    return compile_block_mask(
        a_any & b_any,
        a_full & b_full,
        and_masks(a.mask_mod, b.mask_mod),
        block_size,
        (lengths[0], lengths[1]),
        a.q_indices is not None or b.q_indices is not None,
    )
