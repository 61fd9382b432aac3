"""Ways in which a tensor ``[B, H, S, D]`` may lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Layout = Callable[[Tensor], Tensor]


def heads_first(x: Tensor) -> Tensor:
    return x.contiguous()


def tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def part(x: Tensor) -> Tensor:
    """Of a larger tensor; each row begins where the copy engine can load it, if it is long enough."""
    return torch.cat([x, x, x], -1)[..., x.shape[3] : 2 * x.shape[3]]


def odd(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1))[..., :-1]


def shifted(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


def turned(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def every_second(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


def expanded(x: Tensor) -> Tensor:
    """The first head, for all."""
    return x[:, :1].contiguous().expand_as(x)


LOADABLE: list[Layout] = [heads_first, tokens_first, part]
OTHERS: list[Layout] = [odd, shifted, turned, every_second]
