"""Settings that a model chooses itself: which heads share a proxy, and how densely each layer attends.

    calibration = flexproxy.calibrate(model, [tokenizer(text).input_ids for text in texts], density=0.2)
    calibration.save("calibration.json")

A few forward passes, no gradients. Needs transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from flexproxy import ProxyConfig
from flexproxy.calibration import choose
from flexproxy.calibration.choose import CalibrationError, Target
from flexproxy.calibration.collect import Layer, read
from flexproxy.calibration.heads import Grouping, groupings_of
from flexproxy.calibration.measure import Kept, evaluate
from flexproxy.calibration.result import Calibration
from flexproxy.calibration.texts import split
from flexproxy.checks import check_config
from flexproxy.environment import processor, versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Calibration", "CalibrationError", "Target", "calibrate"]

LONGEST = 32768  # tokens of a sequence, where no length is given

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as ``progress(what is being done, layers done, layers in all)``."""

T = TypeVar("T")


def calibrate(
    model: PreTrainedModel,
    texts: Sequence[Any],
    *,
    density: float | None = None,
    quality: float | None = None,
    config: ProxyConfig | None = None,
    length: int | None = None,
    sequences: int = 4,
    max_proxies: int = 8,
    tolerance: float = 0.03,
    rows: int = 512,
    progress: Progress | None = None,
) -> Calibration:
    """Choose proxies and budgets for every layer of a model, from a few texts and without gradients.

    Heads are grouped by what their pooled proxy keeps of the blocks, apart from those nearby, on which the attention of
    a head is concentrated. A layer gets the grouping with fewest proxies by which every head comes within ``tolerance``
    of the most that it keeps by any. With ``density``, densities are shared out between the layers so that most
    attention mass is recovered, and are part of the settings. With ``quality``, each layer gets the lowest ``gamma``
    that reaches it, on the sequences that decide and on those that were kept aside; densities then follow the prompt.
    At last both kinds of sequences are measured again, and stand in the evidence. The model is left as it was.

    The time of the scores is in proportion to the proxies.

    Args:
        model: a model whose attention goes through transformers' ``AttentionInterface``, with all of its weights here.
        texts: token ids of each text, a tensor ``[S]`` or ``[1, S]`` or ints: ``tokenizer(text).input_ids``. Texts like
            those that it will be used for, as long as them.
        density: target for kept / admissible blocks, the mean over layers, in (0, 1]; or
        quality: target for the share of attention mass that each layer recovers, the mean over its heads, in (0, 1].
        config: settings to start from, the ``stride``, ``block_size`` and ``min_budget`` among them.
        length: tokens of a sequence; None is the longest of which the texts have two, up to 32768.
        sequences: how many to use at most; half of them decide, the others confirm. They take memory together.
        max_proxies: most proxies of a layer.
        tolerance: share of what a head's attention is concentrated on that fewer proxies may cost it.
        rows: queries of each sequence for which dense attention is looked at.
        progress: called as ``progress(stage, layers done, layers in all)``.

    Raises:
        CalibrationError: a ValueError: the target cannot be had, or the texts are too short; the message says more.
        TypeError, ValueError: another argument does not fit.
    """
    from flexproxy.integrations.transformers.settings import all_modules, attention_layers, shape_of

    begin = time.perf_counter()
    target, config = Target.of(density, quality), check_config(config)
    _check_numbers(sequences=(sequences, 2), max_proxies=(max_proxies, 1), rows=(rows, 1))
    layers = attention_layers(model)
    if model.training:
        raise CalibrationError(
            "model: expected one in eval mode, got one that is in training; call model.eval() before"
        )
    weights = [weight for module in all_modules(layers) for weight in module.parameters()]
    if any(weight.is_meta or hasattr(weight, "to_local") or not weight.numel() for weight in weights):
        raise CalibrationError(
            "model: expected one with all of its weights in this process, got shards of them, or weights that are "
            "elsewhere; load it without tensor parallelism, FSDP and offloading"
        )
    decide, confirm = _split(model, texts, length, sequences, config)
    passes = _Passes(model, config.block_size, len(layers), 3 if quality is None else 4, progress)

    measured = passes.over(
        "measuring heads", decide, lambda _, layer: groupings_of(layer, config, target, max_proxies, rows)
    )
    at = _levels_with_best_rankings(measured, target)
    chosen = _choose(measured, at, target, tolerance)
    if quality is not None:
        chosen = passes.over(
            "reaching the quality", confirm, lambda index, layer: _raise(layer, chosen[index], quality, target, rows)
        )
    decided = passes.over("measuring again", decide, lambda index, layer: evaluate(layer, chosen[index], rows))
    mean = fmean(value for kept in decided.values() for value in kept.density)
    uniform = replace(config, density=min(mean, 1.0))
    confirmed = passes.over(
        "confirming",
        confirm,
        lambda index, layer: (evaluate(layer, chosen[index], rows), evaluate(layer, uniform, rows)),
    )
    evidence = {
        "target": {"density": density} if quality is None else {"quality": quality},
        "length": decide.shape[1],
        "sequences": {"decided_on": len(decide), "confirmed_on": len(confirm)},
        "rows": rows,
        "max_proxies": max_proxies,
        "tolerance": tolerance,
        "config": asdict(config),
        "uniform": asdict(uniform),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": processor(model.device),
        "seconds": round(time.perf_counter() - begin, 1),
        "mean": {
            "decided_on": _mean(decided.values()),
            "confirmed_on": _mean(ours for ours, _ in confirmed.values()),
            "uniform": _mean(theirs for _, theirs in confirmed.values()),
        },
        "layers": {
            str(index): _layer_evidence(measured[index], at[index], decided[index], *confirmed[index])
            for index in measured
        },
    }
    return Calibration(chosen, shape_of(model), evidence, versions())


class _Passes(NamedTuple):
    """Forward passes of one calibration; each looks at every layer."""

    model: PreTrainedModel
    block_size: int
    num_layers: int
    number: int
    progress: Progress | None

    def over(self, stage: str, tokens: Tensor, look: Callable[[int, Layer], T]) -> dict[int, T]:
        """What a function finds in every layer, by index.

        Raises:
            ValueError: no layer attended causally.
        """
        found: dict[int, T] = {}
        report = self.progress or (lambda *_: None)

        def see(index: int, layer: Layer) -> None:
            if index in found:
                raise CalibrationError(
                    f"model: expected one decoder, got two with a layer {index}; calibrate the one that reads text"
                )
            found[index] = look(index, layer)
            report(stage, len(found), self.num_layers)

        report(stage, 0, self.num_layers)
        read(self.model, tokens, self.block_size, see)
        if not found:
            raise CalibrationError(
                f"model: expected causal layers that read {tokens.shape[1]} tokens, got none in "
                f"{type(self.model).__name__}; use configure with a ProxyConfig"
            )
        return found


def _split(
    model: PreTrainedModel, texts: Sequence[Any], length: int | None, sequences: int, config: ProxyConfig
) -> tuple[Tensor, Tensor]:
    from flexproxy.integrations.transformers.settings import max_positions

    longest = min(LONGEST, max_positions(model) or LONGEST)
    decide, confirm = split(texts, length, longest, sequences, config.block_size)
    if config.min_blocks * config.block_size >= decide.shape[1]:
        raise CalibrationError(
            f"length: expected more than the {config.min_budget} tokens of min_budget, which every row keeps, got "
            f"sequences of {decide.shape[1]}; use longer texts or a lower min_budget"
        )
    return decide, confirm


def _levels_with_best_rankings(measured: dict[int, list[Grouping]], target: Target) -> dict[int, int]:
    """Index of the level that each layer would have if it had its best ranking."""
    best = [choose.best_curve([grouping.curve for grouping in layer]) for layer in measured.values()]
    return dict(zip(measured, choose.nearest_levels(best, target), strict=True))


def _choose(
    measured: dict[int, list[Grouping]], at: dict[int, int], target: Target, tolerance: float
) -> dict[int, ProxyConfig]:
    """The fewest proxies that rank well enough in each layer, and the levels of the layers with these."""
    groupings = []
    for index, layer in measured.items():
        kept = [grouping.peaks[:, at[index]].tolist() for grouping in layer]
        groupings.append(layer[choose.fewest(kept, tolerance)])
    levels = choose.levels_for([grouping.curve for grouping in groupings], target)
    return {
        index: replace(grouping.config, **target.setting(level))
        for index, grouping, level in zip(measured, groupings, levels, strict=True)
    }


def _raise(layer: Layer, config: ProxyConfig, quality: float, target: Target, rows: int) -> ProxyConfig:
    """The settings with the lowest ``gamma``, not below theirs, that recovers the quality."""
    for level in target.levels():
        if level >= config.gamma:
            config = replace(config, gamma=level)
            if fmean(evaluate(layer, config, rows).recovered) >= quality:
                break
    return config


def _mean(kept: Iterable[Kept]) -> dict[str, float]:
    layers = list(kept)
    return {
        "density": round(fmean(fmean(layer.density) for layer in layers), 4),
        "recovered": round(fmean(fmean(layer.recovered) for layer in layers), 4),
        "recovered_worst_layer": round(min(fmean(layer.recovered) for layer in layers), 4),
    }


def _layer_evidence(
    groupings: list[Grouping], at: int, decided: Kept, confirmed: Kept, uniform: Kept
) -> dict[str, Any]:
    density = [point.density for point in groupings[0].curve]
    return {
        "groupings": [
            {
                "groups": [list(heads) for heads in grouping.groups],
                "recovered": _rounded([point.recovered for point in grouping.curve]),
                "peaks": _rounded(grouping.peaks[:, at].tolist()),
            }
            for grouping in groupings
        ],
        "density": _rounded(density),
        "peaks_at_density": round(density[at], 4),
        "decided_on": _rounded(decided._asdict()),
        "confirmed_on": _rounded(confirmed._asdict()),
        "uniform": _rounded(uniform._asdict()),
    }


def _rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    return [_rounded(value) for value in values] if isinstance(values, list) else round(values, 4)


def _check_numbers(**numbers: tuple[Any, int]) -> None:
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CalibrationError(f"{name}: expected an integer of at least {least}, got {value!r}; leave it out")
