"""Observers of the attention calls of a model's layers.

NOTE [Observers]
The attention modules of the observed model hold their observers in an attribute, so other models are not affected; a
layer without observers only looks for that attribute. Layers that gradient checkpointing runs again in a backward pass
were observed before, and are not observed again. Observers are Python, which a trace of torch.compile would run once
and never again: a trace is an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from flexproxy import ProxyConfig, Selection
from flexproxy.integrations.transformers.settings import all_modules, attention_layers
from flexproxy.ops import compat

Moment: TypeAlias = Any  # float seconds on a CPU, torch.cuda.Event on a GPU
Observer: TypeAlias = "Callable[[Call], None]"
_ATTRIBUTE = "flexproxy_observers"


@dataclass
class Call:
    """One call of a layer's attention, which observers get when it is done.

    Attributes:
        module: the attention module.
        query, key: ``[B, Hq, Sq, D]``, ``[B, Hkv, Skv, D]``, after the position embedding.
        mask: what transformers passed as ``attention_mask``.
        scale: factor of the scores; None is 1 / sqrt(D).
        config: the settings of this process's heads; None where the layer got no BlockMask.
        selection: the blocks that were attended to; None where the call was dense.
        dense: why it was dense, in a few words; None where it was sparse.
        begin, built, end: when it began, had its BlockMask, and was done; built is None where it was dense.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    mask: Tensor | BlockMask | None
    begin: Moment
    scale: float | None = None
    config: ProxyConfig | None = None
    selection: Selection | None = None
    dense: str | None = None
    built: Moment = None
    end: Moment = field(init=False)

    @property
    def layer(self) -> int:
        """Index of the layer."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    def note(self, selection: Selection) -> None:
        """Called when the BlockMask is made."""
        self.selection, self.built = selection, now(self.query.device)


def now(device: torch.device) -> Moment:
    """This moment: on a GPU, when the work queued so far is done."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def milliseconds(begin: Moment, end: Moment) -> float:
    """Milliseconds between two moments of one device; waits for the later one."""
    if isinstance(begin, float):
        return 1e3 * float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end))


def observers_of(module: nn.Module) -> tuple[Observer, ...]:
    """The observers of this call of a layer's attention. See NOTE [Observers]."""
    observers: tuple[Observer, ...] = getattr(module, _ATTRIBUTE, ())
    if observers and torch.compiler.is_compiling():
        refuse_a_trace("whose trace nobody can look into", "call the model itself")
    return () if observers and compat.in_backward() else observers


def _refuse(why: str, remedy: str) -> None:
    raise ValueError(
        f"model: expected one that runs as it is written, got one compiled by torch.compile, {why}; {remedy}, and with "
        "generate use disable_compile=True"
    )


# An exception raised in the trace itself would make dynamo run the function uncompiled from then on.
refuse_a_trace: Callable[[str, str], None] = torch.compiler.disable(_refuse)


@contextmanager
def observe(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Pass every attention call of the model's layers to ``observer``, inside of a ``with`` statement.

    There may be several observers at once. Afterwards, also after an exception, the model is as it was.

    Raises:
        TypeError, ValueError: as ``configure``.
    """
    modules = all_modules(attention_layers(model))
    for module in modules:
        _set(module, (*getattr(module, _ATTRIBUTE, ()), observer))
    try:
        yield
    finally:
        for module in modules:
            _set(module, tuple(x for x in getattr(module, _ATTRIBUTE, ()) if x is not observer))


def _set(module: nn.Module, observers: tuple[Observer, ...]) -> None:
    if observers:
        setattr(module, _ATTRIBUTE, observers)
    elif hasattr(module, _ATTRIBUTE):
        delattr(module, _ATTRIBUTE)
