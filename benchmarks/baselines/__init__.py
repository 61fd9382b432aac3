"""Other ways to choose blocks, for comparison on flexproxy's own sparse kernel.

Each is a function of q ``[B, Hq, S, D]``, k ``[B, Hkv, S, D]`` and a threshold to a map of kept blocks, bool
``[B, Hq, N, N]``: causal, blocks of 128, any length. ``METHODS`` are peers, read from their papers, that are timed.
``UNTIMED`` are compared in quality alone: rankings with flexproxy's budgets, of which the oracle costs dense attention,
and FlashPrefill V2, whose kernel does more than a BlockMask says (``mean_correction``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from benchmarks.baselines.blocks import density, threshold_for_density, to_block_mask
from benchmarks.baselines.flashprefill import flashprefill
from benchmarks.baselines.flashprefill_v2 import flashprefill_v2, mean_correction
from benchmarks.baselines.flexprefill import flexprefill
from benchmarks.baselines.mean_pooled import mean_pooled
from benchmarks.baselines.oracle import oracle, oracle_per_row
from benchmarks.baselines.prism import prism
from benchmarks.baselines.random_blocks import random_blocks
from benchmarks.baselines.sink_recent import sink_recent
from benchmarks.baselines.xattention import xattention

__all__ = [
    "METHODS",
    "UNTIMED",
    "Method",
    "density",
    "flashprefill",
    "flashprefill_v2",
    "flexprefill",
    "mean_correction",
    "mean_pooled",
    "oracle",
    "oracle_per_row",
    "prism",
    "random_blocks",
    "sink_recent",
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

UNTIMED = {
    "FlashPrefill V2": Method(flashprefill_v2, False),
    "oracle": Method(oracle, True),
    "oracle, per row": Method(oracle_per_row, True),
    "mean-pooled": Method(mean_pooled, True),
    "sink + recent": Method(sink_recent, True),
    "random": Method(random_blocks, True),
}
