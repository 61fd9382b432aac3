"""Stage 5, selection: the blocks that every head keeps, to look at, to reuse, or to compile into a BlockMask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy.masks.blocks import Admissible
from flexproxy.masks.mods import MaskMod
from flexproxy.ops.operators import Output, operator
from flexproxy.stages.lists import Lists, block_lists, of_lists

if TYPE_CHECKING:
    from flexproxy.inspect.summary import Summary


@dataclass(frozen=True, eq=False)
class Selection:
    """Which blocks every head keeps (METHOD: selected = admissible & (rank[proxy of the head] < count)).

    Attributes:
        rank: int32 ``[B, P, Nq, Nk]``, rank of every key block in its row, 0 first; inadmissible blocks come last.
        count: int32 ``[B, Hq]``, blocks that every row of the head keeps, where so many are admissible.
        proxy_of: int64 ``[Hq]``, proxy index of every query head.
    """

    rank: Tensor
    count: Tensor
    proxy_of: Tensor
    _admissible: Admissible = field(repr=False)
    _forced: Tensor = field(repr=False)  # int32 [b, 1 or Hq], the most forced blocks of a row
    _mask_mod: MaskMod = field(repr=False)
    _block_size: int = field(repr=False)
    _seq_lengths: tuple[int, int] = field(repr=False)
    _compute_q_blocks: bool = field(repr=False)

    def block_map(self) -> Tensor:
        """Kept blocks: bool ``[B, Hq, Nq, Nk]``."""
        return selected_blocks(self.rank, self.count, self.proxy_of, self._admissible.any)

    def density(self) -> Tensor:
        """Kept blocks divided by admissible blocks: fp32 ``[B, Hq]``; 1 where no block is admissible."""
        kept, admissible = self._numbers()
        return torch.where(admissible > 0, kept / admissible.clamp(min=1), 1.0).to(torch.float32)

    def _numbers(self) -> tuple[Tensor, Tensor]:
        """How many blocks are kept, and how many are admissible: int64 ``[B, Hq]``."""
        kept = self.block_map().sum((-2, -1))
        return kept, self._admissible.any.sum((-2, -1)).expand_as(kept)

    def summary(self) -> Summary:
        """Densities, budgets, forced blocks and dense rows of every head, in numbers; ``print`` it for a table.

        It waits for the device: call it to look at a selection, not on the way to a mask.
        """
        from flexproxy.inspect.summary import summarize

        return summarize(self)

    def mask_mod(self) -> MaskMod:
        """Membership alone, ``mask_mod(b, h, q_idx, kv_idx)``, for ``and_masks`` and ``create_block_mask``.

        It says which blocks are kept, not which tokens of them are allowed: combine it with the mask that was given.
        """
        return membership(self.block_map(), self._block_size)

    def block_mask(self) -> BlockMask:
        """The mask of ``build``: kept blocks, and within them the mask that was given."""
        kept, lists = self._lists()
        member, mask_mod = membership(kept, self._block_size), self._mask_mod

        # NOTE: eager flex_attention looks at nothing but this function, so membership is part of it.
        def proxy_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return member(b, h, q_idx, kv_idx) & mask_mod(b, h, q_idx, kv_idx)

        return of_lists(lists, proxy_mask, self._block_size, self._seq_lengths, self._compute_q_blocks)

    def listed_block_mask(self) -> BlockMask:
        """The same for a compiled kernel alone: it visits the listed blocks, and need not look up which are kept."""
        _, lists = self._lists()
        return of_lists(lists, self._mask_mod, self._block_size, self._seq_lengths, self._compute_q_blocks)

    def _lists(self) -> tuple[Tensor, Lists]:
        kept, partial_number, partial_index, full_number, full_index = selected_lists(
            self.rank, self.count, self.proxy_of, self._admissible.any, self._admissible.full
        )
        return kept, (partial_number, partial_index, full_number, full_index)


def membership(block_map: Tensor, block_size: int, kv_block_size: int | None = None) -> MaskMod:
    """A ``mask_mod`` that looks a token pair's block up in a map ``[B, Hq, Nq, Nk]``.

    kv_block_size: of the keys, where it is not that of the queries.

    Raises:
        ValueError: compiled kernels address the map with 32 bits, and it is too large for that.
    """
    if block_map.numel() > 2**31:
        raise ValueError(
            f"block_size: expected at most 2**31 block pairs in all, got {list(block_map.shape)} = "
            f"{block_map.numel()} with blocks of {block_size}; use a larger block_size, or fewer sequences a call"
        )

    kv_size = block_size if kv_block_size is None else kv_block_size

    def member(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return block_map[b, h, q_idx // block_size, kv_idx // kv_size]

    return member


def _blocks_of_heads(a: Any) -> tuple[int, ...]:
    return a.rank.shape[0], a.count.shape[1], *a.rank.shape[2:]


@operator(lambda a: (_blocks_of_heads(a), torch.bool), has_kernel=False)
def selected_blocks(rank: Tensor, count: Tensor, proxy_of: Tensor, admissible: Tensor) -> Tensor:
    """The method in one line: bool ``[B, Hq, Nq, Nk]``."""
    return ((rank if rank.shape[1] == 1 else rank[:, proxy_of]) < count[..., None, None]) & admissible


def _kept_and_lists(a: Any) -> list[Output]:
    shape = _blocks_of_heads(a)
    return [(shape, torch.bool), *[(shape[:3], torch.int32), (shape, torch.int32)] * 2]


@operator(_kept_and_lists)
def selected_lists(
    rank: Tensor, count: Tensor, proxy_of: Tensor, admissible: Tensor, full: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``selected_blocks``, and the ``block_lists`` of them."""
    kept = selected_blocks(rank, count, proxy_of, admissible)
    return kept, *block_lists(kept, full)
