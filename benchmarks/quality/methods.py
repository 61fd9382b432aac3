"""Ways to choose the blocks of a prefill, each brought to a density, or to a mass of attention."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import flexproxy
from benchmarks.baselines import METHODS, UNTIMED, density, threshold_for_density
from benchmarks.baselines import Method as Baseline
from benchmarks.baselines.oracle import block_mass
from flexproxy import ProxyConfig

BASELINES = METHODS | UNTIMED
CORRECTED = "FlashPrefill V2"  # its kernel adds the means of the blocks that it drops
COMPENSATED = " + means"
WITHOUT_CORRECTION = f"{CORRECTED}, selection only"


@dataclass(frozen=True)
class Method:
    """A way to choose blocks.

    Attributes:
        name: of the contender: ``dense``, ``flexproxy`` with its settings, or one of the baselines.
        setting: what it is brought to: ``density 0.1``, ``gamma 0.95``; empty for dense.
        select: q ``[1, Hq, S, D]`` and k ``[1, Hkv, S, D]`` to a causal map of blocks, bool ``[1, Hq, N, N]``, for
            scores with the factor 1 / sqrt(D); None keeps all of them.
        corrected: dropped blocks count by their mean key and value (``mean_correction``).
    """

    name: str
    setting: str = ""
    select: Callable[[Tensor, Tensor], Tensor] | None = None
    corrected: bool = False

    @property
    def is_flexproxy(self) -> bool:
        return self.name.startswith("flexproxy")

    def __str__(self) -> str:
        return f"{self.name}, {self.setting}" if self.setting else self.name


DENSE = Method("dense")


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
        baselines: names in ``BASELINES``.
        min_budget: tokens that every row keeps at least, for the baselines that have such a setting.
        compensate: every config once more, with dropped blocks as means, as in ``attention(compensate=True)``.
    """
    found = [DENSE]
    for target in densities:
        found += _flexproxy([replace(config, density=target) for config in configs], compensate)
        for name in baselines:
            method = _baseline(name, target, min_budget)
            found.append(method)
            if method.corrected:
                found.append(replace(method, name=WITHOUT_CORRECTION, corrected=False))
    for gamma in gammas:
        found += _flexproxy([replace(config, gamma=gamma, density=None) for config in configs], compensate)
    return found


def _flexproxy(configs: Sequence[ProxyConfig], compensate: bool) -> list[Method]:
    plain = [_of_config(config) for config in configs]
    return plain + [replace(m, name=m.name + COMPENSATED, corrected=True) for m in plain if compensate]


def _of_config(config: ProxyConfig) -> Method:
    setting = f"gamma {config.gamma:g}" if config.density is None else f"density {config.density:g}"

    def select(q: Tensor, k: Tensor) -> Tensor:
        return flexproxy.select(q, k, config=config).block_map()

    stride = ":".join(map(str, dict.fromkeys(config.strides)))  # of queries and keys, where they differ
    kind = "stride" if config.query_choice == "first" else config.query_choice
    return Method(f"flexproxy P {config.total_proxies}, {kind} {stride}", setting, select)


def _baseline(name: str, target: float, min_budget: int) -> Method:
    """A baseline with flexproxy's budgets where it takes them, otherwise with the threshold that gives the density."""
    baseline = BASELINES[name]
    taken = inspect.signature(baseline.select).parameters
    select: Callable[..., Tensor] = baseline.select
    if "min_budget" in taken:
        select = functools.partial(select, min_budget=min_budget)
    if "density" in taken:
        select = functools.partial(select, density=target)
    else:
        select = functools.partial(_at_density, baseline._replace(select=select), target)
    return Method(name, f"density {target:g}", select, corrected=name == CORRECTED)


def _at_density(baseline: Baseline, target: float, q: Tensor, k: Tensor) -> Tensor:
    """The map of the threshold in [0, 1] that comes nearest to the density, of this layer of this sequence."""
    select: Callable[..., Tensor] = baseline.select
    if "mass" in inspect.signature(select).parameters:
        select = functools.partial(select, mass=block_mass(q, k))
    sparsest = select(q, k, 0.0 if baseline.increasing else 1.0)
    if density(sparsest) >= target:
        return sparsest
    threshold, _ = threshold_for_density(lambda t: select(q, k, t), target, baseline.increasing, 0.01, steps=16)
    return select(q, k, threshold)


@torch.no_grad()
def check(methods: Iterable[Method], num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Find a setting that does not fit the model before minutes are spent.

    Raises:
        ValueError: the message of what refuses it.
    """
    q, k = torch.zeros(1, num_heads, 256, head_dim), torch.zeros(1, num_kv_heads, 256, head_dim)
    for method in methods:
        if method.is_flexproxy and method.select is not None:
            method.select(q, k)
