"""What a model predicts while some of its layers are sparse and the others dense."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy import ProxyConfig
from flexproxy.calibration.choose import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flexproxy.integrations.transformers.observing import Call

_DENSE = ProxyConfig(gamma=1.0)


class Lost(NamedTuple):
    """What sparse layers keep, and how far they take a model's predictions from those that it makes densely.

    density: kept / admissible blocks of every sparse layer, the mean over sequences and heads.
    divergence: bits per token, the Kullback-Leibler divergence from the dense prediction, the mean over positions.
    agreement: share of the positions whose most probable next token is the one of dense attention.
    """

    density: dict[int, float]
    divergence: float
    agreement: float

    def mean(self) -> dict[str, float]:
        density = fmean(self.density.values())
        return {"density": round(density, 4), "divergence": round(self.divergence, 5), "agreement": self.agreement}


class Reader:
    """A model with flexproxy's attention, and sequences that it has read densely.

    Args:
        model: inside of ``reading``.
        tokens: int64 ``[B, S]``.
        positions: of each sequence, whose predictions are compared.

    Attributes:
        layers: those with causal self-attention, in order.

    Raises:
        ValueError: there are no such layers, or two with one index.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, positions: int) -> None:
        self._model, self._tokens = model, tokens.to(model.device)
        last = tokens.shape[1] - 2
        places = torch.linspace(0, last, min(positions, last + 1), dtype=torch.float64).round().long()
        self._places = places.to(model.device)
        seen, self._dense = self._read({})
        self.layers = [layer for layer, _ in seen]
        twice = next((layer for layer in self.layers if self.layers.count(layer) > 1), None)
        if twice is not None:
            raise CalibrationError(
                f"model: expected one decoder, got two with a layer {twice}; calibrate the one that reads text"
            )
        if not self.layers:
            raise CalibrationError(
                f"model: expected causal layers that read {tokens.shape[1]} tokens, got none in "
                f"{type(model).__name__}; use configure with a ProxyConfig"
            )

    def lost(self, settings: Mapping[int, ProxyConfig]) -> Lost:
        """By layers with these settings, where all others are dense."""
        seen, found = self._read(settings)
        density = {layer: float(kept) for layer, kept in seen if layer in settings}
        pairs = list(zip(self._dense, found, strict=True))  # sequence by sequence, for they are large
        divergence = [divergence_of(dense, own) for dense, own in pairs]
        agreement = [float((dense.argmax(-1) == own.argmax(-1)).double().mean()) for dense, own in pairs]
        return Lost(density, fmean(divergence) / math.log(2), fmean(agreement))

    @torch.no_grad()
    def _read(self, settings: Mapping[int, ProxyConfig]) -> tuple[list[tuple[int, Tensor | float]], Tensor]:
        """Causal layers with their densities, in order, and log-probabilities fp32 ``[B, n, vocabulary]``."""
        from flexproxy.integrations.transformers.observing import observe
        from flexproxy.integrations.transformers.settings import configure

        seen: list[tuple[int, Tensor | float]] = []

        def see(call: Call) -> None:
            if isinstance(call.mask, BlockMask):
                kept = 1.0 if call.selection is None else call.selection.density().double().mean()
                seen.append((call.layer, kept))

        configure(self._model, _DENSE)
        configure(self._model, dict(settings), when="always")
        with observe(self._model, see):
            logits = self._model(input_ids=self._tokens, use_cache=False, logits_to_keep=self._places).logits
        return seen, logits.float().log_softmax(-1)


def divergence_of(dense: Tensor, own: Tensor) -> float:
    """In nats, the mean over positions, of log-probabilities ``[n, vocabulary]``; -inf is of tokens ruled out."""
    each = dense.exp() * (dense - own)
    return float(each.masked_fill(dense.isneginf(), 0.0).sum(-1).double().mean())


@contextmanager
def reading(model: PreTrainedModel) -> Iterator[None]:
    """With flexproxy's attention in a model and the models inside of it; afterwards it is as it was.

    Another model is not affected.
    """
    from transformers import PreTrainedModel

    from flexproxy.integrations.transformers import NAME
    from flexproxy.integrations.transformers.settings import settings_kept

    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    with settings_kept(model):
        try:
            for config in configs:
                config._attn_implementation = NAME
            yield
        finally:
            for config, implementation in zip(configs, before, strict=True):  # outer ones first: they set the inner
                config._attn_implementation = implementation
