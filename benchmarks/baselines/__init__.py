"""Other ways to choose blocks, for comparison on flexproxy's own sparse kernel.

``METHODS`` are peers, read from their papers, that are timed: functions of q ``[B, Hq, S, D]``, k ``[B, Hkv, S, D]``
and a threshold to a map of kept blocks, bool ``[B, Hq, N, N]``: causal, blocks of 128, any length.
``LEVELS`` are these and what is compared in quality alone, as functions of q and k to levels (NOTE [Levels] in
``blocks``): FlashPrefill V2, whose kernel does more than a BlockMask says (``mean_correction``), and rankings with
flexproxy's budgets, of which the oracles cost dense attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from benchmarks.baselines.blocks import at_density, density, threshold_for_density, to_block_mask
from benchmarks.baselines.flashprefill import flashprefill, flashprefill_levels
from benchmarks.baselines.flashprefill_v2 import flashprefill_v2, flashprefill_v2_levels, mean_correction
from benchmarks.baselines.flexprefill import flexprefill, flexprefill_levels
from benchmarks.baselines.oracle import oracle_levels, oracle_per_row_levels
from benchmarks.baselines.prism import prism, prism_levels
from benchmarks.baselines.rankings import mean_pooled_levels, random_levels, sink_recent_levels
from benchmarks.baselines.xattention import xattention, xattention_levels

__all__ = [
    "LEVELS",
    "METHODS",
    "Method",
    "at_density",
    "density",
    "flashprefill",
    "flashprefill_v2",
    "flexprefill",
    "mean_correction",
    "prism",
    "threshold_for_density",
    "to_block_mask",
    "xattention",
]


class Method(NamedTuple):
    """A selection with its threshold, and whether a larger threshold keeps more."""

    select: Callable[[Tensor, Tensor, float], Tensor]
    increasing: bool


METHODS = {
    "XAttention": Method(xattention, True),
    "FlexPrefill": Method(flexprefill, True),
    "FlashPrefill": Method(flashprefill, False),
    "Prism": Method(prism, True),
}

LEVELS: dict[str, Callable[..., Tensor]] = {
    "XAttention": xattention_levels,
    "FlexPrefill": flexprefill_levels,
    "FlashPrefill": flashprefill_levels,
    "Prism": prism_levels,
    "FlashPrefill V2": flashprefill_v2_levels,
    "oracle": oracle_levels,
    "oracle, per row": oracle_per_row_levels,
    "mean-pooled": mean_pooled_levels,
    "sink + recent": sink_recent_levels,
    "random": random_levels,
}
