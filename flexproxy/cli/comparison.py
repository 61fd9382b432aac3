"""A model prefills a text dense and with a few settings: what they keep, change and take. Returns data.

Needs transformers, which is imported when it is first used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexproxy import ProxyConfig
from flexproxy.cli.inputs import InputError
from flexproxy.environment import processor, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    from flexproxy.cli.common import Advance
    from flexproxy.inspect.record import Record

POSITIONS = 1024
LIMIT = 1.0  # percent of the loss
FASTER = 1.05  # times dense: what is nearer may be chance, for each is prefilled once
DENSITIES = (0.25, 0.12)


@dataclass(frozen=True)
class Setting:
    """One prefill.

    Attributes:
        name: ``dense``, or that of ``settings_of``.
        asked: the density that was asked for, 1 of dense; None where the prompt decides.
        density: kept blocks / admissible blocks, mean over layers and heads; a layer that stayed dense counts as 1.
        agreement: share of the compared positions at which dense attention's most probable next token is the most
            probable one.
        loss: bits per token, mean over the compared positions.
        seconds: until the last hidden state of the prompt is there; compilation is left out.
    """

    name: str
    asked: float | None
    density: float
    agreement: float
    loss: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """All settings on one text, dense first. ``compared`` positions are spread evenly over the text."""

    tokens: int
    compared: int
    device: str
    dtype: str
    settings: tuple[Setting, ...]

    def loss_over_dense(self, setting: Setting) -> float:
        """In percent of dense attention's loss."""
        return 100 * (setting.loss / self.settings[0].loss - 1)

    def speed(self, setting: Setting) -> float:
        """How many times as fast as dense."""
        return self.settings[0].seconds / setting.seconds

    def verdict(self) -> str:
        """One line: the fastest setting that loses little, or why there is none."""
        faster = [setting for setting in self.settings[1:] if self.speed(setting) >= FASTER]
        if not faster:
            return f"Stay dense at this length: no setting is faster at {self.tokens} tokens on this {self.device}."
        good = [setting for setting in faster if self.loss_over_dense(setting) <= LIMIT]
        best = max(good, key=self.speed) if good else min(faster, key=self.loss_over_dense)
        told, lost = f"{best.name}, {self.speed(best):.2f} times as fast as dense", self.loss_over_dense(best)
        if good:
            return f"The fastest that loses at most {LIMIT:g} %: {told}, {lost:+.2f} % loss."
        return (
            f"Every faster setting loses more than {LIMIT:g} %; the one that loses least: {told}, {lost:+.2f} % loss."
        )

    def missed(self) -> list[str]:
        """The settings whose density is above the one asked for, which a short text's forced blocks are."""
        above = [x for x in self.settings if x.density > (x.asked or 1.0) + 0.01]
        return [f"{x.name} keeps {x.density:.3f}" for x in above]

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain data, with the versions that it was made with."""
        settings = [
            asdict(x) | {"loss_over_dense_percent": self.loss_over_dense(x), "times_dense": self.speed(x)}
            for x in self.settings
        ]
        plain = {name: getattr(self, name) for name in ("tokens", "compared", "device", "dtype")}
        return plain | {"settings": settings, "verdict": self.verdict(), "versions": versions()}


def settings_of(densities: Sequence[float]) -> dict[str, ProxyConfig]:
    """What is compared, by name: the defaults, and densities.

    Raises:
        InputError: one is none.
    """
    try:  # below what min_budget keeps a density would be that of min_budget
        chosen = {f"density {density:g}": ProxyConfig(density=density, min_budget=256) for density in densities}
    except ValueError as error:
        raise InputError(f"--{error}") from error
    return {"gamma 0.95": ProxyConfig()} | chosen


class _WarmError(Exception):
    """Ends a warm-up."""


class _Prefills:
    """Prefills of one sequence, one after another; their layers are counted."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, progress: Advance) -> None:
        from flexproxy.integrations.transformers.settings import all_modules, attention_layers

        self.model, self.tokens, self.progress = model, tokens.to(model.device), progress
        self.modules = all_modules(attention_layers(model))
        steps = min(POSITIONS, tokens.shape[1] - 1)
        self.places = torch.linspace(0, tokens.shape[1] - 2, steps, dtype=torch.float64).long().to(model.device)
        self.labels = self.tokens[0, self.places + 1]

    def warm_up(self, name: str) -> None:
        """Compile and load kernels: the first layers, until one of every kind has run and a second one."""
        kinds = set(self._kinds())
        seen: list[Any] = []

        def done(module: Any) -> None:
            seen.append(self._kinds()[self.modules.index(module)])
            if len(seen) == len(self.modules) or (len(seen) > 1 and set(seen) == kinds):
                raise _WarmError

        with suppress(_WarmError):
            self._run(f"{name}, warming up", done)

    def timed(self, name: str) -> tuple[Tensor, float]:
        """Logits float ``[positions, vocabulary]``, and the seconds until the last hidden state."""
        return self._run(name, lambda _: None)

    def _kinds(self) -> list[Any]:
        known = getattr(self.model.config.get_text_config(), "layer_types", None)
        shapes = [getattr(module, "head_dim", None) for module in self.modules]
        return list(zip(shapes, known, strict=True)) if known and len(known) == len(shapes) else shapes

    @torch.no_grad()
    def _run(self, stage: str, done: Callable[[Any], None]) -> tuple[Tensor, float]:
        count, end = 0, 0.0

        def layer_done(module: Any, *_: Any) -> None:
            nonlocal count
            count += 1
            self.progress(stage, count, len(self.modules))
            done(module)

        def all_done(*_: Any) -> None:
            nonlocal end
            self._wait()
            end = time.perf_counter()

        self.progress(stage, 0, len(self.modules))
        hooks = [module.register_forward_hook(layer_done) for module in self.modules]
        hooks.append(self.model.base_model.register_forward_hook(all_done))
        try:
            self._wait()
            begin = time.perf_counter()
            logits = self.model(input_ids=self.tokens, use_cache=True, logits_to_keep=self.places).logits
        finally:
            for hook in hooks:
                hook.remove()
        return logits[0].float(), end - begin

    def _wait(self) -> None:
        if self.tokens.is_cuda:
            torch.cuda.synchronize(self.tokens.device)


@contextmanager
def _set(model: PreTrainedModel, config: ProxyConfig) -> Iterator[None]:
    """With these settings in every layer, whatever they cost; afterwards the model is dense."""
    from flexproxy.integrations.transformers import configure

    try:
        configure(model, config, when="always")
    except ValueError as error:
        raise InputError(error) from error
    model.set_attn_implementation("flexproxy")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def compare(
    model: PreTrainedModel, tokens: Tensor, progress: Advance, settings: Mapping[str, ProxyConfig]
) -> Comparison:
    """Prefill a text dense and with each of the settings, once each.

    Before each comes a warm-up of the first layers, which compiles and loads kernels; it is not timed.

    Args:
        model: dense, with the attention "sdpa".
        tokens: int64 ``[1, S]``, S at least 2.
        progress: called at the begin of every prefill and after every layer.
        settings: by name, as of ``settings_of``.

    Raises:
        InputError: there is only one token, or the settings do not fit the model.
    """
    import flexproxy

    if tokens.shape[1] < 2:
        raise InputError("the text has one token; pass a longer one")
    prefills = _Prefills(model, tokens, progress)
    prefills.warm_up("dense")
    dense, seconds = prefills.timed("dense")
    chosen = dense.argmax(-1)

    def setting(name: str, asked: float | None, logits: Tensor, seconds: float, density: float) -> Setting:
        agreement = (logits.argmax(-1) == chosen).float().mean().item()
        loss = F.cross_entropy(logits, prefills.labels).item() / math.log(2)
        return Setting(name, asked, density, agreement, loss, seconds)

    found = [setting("dense", 1.0, dense, seconds, 1.0)]
    del dense
    for name, config in settings.items():
        with _set(model, config):
            prefills.warm_up(name)
            with flexproxy.record(model) as record:
                logits, seconds = prefills.timed(name)
        found.append(setting(name, config.density, logits, seconds, _density(record)))
    return Comparison(
        tokens=tokens.shape[1],
        compared=len(prefills.places),
        device=processor(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        settings=tuple(found),
    )


def _density(record: Record) -> float:
    """Mean over layers and heads; dense layers count as 1."""
    passes = [one for passes in record.layers.values() for one in passes]
    heads = [one.density[0] if one.density else (1.0,) for one in passes]
    return sum(sum(x) / len(x) for x in heads) / len(heads)


def figure(comparison: Comparison) -> Figure:
    """Loss and time of every setting, as bars."""
    from flexproxy.plot.figures import DARK, MIDDLE, add_title, plain_style

    with plain_style():
        from matplotlib.figure import Figure

        drawing = Figure(figsize=(9.0, 3.2), layout="constrained")
        left, right = drawing.subplots(1, 2, sharey=True)
        settings = comparison.settings
        names = [f"{x.name}\nkept {x.density:.3f}" for x in settings]
        for axes, values, colour, label in (
            (left, [comparison.loss_over_dense(x) for x in settings], MIDDLE, "loss, % more than dense"),
            (right, [x.seconds for x in settings], DARK, "seconds to the first token"),
        ):
            bars = axes.barh(names, values, color=colour, height=0.6)
            axes.bar_label(bars, fmt="%.2f", padding=3)
            axes.margins(x=0.15)
            axes.set_xlabel(label)
        left.invert_yaxis()
        add_title(drawing, f"{comparison.tokens} tokens, {comparison.dtype}, {comparison.device}")
    return drawing
