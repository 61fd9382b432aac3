"""Settings that a model chooses itself: how densely each layer attends.

    calibration = flexproxy.calibrate(model, [tokenizer(text).input_ids for text in texts], density=0.2)
    calibration.save("calibration.json")

Forward passes only, no gradients. Needs transformers.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeAlias

from flexproxy import ProxyConfig
from flexproxy.calibration.choose import CalibrationError, Point, share_density
from flexproxy.calibration.reader import Reader, reading
from flexproxy.calibration.result import Calibration
from flexproxy.calibration.texts import split
from flexproxy.checks import check_config
from flexproxy.environment import processor, versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Calibration", "CalibrationError", "calibrate"]

LONGEST = 32768  # tokens of a sequence, where no length is given
LEVELS = 0.06, 0.12, 0.25, 0.5  # densities at which layers are measured, where none is asked for

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as ``progress(what is being done, how much of it is done, how much there is)``."""


def calibrate(
    model: PreTrainedModel,
    texts: Sequence[Any],
    *,
    density: float | None = None,
    quality: float | None = None,
    config: ProxyConfig | None = None,
    length: int | None = None,
    sequences: int = 4,
    positions: int = 512,
    progress: Progress | None = None,
) -> Calibration:
    """Choose the density of every layer of a model, from a few texts and without gradients.

    Each layer is made sparse alone, at a few densities, while all others stay dense, and the model's predictions are
    compared with those of dense attention. Density is then shared out between the layers so that what they lose is
    least in sum. If on sequences that were kept aside this is no better than the same density in all layers, and that
    reaches the quality too, that is chosen. The model is left as it was.

    It takes some three forward passes for each layer, four with ``quality``.

    Args:
        model: a causal language model whose attention goes through transformers' ``AttentionInterface``, with all of
            its weights here.
        texts: token ids of each text, a tensor ``[S]`` or ``[1, S]`` or ints: ``tokenizer(text).input_ids``. Texts like
            those that it will be used for, as long as them.
        density: target for kept / admissible blocks, the mean over layers, in (0, 1]; or
        quality: target for the share of positions whose most probable next token stays that of dense attention, in
            (0, 1]: the lowest density that reaches it, on the sequences that decide and on those kept aside.
        config: settings to start from, its proxies, ``stride`` and ``min_budget`` among them.
        length: tokens of a sequence; None is the longest of which the texts have two, up to 32768.
        sequences: how many to use at most; half of them decide, the others confirm. They take memory together.
        positions: of each sequence, whose predictions are compared.
        progress: called as ``progress(stage, layers done, layers in all)``.

    Raises:
        CalibrationError: a ValueError: the target cannot be had, or the texts are too short; the message says more.
        TypeError, ValueError: another argument does not fit.
    """
    from flexproxy.integrations.transformers.settings import attention_layers, max_positions, shape_of

    begin = time.perf_counter()
    check_target(density, quality)
    config = check_config(config)
    _check_numbers(sequences=(sequences, 2), positions=(positions, 1))
    _check_model(model)
    longest = min(LONGEST, max_positions(model) or LONGEST)
    decide, confirm = split(texts, length, longest, sequences, config.block_size)
    if config.min_blocks * config.block_size >= decide.shape[1]:
        raise CalibrationError(
            f"length: expected more than the {config.min_budget} tokens of min_budget, which every row keeps, got "
            f"sequences of {decide.shape[1]}; use longer texts or a lower min_budget"
        )
    report = progress or (lambda *_: None)
    levels = LEVELS if density is None else (density / 2, density, min(2 * density, 1.0))
    with reading(model):
        report("measuring layers", 0, len(attention_layers(model)))
        reader, kept_aside = (Reader(model, tokens, positions) for tokens in (decide, confirm))
        sparsest = reader.lost(dict.fromkeys(reader.layers, replace(config, density=levels[0])))
        share_density([[Point(kept, 0.0)] for kept in sparsest.density.values()], density or 1.0)  # before minutes pass
        curves: dict[int, list[Point]] = {}
        for number, layer in enumerate(reader.layers):
            alone = [reader.lost({layer: replace(config, density=level)}) for level in levels]
            curves[layer] = [*(Point(lost.density[layer], lost.divergence) for lost in alone), Point(1.0, 0.0)]
            report("measuring layers", number + 1, len(reader.layers))

        def shared(mean: float) -> dict[int, ProxyConfig]:
            shares = share_density(list(curves.values()), mean)
            return {layer: replace(config, density=share) for layer, share in zip(curves, shares, strict=True)}

        def reaches(settings: dict[int, ProxyConfig]) -> bool:
            return quality is None or all(one.lost(settings).agreement >= quality for one in (reader, kept_aside))

        if density is None:
            report("reaching the quality", 0, 1)
            lowest = fmean(curve[0].density for curve in curves.values())
            means = [*(math.ceil(1e4 * lowest ** (1 - step / 32)) / 1e4 for step in range(32)), 1.0]  # none is lower
            density = means[bisect.bisect_left(means, True, hi=32, key=lambda mean: reaches(shared(mean)))]
        report("confirming", 0, 1)
        chosen = shared(density)
        uniform = dict.fromkeys(chosen, replace(config, density=density))
        confirmed, plain = kept_aside.lost(chosen), kept_aside.lost(uniform)
        decided = reader.lost(chosen)
        helps = confirmed.divergence < plain.divergence or not reaches(uniform)
    evidence = {
        "target": {"density": density} if quality is None else {"quality": quality},
        "length": decide.shape[1],
        "sequences": {"decided_on": len(decide), "confirmed_on": len(confirm)},
        "positions": positions,
        "config": asdict(config),
        "chosen": "shared" if helps else "uniform",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": processor(model.device),
        "seconds": round(time.perf_counter() - begin, 1),
        "mean": {"decided_on": decided.mean(), "confirmed_on": confirmed.mean(), "uniform": plain.mean()},
        "layers": {
            str(layer): {
                "density": [round(point.density, 4) for point in curve],
                "divergence": [round(point.lost, 6) for point in curve],
                "shared": chosen[layer].density,
            }
            for layer, curve in curves.items()
        },
    }
    return Calibration(chosen if helps else uniform, shape_of(model), evidence, versions())


def check_target(density: Any, quality: Any) -> None:
    """Raises ValueError unless one of them is given, and is in (0, 1]."""
    if (density is None) == (quality is None):
        raise CalibrationError(
            f"density, quality: expected one of the two, got density={density}, quality={quality}; use for example "
            "density=0.2, or quality=0.98"
        )
    name, value = ("density", density) if quality is None else ("quality", quality)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
        raise CalibrationError(f"{name}: expected a number in (0, 1], got {value!r}; use for example 0.2 for a density")


def _check_model(model: PreTrainedModel) -> None:
    from flexproxy.integrations.transformers.settings import all_modules, attention_layers

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
    if model.get_output_embeddings() is None:
        raise CalibrationError(
            f"model: expected one that predicts the next token, got {type(model).__name__}; load it with "
            "AutoModelForCausalLM"
        )


def _check_numbers(**numbers: tuple[Any, int]) -> None:
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CalibrationError(f"{name}: expected an integer of at least {least}, got {value!r}; leave it out")
