"""Small tensor helpers that several stages share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores, logarithms of probabilities, are told apart in steps of 1/64, down to -64. Bin 0 is for what has no need of a
# score, the last one for what has none, or a lower one.
NUM_BINS, BINS_PER_UNIT = 4096, 64


def pad_to_multiple(x: Tensor, dim: int, multiple: int, value: float) -> Tensor:
    """Pad the end of a dimension (negative, from the last) to a multiple; ``x`` itself, not a copy, if it is one."""
    missing = -x.shape[dim] % multiple
    return F.pad(x, (0, 0) * (-dim - 1) + (0, missing), value=value) if missing else x


def logsumexp_(x: Tensor, maximum: Tensor) -> Tensor:
    """``x.logsumexp(-2)``, given ``x.amax(-2)``, in the memory of ``x``: half the passes. -inf for a column of -inf."""
    finite = maximum.masked_fill(maximum == -torch.inf, 0.0)
    return x.sub_(finite[..., None, :]).exp_().sum(-2).log_().add_(finite)


def is_contiguous(members: Sequence[int], sizes: Sequence[int], num_heads: int) -> bool:
    """Whether the groups are equal runs of consecutive heads, each head once."""
    return len(set(sizes)) == 1 and list(members) == list(range(num_heads))
