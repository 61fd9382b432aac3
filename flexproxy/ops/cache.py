"""Tensors that are kept from call to call, because making them again takes longer than what they are for.

NOTE [Kept tensors]
What follows from lengths and settings alone is the same in every layer of a model, and up to some ten thousand tokens
the host takes longer to launch the kernels that make it than they run; a CPU classifies the blocks of 32K tokens for
half as long as it scores them. So the last such tensors are kept. Each belongs to the stream that it was made on, for
the work of another would not wait for it. None is kept from the capture of a CUDA graph, whose memory is the graph's,
nor given to one, which would read it when it is gone; nor is any kept where a compiler, a mode of torch or a transform
of torch.func makes something else than tensors with values.

Whoever gets such a tensor must not write to it, nor give it to a caller, who might.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch

from flexproxy.ops import compat, implementations

Function = TypeVar("Function", bound=Callable[..., Any])


def kept(maximum: int) -> Callable[[Function], Function]:
    """Keep the last results of a function of a device and of other hashable arguments. See NOTE [Kept tensors]."""

    def decorate(make: Function) -> Function:
        @functools.lru_cache(maximum)
        def keep(place: Hashable, *args: Hashable) -> Any:
            return make(*args)

        @functools.wraps(make)
        def call(device: torch.device, *args: Hashable) -> Any:
            place = place_of(device)
            return make(device, *args) if place is None else keep(place, device, *args)

        return cast(Function, call)

    return decorate


def place_of(device: torch.device) -> Hashable | None:
    """What else tensors depend on that are made now; None if they may not be kept."""
    if torch.compiler.is_compiling() or compat.in_a_mode():
        return None
    stream = None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        index: int | None = device.index
        # The number alone: torch.cuda.current_stream takes the host longer.
        stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device() if index is None else index)
    return stream, torch.is_inference_mode_enabled(), implementations.chosen()
