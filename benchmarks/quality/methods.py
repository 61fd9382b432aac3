"""Ways to choose the blocks of a prefill, each brought to a density, or with the settings that its authors give it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

import flexproxy
from benchmarks.baselines import LEVELS, at_density, mean_correction
from benchmarks.baselines.blocks import BLOCK_SIZE, below, causal_blocks, grouped_logits, widen
from benchmarks.quality.trials import TRIALS
from flexproxy import ProxyConfig
from flexproxy.stages.proxy import head_groups

COMPENSATED, DELTA = " + means", " + delta"
DELTA_STRIDE = 64


class Place(NamedTuple):
    """A layer: its index in the model, and which one it is of how many that attend to everything."""

    layer: int
    nth: int
    total: int


Select: TypeAlias = Callable[[Tensor, Tensor, Place], Tensor]
Correct: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """A way to choose blocks.

    Attributes:
        name: of the contender: ``dense``, ``flexproxy`` with its settings, a peer or a trial.
        setting: what it is brought to: ``density 0.1``, ``gamma 0.95``, ``defaults``; empty for dense.
        select: q ``[B, Hq, S, D]``, k ``[B, Hkv, S, D]`` and the place of the layer to a causal map of blocks, bool
            ``[B, Hq, N, N]``, for scores with the factor 1 / sqrt(D); None keeps all of them.
        correct: q, k, v, output, log-sum-exp and map to another output, for methods that correct it.
    """

    name: str
    setting: str = ""
    select: Select | None = None
    correct: Correct | None = None

    def __str__(self) -> str:
        return f"{self.name}, {self.setting}" if self.setting else self.name


DENSE = Method("dense")


@dataclass(frozen=True)
class Contender:
    """A selection by levels (NOTE [Levels] in ``benchmarks.baselines.blocks``).

    Attributes:
        name: what results call it.
        levels: of q and k.
        default: the threshold of its authors, None where there is none.
        at_default: what else they set, beside their threshold; at a given density ``min_budget`` is the run's.
        dense_layers: first layers that stay dense; a density is the mean over all layers.
        correct: as in ``Method``.
    """

    name: str
    levels: Callable[..., Tensor]
    default: float | None = None
    at_default: Mapping[str, Any] | None = None
    takes_budget: bool = False
    dense_layers: int = 0
    correct: Correct | None = None

    def at(self, target: float, min_budget: int) -> Method:
        """Brought to a density."""
        levels = functools.partial(self.levels, min_budget=min_budget) if self.takes_budget else self.levels

        def choose(q: Tensor, k: Tensor, place: Place) -> Tensor:
            share = (target * place.total - self.dense_layers) / max(1, place.total - self.dense_layers)
            return at_density(levels(q, k), max(share, 0.0))

        return Method(self.name, f"density {target:g}", self._after_dense_layers(choose), self.correct)

    def with_defaults(self) -> Method:
        """As its authors set it."""
        threshold = 1.0 if self.default is None else self.default
        settings = dict(self.at_default or {})

        def choose(q: Tensor, k: Tensor, place: Place) -> Tensor:
            return below(self.levels(q, k, **settings), threshold)

        return Method(self.name, "defaults", self._after_dense_layers(choose), self.correct)

    def _after_dense_layers(self, choose: Select) -> Select:
        def select(q: Tensor, k: Tensor, place: Place) -> Tensor:
            if place.nth >= self.dense_layers:
                return choose(q, k, place)
            num_blocks = -(-q.shape[2] // BLOCK_SIZE)
            return causal_blocks(num_blocks, q.device).expand(*q.shape[:2], num_blocks, num_blocks)

        return select


def _means(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block_map: Tensor) -> Tensor:
    return mean_correction(q, k, v, out, lse, block_map)


def delta_correction(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block_map: Tensor) -> Tensor:
    """Delta attention (arXiv 2505.11254): every 64th query attends densely, and what that changes is added to all
    queries up to the next. Arguments and result as ``Method.correct``'s."""
    position = torch.arange(q.shape[2], device=q.device)
    chosen = position[::DELTA_STRIDE]
    logits = widen(grouped_logits(q[:, :, chosen], k)) / q.shape[3] ** 0.5
    weights = logits.masked_fill_(position > chosen[:, None], -torch.inf).softmax(-1).to(v.dtype)
    exact = (weights.unflatten(1, (k.shape[1], -1)) @ v[:, :, None]).flatten(1, 2)
    difference = (widen(exact) - widen(out[:, :, chosen])).repeat_interleave(DELTA_STRIDE, 2)[:, :, : q.shape[2]]
    return (widen(out) + difference).to(out.dtype)


_RANKING: dict[str, Any] = {"default": 0.95, "takes_budget": True}
_V2 = functools.partial(LEVELS["FlashPrefill V2"], sink_blocks=2, local_blocks=4)
PEERS = (
    Contender("XAttention", LEVELS["XAttention"], 0.9),
    Contender("XAttention, stride 16", functools.partial(LEVELS["XAttention"], stride=16), 0.9),
    Contender("FlexPrefill", LEVELS["FlexPrefill"], 0.95, {"min_budget": 1024}, takes_budget=True),
    Contender("FlashPrefill", LEVELS["FlashPrefill"], 1 - 0.12),
    # As its server runs it; and as sparse as it can be, which is what a low density needs.
    Contender("FlashPrefill V2", functools.partial(_V2, last_rows=8), 1 - 0.12, dense_layers=4, correct=_means),
    Contender("FlashPrefill V2, 2 last rows, no dense layers", _V2, 1 - 0.12, correct=_means),
    Contender("Prism", LEVELS["Prism"], 0.95),
    Contender("oracle", LEVELS["oracle"], **_RANKING),
    Contender("oracle, per row", LEVELS["oracle, per row"], **_RANKING),
    Contender("mean-pooled", LEVELS["mean-pooled"], **_RANKING),
    Contender("sink + recent", LEVELS["sink + recent"], **_RANKING),
    Contender("random", LEVELS["random"], **_RANKING),
)
BASELINES = {peer.name: peer for peer in PEERS}
EXPERIMENTS = {
    f"trial: {name}": Contender(f"trial: {name}", levels, takes_budget=True) for name, levels in TRIALS.items()
}


def methods_of(
    configs: Sequence[ProxyConfig],
    baselines: Iterable[str],
    densities: Sequence[float],
    gammas: Sequence[float],
    min_budget: int,
    compensate: bool = False,
) -> list[Method]:
    """Dense, then every config and baseline at every density, then every config at every gamma.

    Args:
        configs: flexproxy's variants; their density or gamma is replaced.
        baselines: names in ``BASELINES`` or ``EXPERIMENTS``.
        min_budget: tokens that every row keeps at least, for the baselines that have such a setting.
        compensate: every config once more with dropped blocks as means, and once with delta correction.
    """
    found = [DENSE]
    for target in densities:
        found += _flexproxy([replace(config, density=target) for config in configs], compensate)
        found += [(BASELINES | EXPERIMENTS)[name].at(target, min_budget) for name in baselines]
    for gamma in gammas:
        found += _flexproxy([replace(config, gamma=gamma, density=None) for config in configs], compensate)
    return found


def _flexproxy(configs: Sequence[ProxyConfig], compensate: bool) -> list[Method]:
    plain = [of_config(config) for config in configs]
    return plain + [twin for method in plain for twin in corrected(method) if compensate]


def corrected(method: Method) -> list[Method]:
    """A method with each correction of its output."""
    means = replace(method, name=method.name + COMPENSATED, correct=_means)
    return [means, replace(method, name=method.name + DELTA, correct=delta_correction)]


def of_config(config: ProxyConfig, name: str | None = None, setting: str | None = None) -> Method:
    """flexproxy with certain settings."""
    target = f"gamma {config.gamma:g}" if config.density is None else f"density {config.density:g}"

    def select(q: Tensor, k: Tensor, _place: Place) -> Tensor:
        return flexproxy.select(q, k, config=config).block_map()

    return Method(name or name_of_config(config), setting or target, select)


def of_layers(name: str, setting: str, configs: Mapping[int, ProxyConfig]) -> Method:
    """flexproxy with settings of its own for every layer, as ``flexproxy calibrate`` writes them."""

    def select(q: Tensor, k: Tensor, place: Place) -> Tensor:
        return flexproxy.select(q, k, config=configs[place.layer]).block_map()

    return Method(name, setting, select)


def shared(config: ProxyConfig, number: int) -> Method:
    """flexproxy, where so many layers that attend to everything have the blocks of the first of them."""
    found: list[Tensor] = []

    def select(q: Tensor, k: Tensor, place: Place) -> Tensor:
        if place.nth % number == 0:
            found[:] = [flexproxy.select(q, k, config=config).block_map()]
        return found[0]

    plain = of_config(config)
    return Method(f"{plain.name}, shared by {number} layers", plain.setting, select)


def name_of_config(config: ProxyConfig) -> str:
    """``flexproxy P 3, stride 4``: the proxies, and the strides of queries and keys, where they differ both.

    Forced blocks, and ``sharing``, are named where they are not the defaults.
    """
    stride = ":".join(map(str, dict.fromkeys(config.strides)))
    kind = "stride" if config.query_choice == "first" else config.query_choice
    names, usual = {"sink_blocks": "sink", "local_blocks": "local", "dense_last_blocks": "last"}, ProxyConfig()
    forced = {short: getattr(config, name) for name, short in names.items()}
    is_usual = all(getattr(usual, name) == getattr(config, name) for name in names)
    shown = "" if is_usual else ", ".join(["", *(f"{name} {n}" for name, n in forced.items())])
    sharing = "" if config.sharing == usual.sharing else f", {config.sharing}"
    return f"flexproxy P {config.num_proxies}, {kind} {stride}{sharing}{shown}"


def fits(config: ProxyConfig, num_heads: int, num_kv_heads: int) -> str | None:
    """None, or why a config does not fit a model's heads."""
    try:
        head_groups(config, num_heads, num_kv_heads)
    except ValueError as error:
        return str(error)
    return None
