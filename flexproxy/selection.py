"""Stage 5, selection: the blocks that every head keeps, to look at, to reuse, or to compile into a BlockMask."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy.checks import check_kernel_options
from flexproxy.inspect.summary import Summary, density_of, summarize
from flexproxy.masks.structure import MaskMod, Recipe, recipe_of
from flexproxy.ops.cache import place_of
from flexproxy.ops.operators import Output, operator
from flexproxy.sparse.plan import KernelPlan, Settings, plan_kernel
from flexproxy.stages.lists import Lists, block_lists, of_lists


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """Which blocks every head keeps: ``admissible & (rank[proxy of the head] < count of the row)``.

    ``repr`` is the table of ``summary()``, and waits for the device. Copies share the function ``allowed``. It can be
    pickled if the mask can be made again: with those of ``flexproxy.masks``, combined and shifted, and with functions
    of a module (not of another function).

    Attributes:
        rank: int32 ``[B, P, Nq, Nk]``, rank of every key block in its row, 0 first; inadmissible blocks come last.
        head_rank: int32 ``[B, Hq, Nq, Nk]``, the same for every head, over the blocks that it may see itself; None
            where the mask is the same for all heads.
        count: int32 ``[B, Hq, Nq]``, blocks that each row keeps, where so many are admissible.
        proxy_of: int64 ``[Hq]``, proxy index of every query head.
        admissible: bool ``[Bm, Hm, Nq, Nk]``, blocks with a token pair that the mask allows; Bm is 1 or B, Hm 1 or Hq.
        full: likewise, blocks of which it allows every token pair.
        forced: int32 ``[Bm, 1 or Hq]``, the most forced blocks of a row; they are part of the count.
        allowed: the ``mask_mod`` that was given; causal, aligned at the end, where none was.
        block_size: tokens per block, of queries and of keys.
        lengths: Sq and Skv, in tokens.
        gradients: whether ``block_mask()`` has the lists that gradients need.
        scale: factor of the scores that the blocks were selected by.
    """

    rank: Tensor
    head_rank: Tensor | None
    count: Tensor
    proxy_of: Tensor
    admissible: Tensor
    full: Tensor
    forced: Tensor
    allowed: MaskMod
    block_size: int
    lengths: tuple[int, int]
    gradients: bool
    scale: float
    _kept: dict[Any, BlockMask] = field(default_factory=dict, init=False)  # of ``attention``, by what they depend on

    def block_map(self) -> Tensor:
        """Kept blocks: bool ``[B, Hq, Nq, Nk]``."""
        return selected_blocks(*self._ranks(), self.admissible)

    def _ranks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ranks, counts, and which ranks are those of each head."""
        if self.head_rank is None:
            return self.rank, self.count, self.proxy_of
        return self.head_rank, self.count, torch.arange(len(self.proxy_of), device=self.proxy_of.device)

    def density(self) -> Tensor:
        """Kept blocks divided by admissible blocks: fp32 ``[B, Hq]``; 1 where no block is admissible."""
        return density_of(self.block_map(), self.admissible)

    def summary(self) -> Summary:
        """Densities, budgets, forced blocks and dense rows of every head, in numbers; ``print`` it for a table.

        It waits for the device: call it to look at a selection, not on the way to a mask.
        """
        kept, num_proxies = self.block_map(), self.rank.shape[1]
        return summarize(kept, self.admissible, self.count, self.forced, num_proxies, self.block_size, self.lengths)

    def __repr__(self) -> str:
        return str(self.summary())

    def __getstate__(self) -> dict[str, Any]:
        return {**self._values(), "allowed": recipe_of(self.allowed)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        allowed = state["allowed"]
        self.__dict__.update(state, allowed=allowed.make() if isinstance(allowed, Recipe) else allowed, _kept={})

    def __copy__(self) -> Selection:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Selection:
        copies: Any = {name: copy.deepcopy(x, memo) for name, x in self._values().items() if isinstance(x, Tensor)}
        return replace(self, **copies)

    def _values(self) -> dict[str, Any]:
        return {part.name: getattr(self, part.name) for part in fields(self) if part.init}

    def mask_mod(self) -> MaskMod:
        """Membership alone, ``mask_mod(b, h, q_idx, kv_idx)``, for ``and_masks`` and ``create_block_mask``.

        It says which blocks are kept, not which tokens of them are allowed: combine it with the mask that was given.
        """
        return membership(self.block_map(), self.block_size)

    def block_mask(self) -> BlockMask:
        """The mask of ``build``: kept blocks, and within them the mask that was given."""
        return mask_of_blocks(*self._lists(), self.allowed, self.block_size, self.lengths, self.gradients)

    def listed_block_mask(self) -> BlockMask:
        """The same for a compiled kernel alone: it visits the listed blocks, and need not look up which are kept."""
        _, lists = self._lists()
        return of_lists(lists, self.allowed, self.block_size, self.lengths, self.gradients)

    @overload
    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, score_mod: Any = ..., kernel_options: dict[str, Any] | None = ...,
        return_lse: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, score_mod: Any = ..., kernel_options: dict[str, Any] | None = ...,
        return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        score_mod: Any = None,
        kernel_options: dict[str, Any] | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention to the kept blocks, under the mask and with the scale that they were selected for.

        The lists are made by the first call, and kept with the selection.

        Args:
            q, k, v: as in ``flexproxy.attention``, of the shapes that the blocks were selected for.
            score_mod, kernel_options, return_lse: as in ``flexproxy.attention``.

        Returns:
            ``[B, Hq, Sq, D]``, or that and the log-sum-exp, fp32 ``[B, Hq, Sq]``.

        Raises:
            TypeError, ValueError: an argument does not fit; the message says which, and what to do.
        """
        options = check_kernel_options(kernel_options)
        settings = Settings(None, self.scale, type(score_mod), options, return_lse)
        made_for = *self.count.shape[:2], *self.lengths
        target = made_for, self.count.device, self.block_size
        plan = plan_kernel((q, k, v), self.allowed, None, (*settings, *target))
        return plan.run(q, k, v, mask_for(self, plan), score_mod, self.block_mask)

    def _lists(self) -> tuple[Tensor, Lists]:
        kept, partial_number, partial_index, full_number, full_index = selected_lists(
            *self._ranks(), self.admissible, self.full
        )
        return kept, (partial_number, partial_index, full_number, full_index)


def mask_of_blocks(
    kept: Tensor, lists: Lists, allowed: MaskMod, block_size: int, lengths: tuple[int, int], gradients: bool
) -> BlockMask:
    """A mask of kept blocks, bool ``[B, Hq, Nq, Nk]``, and of the lists of them; the rest as in ``Selection``."""
    member = membership(kept, block_size)

    # NOTE: eager flex_attention looks at nothing but this function, so membership is part of it.
    def proxy_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return member(b, h, q_idx, kv_idx) & allowed(b, h, q_idx, kv_idx)

    return of_lists(lists, proxy_mask, block_size, lengths, gradients)


def mask_for(selection: Selection, plan: KernelPlan) -> BlockMask:
    """The mask of a selection that suits a kernel, made once and kept with it."""
    place = place_of(selection.count.device)
    key = place, plan.listed, plan.gradients
    block_mask = selection._kept.get(key)
    if block_mask is None:
        block_mask = plan.mask_of(replace(selection, gradients=plan.gradients))
        if place is not None:
            selection._kept[key] = block_mask
    return block_mask


def membership(block_map: Tensor, block_size: int) -> MaskMod:
    """A ``mask_mod`` that looks a token pair's block up in a map ``[B, Hq, Nq, Nk]``.

    Raises:
        ValueError: compiled kernels address the map with 32 bits, and it is too large for that.
    """
    if block_map.numel() > 2**31:
        raise ValueError(
            f"block_size: expected at most 2**31 block pairs in all, got {list(block_map.shape)} = "
            f"{block_map.numel()} with blocks of {block_size}; use a larger block_size, or fewer sequences a call"
        )

    def member(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return block_map[b, h, q_idx // block_size, kv_idx // block_size]

    return member


def _blocks_of_heads(a: Any) -> tuple[int, ...]:
    return a.rank.shape[0], a.count.shape[1], *a.rank.shape[2:]


@operator(lambda a: (_blocks_of_heads(a), torch.bool), has_kernel=False)
def selected_blocks(rank: Tensor, count: Tensor, proxy_of: Tensor, admissible: Tensor) -> Tensor:
    """The method in one line: bool ``[B, Hq, Nq, Nk]``."""
    return ((rank if rank.shape[1] == 1 else rank[:, proxy_of]) < count[..., None]) & admissible


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
