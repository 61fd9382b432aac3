"""What the peers' selections share: pooled blocks, the smallest cover of a mass, a BlockMask, a target density.

NOTE [Levels]
Every selection keeps more as one number grows. Its levels say of each block from which number on it is kept: fp32 or
wider ``[B, Hq, N, N]``, ``FORCED`` where it always is, inf above the diagonal, otherwise in [0, 1]. So the map of a
target density is a quantile of the levels, exact and found at once; no search runs the selection again and again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks

from flexproxy import masks
from flexproxy.selection import membership
from flexproxy.stages.lists import compile_block_mask

BLOCK_SIZE = 128
FORCED = -1.0
# Logits in one piece: on a GPU 256 MiB in bf16, 512 MiB in fp32; on a CPU what its caches hold.
CHUNK_ELEMENTS = 2**27 if torch.cuda.is_available() else 2**22

P = ParamSpec("P")


_timed = [True]


@contextmanager
def untimed() -> Iterator[None]:
    """Inside of a ``with`` statement, peers' estimates run uncompiled: untimed, they do not pay for the compilation."""
    _timed.append(False)
    try:
        yield
    finally:
        _timed.pop()


def compiled_on_gpu(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """The function, compiled by torch.compile for tensors on a GPU; its first argument is a tensor."""
    compiled = torch.compile(function)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        first = args[0]
        compiles = isinstance(first, Tensor) and first.is_cuda and _timed[-1]
        return compiled(*args, **kwargs) if compiles else function(*args, **kwargs)

    return run


def widen(x: Tensor) -> Tensor:
    """In fp32, or in fp64 if it was."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_prompt(q: Tensor, k: Tensor) -> None:
    """The peers' papers describe the prefill of a whole prompt, and so do these readings.

    Raises:
        ValueError: q ``[B, Hq, S, D]`` and k ``[B, Hkv, S, D]`` do not fit together.
    """
    fits = q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    if not fits or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: expected [B, Hkv, S, D] for q [B, Hq, S, D] with Hkv a divisor of Hq, got {list(k.shape)} for "
            f"{list(q.shape)}; pass the queries and keys of a whole prompt"
        )


def causal_blocks(num_blocks: int, device: torch.device) -> Tensor:
    """Blocks with any causal pair: bool ``[N, N]``."""
    return torch.ones(num_blocks, num_blocks, dtype=torch.bool, device=device).tril()


def pool_blocks(x: Tensor, block_size: int) -> Tensor:
    """Mean of the tokens that each block has, also of the last: ``[B, H, S, D]`` to ``[B, H, N, D]``, fp32 sums."""
    length = x.shape[2]
    num_blocks = -(-length // block_size)
    padded = F.pad(x, (0, 0, 0, num_blocks * block_size - length)).unflatten(2, (num_blocks, block_size))
    first = torch.arange(num_blocks, device=x.device) * block_size
    tokens = (length - first).clamp(max=block_size)
    mean: Tensor = padded.sum(3, dtype=torch.promote_types(x.dtype, torch.float32)) / tokens[:, None]
    return mean.to(x.dtype)


def grouped_logits(q: Tensor, k: Tensor) -> Tensor:
    """``q k^T`` of every query head with its key head, in the inputs' dtype: ``[B, Hq, M, N]``.

    q ``[B, Hq, M, D]``, k ``[B, Hkv, N, D]``; the keys are not repeated.
    """
    packed = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, Hkv, G M, D]
    logits: Tensor = (packed @ k.mT).unflatten(2, (-1, q.shape[2])).flatten(1, 2)
    return logits


def cover_levels(mass: Tensor, forced: Tensor, at_least: int = 0) -> Tensor:
    """Share of a row's mass that stands before each entry of the last dimension. See NOTE [Levels].

    The fewest entries that hold a fraction of the mass are those whose level is less than the fraction. Forced entries
    come first and count; then the heaviest, equals by index.

    Args:
        mass: ``[..., n]``, not negative.
        forced: bool, broadcast over ``mass``.
        at_least: entries that are kept in any case.
    """
    forced = forced.expand_as(mass)
    order = mass.masked_fill(forced, torch.inf).argsort(dim=-1, descending=True, stable=True)
    cumulative = mass.gather(-1, order).cumsum(-1)
    before = F.pad(cumulative[..., :-1], (1, 0)) / cumulative[..., -1:].clamp(min=torch.finfo(mass.dtype).tiny)
    before[..., :at_least] = FORCED
    return torch.empty_like(before).scatter_(-1, order, before).masked_fill_(forced, FORCED)


def budget_levels(scores: Tensor, masses: Tensor, forced: Tensor, at_least: int) -> Tensor:
    """Levels of the paper's budgets: a head's rows keep as many of their best blocks as hold gamma of its last queries.

    Args:
        scores: ``[B, Hq, N, N]``; equals go by index.
        masses: ``[B, Hq, N]`` of ``probe_masses``.
        forced: bool, broadcast over ``scores``; these come first and count.
        at_least: blocks that every row keeps in any case.
    """
    num_blocks = scores.shape[-1]
    causal = causal_blocks(num_blocks, scores.device)
    cumulative = masses.sort(dim=-1, descending=True).values.cumsum(-1)
    before = F.pad(cumulative[..., :-1], (1, 0))
    before[..., : max(1, at_least)] = FORCED
    keys = scores.masked_fill(forced, torch.inf).masked_fill(~causal, -torch.inf)
    order = keys.argsort(dim=-1, descending=True, stable=True)
    levels = torch.empty_like(order, dtype=before.dtype).scatter_(-1, order, before[..., None, :].expand(order.shape))
    return levels.masked_fill_(forced, FORCED).masked_fill_(~causal, torch.inf)


def forced_blocks(num_blocks: int, sink: int, local: int, last_rows: int, device: torch.device) -> Tensor:
    """First blocks, recent ones (the diagonal is the first of them), and whole last rows, causal: bool ``[N, N]``."""
    block = torch.arange(num_blocks, device=device)
    distance = block[:, None] - block
    return ((block < sink) | (distance < local) | (block[:, None] >= num_blocks - last_rows)) & (distance >= 0)


def probe_masses(q: Tensor, k: Tensor, block_size: int) -> Tensor:
    """Attention of the last ``block_size`` queries to every key block, their mean: ``[B, Hq, N]``, sums to 1."""
    length = q.shape[2]
    position = torch.arange(length, device=q.device)
    logits = grouped_logits(widen(q[:, :, -block_size:]), widen(k)) / math.sqrt(q.shape[3])
    probability = logits.masked_fill_(position > position[-block_size:, None], -torch.inf).softmax(-1).mean(2)
    masses: Tensor = F.pad(probability, (0, -length % block_size)).unflatten(-1, (-1, block_size)).sum(-1)
    return masses


def below(levels: Tensor, threshold: float) -> Tensor:
    """The blocks that a threshold keeps, bool; 1 keeps every causal one."""
    return levels < threshold if threshold < 1.0 else levels < torch.inf


def at_density(levels: Tensor, target: float) -> Tensor:
    """The blocks of the threshold whose density comes nearest to a target, found for each sequence: bool, as levels."""
    heads, num_blocks = levels.shape[1:3]
    causal = heads * num_blocks * (num_blocks + 1) // 2
    wanted = min(max(round(target * causal), 1), causal)
    flat = levels.flatten(1)
    threshold = flat.kthvalue(wanted, dim=1).values[:, None]
    with_equals, without = (flat <= threshold).sum(1), (flat < threshold).sum(1)
    take = (with_equals - wanted <= wanted - without)[:, None] | (threshold == FORCED)
    return torch.where(take, flat <= threshold, flat < threshold).view_as(levels)


def to_block_mask(block_map: Tensor, num_tokens: int, block_size: int = BLOCK_SIZE) -> BlockMask:
    """A causal BlockMask of the kept blocks, made by flexproxy's own code, so that all methods run the same kernel.

    Args:
        block_map: bool ``[B, Hq, N, N]``.
        num_tokens: length of the prompt.
    """
    block = torch.arange(block_map.shape[-1], device=block_map.device)
    whole_rows = (block + 1) * block_size <= num_tokens
    full = (block < block[:, None]) & whole_rows[:, None]
    mask_mod = and_masks(membership(block_map, block_size), masks.causal)
    return compile_block_mask(block_map, full[None, None], mask_mod, block_size, (num_tokens, num_tokens), False)


def density(block_map: Tensor) -> float:
    """Kept blocks divided by causal blocks, the mean over heads; waits for the device."""
    num_blocks = block_map.shape[-1]
    causal = block_map.shape[0] * block_map.shape[1] * num_blocks * (num_blocks + 1) // 2
    return int(block_map.sum()) / causal


def threshold_for_density(
    select: Callable[[float], Tensor], target: float, increasing: bool, tolerance: float = 0.005, steps: int = 40
) -> tuple[float, float]:
    """The threshold in [0, 1] whose selection is nearest to a target density, by bisection, and the density reached.

    Args:
        select: block map of a threshold.
        target: kept / causal blocks, in (0, 1].
        increasing: whether a larger threshold keeps more.
        tolerance: relative distance from the target that ends the search.
    """
    low, high = 0.0, 1.0
    best = (0.5, float("inf"))
    for _ in range(steps):
        middle = (low + high) / 2
        reached = density(select(middle))
        if abs(reached - target) < abs(best[1] - target):
            best = (middle, reached)
        if abs(reached - target) <= tolerance * target:
            break
        if (reached < target) == increasing:
            low = middle
        else:
            high = middle
    return best
