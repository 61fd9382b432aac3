"""The demo: a small trained Llama prefills a text with planted needles, once dense and once with flexproxy.

Everything here returns data; ``flexproxy.cli`` prints it. Needs transformers, which is imported when it is first used.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
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

_NAME = "flexproxy_demo"  # of the attention, in transformers
_REPEATS = 3

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what is being done, layers done, layers in all)``."""


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
        first_seconds: the first prefill with flexproxy, in which its kernels are compiled.
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


class _Attention:
    """The attention function that transformers calls; ``observe``, if set, gets every selection."""

    def __init__(self, config: flexproxy.ProxyConfig) -> None:
        self.config = config
        self.observe: Callable[[flexproxy.Selection], None] | None = None

    def __call__(
        self, _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        if self.observe is not None:
            self.observe(flexproxy.select(query, key, config=self.config, scale=scaling))
        # The text is short: on a GPU it would be dense.
        out = flexproxy.attention(query, key, value, config=self.config, scale=scaling, when="always")
        return out.transpose(1, 2), None  # [B, Sq, Hq, D]


def _no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """The mask function: attention is causal by default; padding is an error."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("the demo's attention is for sequences without padding")


class _Prefills:
    """Prefills of one sequence, one after another: each is timed, and its layers are counted.

    Used in a ``with`` statement, which leaves the model as it was.
    """

    def __init__(self, model: LlamaForCausalLM, tokens: Tensor, count: int, progress: Progress | None) -> None:
        self._model, self._tokens, self._progress = model, tokens, progress or (lambda *_: None)
        self._stage, self._done, self._total = "", 0, count * model.config.num_hidden_layers

    def __enter__(self) -> _Prefills:
        self._hooks = [layer.register_forward_hook(self._layer_done) for layer in self._model.model.layers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._model.set_attn_implementation("sdpa")

    def _layer_done(self, *_: object) -> None:
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


def _measure(batch: NeedleBatch, logits: Tensor, seconds: float) -> Prefill:
    exact = exact_answers(logits.argmax(-1), batch)
    nats = F.cross_entropy(logits[0, :-1].float(), batch.tokens[0, 1:], reduction="none")
    text = ~batch.planted[0, 1:]
    return Prefill(int(exact.sum()), float(nats[text].mean()) / math.log(2), seconds)


def _check(model: LlamaForCausalLM, config: flexproxy.ProxyConfig, layer: int | None) -> None:
    """Validate the arguments before the prefills."""
    shape: Any = model.config
    head_dim = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    if layer is not None and not 0 <= layer < shape.num_hidden_layers:
        raise InputError(f"--layer: the model has layers 0 to {shape.num_hidden_layers - 1}, got {layer}")
    q = torch.zeros(1, shape.num_attention_heads, config.block_size, head_dim)
    k = torch.zeros(1, shape.num_key_value_heads, config.block_size, head_dim)
    try:
        flexproxy.select(q, k, config=config)
    except ValueError as error:
        raise InputError(str(error)) from error


@torch.no_grad()
def run(
    model: LlamaForCausalLM,
    text: Tensor,
    config: flexproxy.ProxyConfig,
    *,
    num_needles: int,
    seed: int,
    layer: int | None = None,
    progress: Progress | None = None,
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
    from transformers import AttentionInterface, AttentionMaskInterface

    _check(model, config, layer)
    try:
        planted = plant(text, num_needles, torch.Generator().manual_seed(seed))
    except ValueError as error:
        raise InputError(str(error)) from error
    batch = NeedleBatch(*(tensor.to(model.device) for tensor in planted))
    density: list[tuple[float, ...]] = []
    selections: list[flexproxy.Selection] = []

    def observe(selection: flexproxy.Selection) -> None:  # layer after layer
        density.append(tuple(selection.density()[0].tolist()))
        selections.append(selection)

    attention = _Attention(config)
    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, _no_mask)
    with _Prefills(model, batch.tokens, 3 + 2 * _REPEATS, progress) as prefills:
        dense, _ = prefills.run("dense, warming up", "sdpa")
        sparse, first_seconds = prefills.run("flexproxy, compiling", _NAME)
        seconds = [
            (prefills.run("dense, timed", "sdpa")[1], prefills.run("flexproxy, timed", _NAME)[1])
            for _ in range(_REPEATS)
        ]
        attention.observe = observe
        prefills.run("flexproxy, looking at the selections", _NAME)
    dense_seconds, sparse_seconds = map(statistics.median, zip(*seconds, strict=True))
    if layer is None:
        layer = max(range(len(density)), key=lambda index: max(density[index]) - min(density[index]))

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
