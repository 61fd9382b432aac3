"""Peers' ways to choose blocks, read from their papers, for comparison on flexproxy's own sparse kernel.

Each is a function of q ``[B, Hq, S, D]``, k ``[B, Hkv, S, D]`` and a threshold to a map of kept blocks, bool
``[B, Hq, N, N]``: causal, blocks of 128, any length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from benchmarks.baselines.blocks import density, threshold_for_density, to_block_mask
from benchmarks.baselines.flashprefill import flashprefill
from benchmarks.baselines.flexprefill import flexprefill
from benchmarks.baselines.xattention import xattention

__all__ = [
    "METHODS",
    "Method",
    "density",
    "flashprefill",
    "flexprefill",
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
}
