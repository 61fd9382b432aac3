"""Looking on while the layers of a model attend, at what attention itself estimates.

NOTE [Observers]
The attention modules carry their observers in an attribute, while there are any; a layer without one does nothing
more than look for it. What gradient checkpointing computes again in a backward pass was observed before, and is not
again. Observers are Python, which a trace of torch.compile would run once and never again: so a trace is an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexproxy import ProxyConfig, Selection
from flexproxy.integrations.transformers.settings import all_modules, attention_layers
from flexproxy.ops import compat

Moment: TypeAlias = "float | torch.cuda.Event"
Observer: TypeAlias = "Callable[[Call], None]"
_ATTRIBUTE = "flexproxy_observers"


@dataclass
class Call:
    """One call of a layer's attention, as observers see it when it is done.

    Attributes:
        module: the attention module.
        query, key: ``[B, Hq, Sq, D]``, ``[B, Hkv, Skv, D]``, after the position embedding.
        scale: factor of the scores; None is 1 / sqrt(D).
        config: the settings of this process's heads; None where no mask by blocks came.
        selection: the blocks that were attended to; None where the call was dense.
        dense: why it was dense, in a few words; None where it was sparse.
        begin, built, end: when it began, had its BlockMask, and was done; built is None where it was dense.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    begin: Moment
    scale: float | None = None
    config: ProxyConfig | None = None
    selection: Selection | None = None
    dense: str | None = None
    built: Moment | None = None
    end: Moment | None = None

    @property
    def layer(self) -> int:
        """Index of the layer."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    def note(self, selection: Selection) -> None:
        """The BlockMask is made."""
        self.selection, self.built = selection, now(self.query.device)


def now(device: torch.device) -> Moment:
    """This moment: on a GPU, when it has done what was queued until now."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def milliseconds(begin: Moment, end: Moment) -> float:
    """Milliseconds between two moments of one device; waits for the later one."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return 1e3 * (end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end))


def observers_of(module: nn.Module) -> tuple[Observer, ...]:
    """Who looks on at this call of a layer's attention. See NOTE [Observers]."""
    observers: tuple[Observer, ...] = getattr(module, _ATTRIBUTE, ())
    if observers and torch.compiler.is_compiling():
        refuse_a_trace()
    return () if observers and compat.in_backward() else observers


def _no_compiled_model_can_be_observed() -> None:
    raise ValueError(
        "model: expected one that runs as it is written, got one compiled by torch.compile, whose trace nobody can "
        "look into; call the model itself, and with generate use disable_compile=True"
    )


# What is raised in a trace itself is taken for a reason to run the same uncompiled, from then on.
refuse_a_trace: Callable[[], None] = torch.compiler.disable(_no_compiled_model_can_be_observed)


@contextmanager
def observe(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Show every call of the attention of every layer to ``observer``, inside of a ``with`` statement.

    Several may look on at once. Afterwards, also after an exception, the model is as it was.

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


@contextmanager
def record_selections(model: PreTrainedModel) -> Iterator[dict[int, Selection]]:
    """Keep what the layers select in the forward passes inside of a ``with`` statement, by layer, the last of each.

    They are those that attention itself made. Dense layers have none. ``flexproxy.record`` keeps numbers instead, of
    every pass.

    Raises:
        TypeError, ValueError: as ``configure``.
    """
    selections: dict[int, Selection] = {}

    def keep(call: Call) -> None:
        if call.selection is not None:
            selections[call.layer] = call.selection

    with observe(model, keep):
        yield selections
