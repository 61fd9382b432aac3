"""The demo: a small trained Llama prefills a text with planted needles, once dense and once with flexproxy.

Everything here returns data; ``flexproxy.cli`` prints it. Needs transformers, which is imported when it is first used.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flexproxy
from flexproxy.cli.inputs import InputError
from flexproxy.cli.needle import NeedleBatch, exact_answers, plant
from flexproxy.environment import processor, versions

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from flexproxy.cli.common import Advance

_REPEATS = 3


@dataclass(frozen=True)
class Prefill:
    """Results of a prefill with one attention.

    Attributes:
        exact_answers: queries whose four bytes were all predicted.
        bits_per_byte: mean over the bytes of the text; planted tokens are left out.
        seconds: one prefill of the whole sequence, compilation left out; the median of three.
    """

    exact_answers: int
    bits_per_byte: float
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo.

    Attributes:
        tokens: length of the sequence; one byte of text is one token.
        queries: needles planted, each asked for once.
        device: name of the processor; ``dtype`` is what the model ran in.
        first_seconds: the first prefill with flexproxy, in which kernels of a GPU are compiled.
        mean_density: kept blocks / admissible blocks, mean over layers and heads.
        density: the same of every layer and head, ``[layers][Hq]``.
        layer: index of the layer that ``selection`` belongs to.
        selection: the blocks that each head of that layer keeps; not part of the JSON form.
    """

    tokens: int
    queries: int
    seed: int
    device: str
    dtype: str
    config: flexproxy.ProxyConfig
    dense: Prefill
    sparse: Prefill
    first_seconds: float
    mean_density: float
    density: tuple[tuple[float, ...], ...]
    layer: int
    selection: flexproxy.Selection = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The result as plain dicts, lists and numbers, and the versions that it was made with."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "selection"}
        nested = {name: asdict(plain[name]) for name in ("config", "dense", "sparse")}
        return plain | nested | {"density": [list(heads) for heads in self.density], "versions": versions()}


class _Prefills:
    """Prefills of one sequence, one after another: each is timed, and its layers are counted."""

    def __init__(self, model: LlamaForCausalLM, tokens: Tensor, count: int, progress: Advance | None) -> None:
        self._model, self._tokens, self._progress = model, tokens, progress or (lambda *_: None)
        self._stage, self._done, self._total = "", 0, count * model.config.num_hidden_layers

    def layer_done(self, *_: object) -> None:
        self._done += 1
        self._progress(self._stage, self._done, self._total)

    def run(self, stage: str, implementation: str) -> tuple[Tensor, float]:
        """Logits ``[1, S, vocabulary]``, and the seconds that they took."""
        self._stage = stage
        self._progress(stage, self._done, self._total)
        self._model.set_attn_implementation(implementation)
        self._wait()
        begin = time.perf_counter()
        logits = self._model(input_ids=self._tokens, use_cache=False).logits
        self._wait()
        return logits, time.perf_counter() - begin

    def _wait(self) -> None:
        if self._tokens.is_cuda:
            torch.cuda.synchronize(self._tokens.device)


@contextmanager
def _prepared(model: LlamaForCausalLM, config: flexproxy.ProxyConfig, layer_done: Any) -> Iterator[None]:
    """Configure a model, and count its layers; afterwards it is as it was."""
    from flexproxy.integrations.transformers import configuration, configure

    before = configuration(model)
    try:
        configure(model, config, when="always")  # the text is short: on a GPU it would be dense
    except ValueError as error:
        raise InputError(str(error)) from error
    hooks = [layer.register_forward_hook(layer_done) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        configure(model, before)
        model.set_attn_implementation("sdpa")


def _measure(batch: NeedleBatch, logits: Tensor, seconds: float) -> Prefill:
    exact = exact_answers(logits.argmax(-1), batch)
    nats = F.cross_entropy(logits[0, :-1].float(), batch.tokens[0, 1:], reduction="none")
    text = ~batch.planted[0, 1:]
    return Prefill(int(exact.sum()), float(nats[text].mean()) / math.log(2), seconds)


@torch.no_grad()
def run(
    model: LlamaForCausalLM,
    text: Tensor,
    config: flexproxy.ProxyConfig,
    *,
    num_needles: int,
    seed: int,
    layer: int | None = None,
    progress: Advance | None = None,
) -> DemoResult:
    """Prefill ``text`` with needles planted into it, dense and with flexproxy, and compare.

    Both ways run once untimed first, which compiles what has to be compiled and warms both alike, then by turns three
    times. What the heads select is looked at in a run of its own, so it is in none of the times.

    Args:
        model: as ``load_model`` gives it.
        text: uint8 ``[1, S]``.
        config: how flexproxy selects.
        num_needles: needles to plant, and queries to answer.
        seed: of the positions, keys and values.
        layer: the layer whose block map is kept; None is the one whose heads differ most in density.
        progress: called at the begin of every prefill and after every layer.

    Raises:
        InputError: the config does not fit the model, or the text has no room for the needles.
    """
    layers = model.config.num_hidden_layers
    if layer is not None and not 0 <= layer < layers:
        raise InputError(f"--layer: the model has layers 0 to {layers - 1}, got {layer}")
    try:
        planted = plant(text, num_needles, torch.Generator().manual_seed(seed))
    except ValueError as error:
        raise InputError(str(error)) from error
    batch = NeedleBatch(*(tensor.to(model.device) for tensor in planted))
    prefills = _Prefills(model, batch.tokens, 3 + 2 * _REPEATS, progress)
    with _prepared(model, config, prefills.layer_done):
        dense, _ = prefills.run("dense, warming up", "sdpa")
        sparse, first_seconds = prefills.run("flexproxy, warming up", "flexproxy")
        seconds = [
            (prefills.run("dense, timed", "sdpa")[1], prefills.run("flexproxy, timed", "flexproxy")[1])
            for _ in range(_REPEATS)
        ]
        with flexproxy.record(model, selections=True) as record:
            prefills.run("flexproxy, looking at the selections", "flexproxy")
    selections = record.selections
    density = [tuple(selections[index].density()[0].tolist()) for index in range(layers)]
    dense_seconds, sparse_seconds = map(statistics.median, zip(*seconds, strict=True))
    if layer is None:
        layer = max(range(layers), key=lambda index: max(density[index]) - min(density[index]))

    return DemoResult(
        tokens=text.shape[1],
        queries=num_needles,
        seed=seed,
        device=processor(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        config=config,
        dense=_measure(batch, dense, dense_seconds),
        sparse=_measure(batch, sparse, sparse_seconds),
        first_seconds=first_seconds,
        mean_density=sum(map(sum, density)) / sum(map(len, density)),
        density=tuple(density),
        layer=layer,
        selection=selections[layer],
    )
