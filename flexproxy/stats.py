"""Density and recovered attention mass of a Selection or of any BlockMask.

Not for the way to a mask: these functions read all keys for every query that they look at, and wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy.checks import check_fit, check_masks, check_queries_and_keys, check_rows, check_scale
from flexproxy.inspect.summary import density_of
from flexproxy.masks.blocks import depends_on
from flexproxy.masks.sampled import evaluate
from flexproxy.masks.structure import MaskMod
from flexproxy.ops.tensors import pad_to_multiple
from flexproxy.pipeline import causal_at_end, classify
from flexproxy.selection import Selection
from flexproxy.stages.lists import dense_maps

__all__ = ["block_mass", "density", "recovered_mass"]

CHUNK_ELEMENTS = 2**24  # scores in one piece, 64 MiB


def density(q: Tensor, k: Tensor, mask: Selection | BlockMask, *, mask_mod: MaskMod | None = None) -> Tensor:
    """Kept blocks divided by admissible blocks: fp32 ``[B, Hq]``; 1 where no block is admissible.

    Args:
        q, k, mask, mask_mod: as in ``recovered_mass``; of q and k only the shapes matter.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
    """
    _check(q, k, mask, mask_mod)
    if isinstance(mask, Selection):
        return mask.density()
    kept, admissible = kept_and_full_blocks(mask)[0], admissible_blocks(q, k, mask, mask_mod)
    return density_of(kept & admissible, admissible).expand(q.shape[:2]).contiguous()


@torch.no_grad()
def recovered_mass(
    q: Tensor,
    k: Tensor,
    mask: Selection | BlockMask,
    *,
    mask_mod: MaskMod | None = None,
    scale: float | None = None,
    rows: int | Tensor = 256,
) -> Tensor:
    """Share of dense attention's probability that the kept token pairs hold, the mean over queries: fp32 ``[B, Hq]``.

    Exact in fp32 for these queries. Memory is that of the keys in fp32 and some rows of scores. A pair
    counts as kept where a compiled kernel reads it: its block is listed, and is full or the BlockMask's own function
    allows the pair.

    Args:
        q: queries ``[B, Hq, Sq, D]``, after the position embedding; fp32, fp16 or bf16.
        k: keys ``[B, Hkv, Skv, D]``, Sq <= Skv; Hkv divides Hq.
        mask: a Selection of ``flexproxy.select``, or any BlockMask for q and k.
        mask_mod: the mask of dense attention beside a BlockMask, which does not say it; None is causal, aligned at the
            end. A Selection knows its own.
        scale: factor of the scores; None is 1 / sqrt(D).
        rows: queries to look at: a number, that many at random from all parts of the sequence, always the same ones; or
            their indices, an int tensor ``[m]``. Queries without an admissible key are left out.

    Returns:
        1 where everything is kept; NaN where none of the queries has an admissible key.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
    """
    _check(q, k, mask, mask_mod)
    scale = check_scale(scale, q.shape[3])
    dense, kept = _pairs(q, k, mask, mask_mod)
    total = torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
    number = torch.zeros_like(total)
    for part, allowed, probability in _probabilities(q, k, dense, _row_indices(rows, q), scale):
        valid = allowed.any(-1)
        share = probability.masked_fill_(~kept.at(part, k.shape[2]), 0.0).sum(-1)
        total += torch.where(valid, share, 0.0).sum(-1)
        number += valid.sum(-1)
    return (total / number).float()


@torch.no_grad()
def block_mass(
    q: Tensor,
    k: Tensor,
    mask: Selection | BlockMask,
    *,
    head: int,
    batch: int = 0,
    mask_mod: MaskMod | None = None,
    scale: float | None = None,
) -> Tensor:
    """Dense attention's probability in every block pair of one head, the mean over a row's queries: fp32 ``[Nq, Nk]``.

    A row sums to 1, or to 0 where no query has an admissible key. It reads all pairs of tokens, in chunks.

    Args:
        q, k, mask, mask_mod, scale: as in ``recovered_mass``; the mask gives the blocks, and says what is admissible.
        head: the query head.
        batch: the sequence.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
    """
    _check(q, k, mask, mask_mod)
    check_index("head", head, q.shape[1])
    check_index("batch", batch, q.shape[0])
    scale = check_scale(scale, q.shape[3])
    q_size, k_size = block_size_of(mask)
    dense, _ = _pairs(q, k, mask, mask_mod)
    key_head = head * k.shape[1] // q.shape[1]
    one = q[batch, head][None, None], k[batch, key_head][None, None]
    every_row = torch.arange(q.shape[2], device=q.device)
    by_row, valid = [], []
    for _, allowed, probability in _probabilities(*one, dense, every_row, scale, (batch, head)):
        valid.append(allowed.any(-1)[0, 0])
        padded = pad_to_multiple(probability[0, 0], -1, k_size, 0.0)
        masses = reduce(padded, "row (j y) -> row j", "sum", y=k_size)
        by_row.append(torch.where(valid[-1][:, None], masses, 0.0))
    masses = pad_to_multiple(torch.cat(by_row), -2, q_size, 0.0)
    number = pad_to_multiple(torch.cat(valid).float(), -1, q_size, 0.0)
    masses = reduce(masses, "(i x) j -> i j", "sum", x=q_size)
    return masses / reduce(number, "(i x) -> i 1", "sum", x=q_size).clamp(min=1)


def block_size_of(mask: Selection | BlockMask) -> tuple[int, int]:
    """Tokens per block, of queries and of keys."""
    if isinstance(mask, Selection):
        return mask.block_size, mask.block_size
    q_size, k_size = mask.BLOCK_SIZE
    return q_size, k_size


def kept_and_full_blocks(mask: Selection | BlockMask) -> tuple[Tensor, Tensor]:
    """Blocks that a mask keeps, and those that it keeps in full: bool ``[b, h, Nq, Nk]``, b and h may be 1."""
    if isinstance(mask, Selection):
        kept = mask.block_map()
        return kept, kept & mask.full
    (num_queries, num_keys), (q_size, k_size) = mask.shape[-2:], mask.BLOCK_SIZE
    return dense_maps(mask, -(-num_queries // q_size), -(-num_keys // k_size))


def admissible_blocks(q: Tensor, k: Tensor, mask: Selection | BlockMask, mask_mod: MaskMod | None) -> Tensor:
    """Blocks of the size of a mask's that dense attention would read: bool ``[b, h, Nq, Nk]``, b and h may be 1."""
    if isinstance(mask, Selection):
        return mask.admissible
    q_size, k_size = mask.BLOCK_SIZE
    size = math.gcd(q_size, k_size)
    blocks = classify(q, k, mask_mod, size)[1].any
    rows, columns = q_size // size, k_size // size
    blocks = pad_to_multiple(pad_to_multiple(blocks, -1, columns, False), -2, rows, False)
    by_row: Tensor = blocks.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
    return by_row.any(5).any(3)


class _Pairs(NamedTuple):
    """A mask for pairs of tokens, evaluated some rows at a time.

    sizes: of the batch and of the heads, 1 where the function does not depend on it.
    blocks: any and full, bool ``[b, h, Nq, Nk]``: all pairs of a full block are allowed, and of any other block those
        that the function allows; None if the function says it all.
    """

    mask_mod: MaskMod
    sizes: tuple[int, int]
    blocks: tuple[Tensor, Tensor] | None
    block_size: tuple[int, int]

    def at(self, rows: Tensor, num_keys: int) -> Tensor:
        """bool ``[b, h, rows, Skv]``, where b and h may be 1."""
        shape = (*self.sizes, len(rows), num_keys)
        allowed = evaluate(self.mask_mod, shape, lambda b, h, row, key: rows[row], rows.device)
        if self.blocks is None:
            return allowed
        q_size, k_size = self.block_size
        any_, full = (x[:, :, rows // q_size].repeat_interleave(k_size, -1)[..., :num_keys] for x in self.blocks)
        return any_ & (full | allowed)


def _pairs(q: Tensor, k: Tensor, mask: Selection | BlockMask, mask_mod: MaskMod | None) -> tuple[_Pairs, _Pairs]:
    """The pairs that dense attention reads, and the pairs in listed blocks."""

    def pairs(function: MaskMod, blocks: tuple[Tensor, Tensor] | None) -> _Pairs:
        on_batch, on_head = depends_on(function, q.device)
        sizes = q.shape[0] if on_batch else 1, q.shape[1] if on_head else 1
        return _Pairs(function, sizes, blocks, block_size_of(mask))

    if isinstance(mask, Selection):
        admissible = mask.admissible, mask.full
        return pairs(mask.allowed, admissible), pairs(mask.allowed, kept_and_full_blocks(mask))
    dense = causal_at_end(q, k) if mask_mod is None else mask_mod
    return pairs(dense, None), pairs(mask.mask_mod, kept_and_full_blocks(mask))


def _probabilities(
    q: Tensor, k: Tensor, dense: _Pairs, rows: Tensor, scale: float, only: tuple[int, int] | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some rows at a time: their indices, the allowed pairs, and the probabilities ``[B, Hq, rows, Skv]``.

    Rows without an allowed pair hold NaN. only: q and k are of this sequence and head alone.
    """
    num_kv_heads, num_keys = k.shape[1], k.shape[2]
    keys = k.float().transpose(-1, -2)
    width = max(q.shape[0], dense.sizes[0]) * max(q.shape[1], dense.sizes[1]) * num_keys
    for part in rows.split(max(1, CHUNK_ELEMENTS // width)):
        allowed = dense.at(part, num_keys)
        if only is not None:
            allowed = allowed.expand(max(allowed.shape[0], only[0] + 1), max(allowed.shape[1], only[1] + 1), -1, -1)
            allowed = allowed[only][None, None]
        queries = rearrange(q[:, :, part].float(), "b (kv g) m d -> b kv (g m) d", kv=num_kv_heads)
        scores = rearrange(queries @ keys, "b kv (g m) key -> b (kv g) m key", m=len(part)).mul_(scale)
        yield part, allowed, scores.masked_fill_(~allowed, -torch.inf).softmax(-1)


def _row_indices(rows: Any, q: Tensor) -> Tensor:
    """The queries to look at, each once, ascending: int64 ``[m]``."""
    num_queries = q.shape[2]
    if isinstance(rows, Tensor):
        if rows.dim() != 1 or not rows.numel() or rows.is_floating_point() or rows.dtype == torch.bool:
            raise ValueError(
                f"rows: expected indices [m] of an integer dtype, got {rows.dtype} of shape {list(rows.shape)}; use "
                "for example torch.arange(0, Sq, 100)"
            )
        if not 0 <= int(rows.min()) <= int(rows.max()) < num_queries:
            raise ValueError(
                f"rows: expected indices from 0 to {num_queries - 1}, got {int(rows.min())} to {int(rows.max())}; "
                "they count the queries, Sq in all"
            )
        indices: Tensor = rows.to(q.device, torch.int64).unique()
        return indices
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows: expected a number of queries or their indices, got {rows!r}; use for example 256")
    return spread_rows(num_queries, rows).to(q.device)


def spread_rows(num_queries: int, number: int) -> Tensor:
    """One query of each of ``number`` runs of equal length, ascending, the same ones every time: int64 ``[m]``.

    At random, for evenly spaced ones can all be among those that the scores sample.
    """
    number = min(number, num_queries)
    ends = torch.arange(number + 1) * num_queries // number
    within = torch.rand(number, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ends[:-1] + (within * ends.diff()).to(torch.int64)


def _check(q: Tensor, k: Tensor, mask: Any, mask_mod: Any) -> None:
    check_queries_and_keys(q, k)
    check_masks(mask_mod, None, q, k, 0)
    if isinstance(mask, BlockMask):
        check_rows("mask", mask)
        check_fit("mask", mask, q, k)
        return
    if not isinstance(mask, Selection):
        raise TypeError(
            f"mask: expected a Selection or a BlockMask, got {type(mask).__name__}; pass flexproxy.select(q, k), or a "
            "function as mask_mod="
        )
    if mask_mod is not None:
        raise ValueError(
            "mask_mod: expected None beside a Selection, which knows its mask, got a function; leave it out"
        )
    made_for = (*mask.count.shape[:2], *mask.lengths)
    given = (*q.shape[:2], q.shape[2], k.shape[2])
    if made_for != given:
        raise ValueError(
            f"mask: expected a Selection for B, Hq, Sq, Skv = {given}, as q and k, got one for {made_for}; pass the q "
            "and k that it was made from"
        )


def check_index(name: str, value: Any, number: int) -> None:
    """Raise unless ``value`` is an index from 0 to ``number - 1``."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < number:
        raise ValueError(f"{name}: expected an index from 0 to {number - 1}, got {value!r}; counted from 0")
