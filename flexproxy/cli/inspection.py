"""One prefill of a model, looked at: what ``flexproxy inspect`` prints and draws.

Everything here returns data; ``flexproxy.cli`` prints it. Needs transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import flexproxy
from flexproxy.cli.inputs import InputError
from flexproxy.inspect.record import Record, totals_of
from flexproxy.integrations.transformers.observing import Call, observe
from flexproxy.integrations.transformers.settings import attention_layers

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what is being done, layers done, layers in all)``."""


@dataclass(frozen=True)
class Inspection:
    """What a prefill showed.

    Attributes:
        record: of all layers, kernels having been compiled before.
        layer: the layer that was looked at.
        call: what its attention did.
    """

    record: Record
    layer: int
    call: Call


def check_layer(model: PreTrainedModel, layer: int | None, head: int | None) -> None:
    """Find what cannot work before a minute is spent on it.

    Raises:
        InputError: there is no such layer or query head.
    """
    layers = attention_layers(model)
    heads = int(model.config.get_text_config().num_attention_heads)
    if layer is not None and layer not in layers:
        raise InputError(f"--layer: expected one of {min(layers)} to {max(layers)}, got {layer}; counted from 0")
    if head is not None and not 0 <= head < heads:
        raise InputError(f"--ranking: expected a query head from 0 to {heads - 1}, got {head}; counted from 0")


@torch.no_grad()
def prefill(
    model: PreTrainedModel, tokens: Tensor, *, layer: int | None = None, mass: bool = False, progress: Progress
) -> Inspection:
    """Prefill ``tokens`` twice: once to compile kernels, once to look on.

    Args:
        model: with ``attn_implementation="flexproxy"``.
        tokens: int64 ``[1, S]``, on the model's device.
        layer: the layer to look at; None is the one whose heads differ most in density.
        mass: as in ``flexproxy.record``.
        progress: called when a layer's attention is done.
    """
    calls: list[Call] = []

    def keep(call: Call) -> None:
        if call.layer == chosen:
            calls[:] = [call]

    # Without the head of the model, whose logits of a long text can be larger than the model.
    with flexproxy.record(model) as first, _told(model, "compiling kernels", progress):
        model.base_model(input_ids=tokens, use_cache=False)
    chosen = _most_varied(first) if layer is None else layer
    with flexproxy.record(model, mass=mass) as record, observe(model, keep), _told(model, "recording", progress):
        model.base_model(input_ids=tokens, use_cache=False)
    return Inspection(record, chosen, calls[0])


def _most_varied(record: Record) -> int:
    """The layer whose heads differ most in density; the first if none was sparse."""

    def spread(layer: int) -> float:
        density = totals_of(record.layers[layer]).density
        return max(density) - min(density) if density else -1.0

    return max(record.layers, key=spread)


@contextmanager
def _told(model: PreTrainedModel, stage: str, progress: Progress) -> Iterator[None]:
    layers = len(attention_layers(model))
    done = 0

    def advance(call: Any) -> None:
        nonlocal done
        done += 1
        progress(stage, done, layers)

    progress(stage, 0, layers)
    with observe(model, advance):
        yield
