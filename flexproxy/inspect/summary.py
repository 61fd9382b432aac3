"""A selection in numbers: what ``Selection.summary()`` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PerHead = tuple[tuple[float, ...], ...]
PerHeadCount = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Summary:
    """What every head keeps, in numbers; ``str`` of it is a table. Nested tuples are ``[B][Hq]``.

    Attributes:
        batch, num_q_heads, num_proxies: B, Hq, P.
        num_queries, num_keys: Sq, Skv, in tokens.
        num_q_blocks, num_k_blocks: Nq, Nk.
        block_size: tokens per block.
        density: kept blocks / admissible blocks; 1 where no block is admissible.
        count: the most blocks that a row keeps which is not dense, where so many are admissible.
        budget: the same in tokens, at most Skv.
        forced: the most forced blocks of a row; they are part of the count.
        dense_rows: rows of blocks that keep all that is admissible, and at least one block.
        rows: rows of blocks with an admissible block.
    """

    batch: int
    num_q_heads: int
    num_proxies: int
    num_queries: int
    num_keys: int
    num_q_blocks: int
    num_k_blocks: int
    block_size: int
    density: PerHead
    count: PerHeadCount
    budget: PerHeadCount
    forced: PerHeadCount
    dense_rows: PerHeadCount
    rows: PerHeadCount

    def __str__(self) -> str:
        sequences = "1 sequence" if self.batch == 1 else f"{self.batch} sequences"
        proxies = "1 proxy" if self.num_proxies == 1 else f"{self.num_proxies} proxies"
        lines = [
            f"Selection: {sequences}, {self.num_q_heads} query heads, {proxies}; {self.num_queries} queries, "
            f"{self.num_keys} keys; {self.num_q_blocks} x {self.num_k_blocks} blocks of {self.block_size} tokens",
            f"{'over heads and sequences':<30}{'min':>10}{'mean':>10}{'max':>10}",
            _row("density (kept / admissible)", self.density, ".3f"),
            _row("count (blocks a row)", self.count, "d"),
            _row("budget (tokens a row)", self.budget, "d"),
            _row("forced (blocks a row, at most)", self.forced, "d"),
            _row("rows kept dense (of blocks)", self.dense_rows, "d"),
            _row("rows in all (of blocks)", self.rows, "d"),
        ]
        return "\n".join(lines)


def density_of(kept: Tensor, admissible: Tensor) -> Tensor:
    """Kept blocks divided by admissible blocks: fp32 ``[B, Hq]``; 1 where no block is admissible."""
    number, of = kept.sum((-2, -1)), admissible.sum((-2, -1))
    return torch.where(of > 0, number / of.clamp(min=1), 1.0).to(torch.float32)


def summarize(
    kept: Tensor,
    admissible: Tensor,
    count: Tensor,
    forced: Tensor,
    num_proxies: int,
    block_size: int,
    lengths: tuple[int, int],
) -> Summary:
    """The numbers of a selection, by its fields; reads them back from its device."""
    batch, num_q_heads, num_q_blocks, num_k_blocks = kept.shape
    num_queries, num_keys = lengths
    some = admissible.any(-1).expand(kept.shape[:3])
    dense = some & (kept == admissible).all(-1)
    limited = torch.where(count < num_k_blocks, count, 0).amax(-1)
    count = torch.where(limited > 0, limited, num_k_blocks)
    return Summary(
        batch=batch,
        num_q_heads=num_q_heads,
        num_proxies=num_proxies,
        num_queries=num_queries,
        num_keys=num_keys,
        num_q_blocks=num_q_blocks,
        num_k_blocks=num_k_blocks,
        block_size=block_size,
        density=as_tuples(density_of(kept, admissible)),
        count=as_tuples(count),
        budget=as_tuples((count * block_size).clamp(max=num_keys)),
        forced=as_tuples(forced.expand(batch, num_q_heads)),
        dense_rows=as_tuples(dense.sum(-1)),
        rows=as_tuples(some.sum(-1)),
    )


def _row(name: str, values: Sequence[Sequence[float]], form: str) -> str:
    flat = [value for heads in values for value in heads]
    mean = f"{sum(flat) / len(flat):.3f}" if form == ".3f" else f"{sum(flat) / len(flat):.1f}"
    return f"{name:<30}{min(flat):>10{form}}{mean:>10}{max(flat):>10{form}}"


def as_tuples(values: Tensor) -> tuple[tuple[Any, ...], ...]:
    return tuple(map(tuple, values.tolist()))
