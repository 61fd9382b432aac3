"""A picture of a calibration."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING, Any

from flexproxy.plot.figures import DARK, MIDDLE, add_title, plain_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flexproxy.calibration.result import Calibration

_NARROWEST, _WIDEST = 11.0, 16.0  # inches
_MAP = 1.375  # inches of a layer's map, with what is around it


def draw(calibration: Calibration) -> Figure:
    """Above, by layer: proxies, density, recovered mass; below, how alike the heads of each layer are."""
    layers: dict[str, Any] = calibration.evidence["layers"]
    width = min(max(_NARROWEST, 0.2 * len(layers)), _WIDEST)
    rows = math.ceil(len(layers) / int(width / _MAP))
    with plain_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, 5.8 + 1.5 * rows), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=[5.2, 0.6 + 1.5 * rows])
        upper, lower = parts
        _draw_layers(upper.subplots(3, 1, sharex=True, height_ratios=[1, 2, 2]), calibration, 65 * width / len(layers))
        _draw_similarity(lower, layers, rows)
        add_title(figure, _title(calibration.evidence))
    return figure


def _title(evidence: dict[str, Any]) -> str:
    ((name, value),) = evidence["target"].items()
    ours, uniform = evidence["mean"]["confirmed_on"], evidence["mean"]["uniform"]
    return (
        f"Calibrated for a {name} of {value:g}; measured on texts kept aside, of {evidence['length']} tokens\n"
        f"{ours['recovered']:.3f} of the attention mass at density {ours['density']:.3f}; the same setting everywhere: "
        f"{uniform['recovered']:.3f} at {uniform['density']:.3f}"
    )


def _draw_layers(axes: Any, calibration: Calibration, points: float) -> None:
    """points: the width that a layer has, of which there are 72 in an inch; its two markers must not touch."""
    evidence = calibration.evidence
    marker = min(6.0, 0.3 * points)
    indices = list(calibration.layers)
    chosen = list(calibration.num_proxies.values())
    places = range(len(indices))
    axes[0].bar(places, chosen, color=DARK, width=0.6)
    axes[0].set_ylabel("proxies")
    axes[0].set_ylim(0, max(chosen) * 1.15)
    axes[0].set_xlim(-0.7, len(indices) - 0.3)
    axes[0].yaxis.get_major_locator().set_params(integer=True)
    for axis, name, label in ((axes[1], "density", "kept / admissible"), (axes[2], "recovered", "recovered mass")):
        for source, colour, words, shift in (
            ("uniform", MIDDLE, "same in all layers", -0.2),
            ("confirmed_on", DARK, "calibrated", 0.2),
        ):
            by_head = [evidence["layers"][str(index)][source][name] for index in indices]
            means = [fmean(heads) for heads in by_head]
            spread = [
                [mean - min(heads) for mean, heads in zip(means, by_head, strict=True)],
                [max(heads) - mean for mean, heads in zip(means, by_head, strict=True)],
            ]
            at = [place + shift for place in places]
            axis.errorbar(
                at, means, yerr=spread, fmt="o", color=colour, ms=marker, capsize=marker / 3, lw=1, label=words
            )
        axis.set_ylabel(label)
        axis.grid(axis="y", color="#dddddd")
    axes[1].set_ylim(0.0, 1.02)
    axes[1].legend(
        title="mean over heads; the bar is from the lowest to the highest head", title_fontsize=8, fontsize=8,
        ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False,
    )  # fmt: skip
    step = math.ceil(len(indices) / 40)
    axes[2].set_xticks(list(places)[::step], [str(index) for index in indices][::step])
    axes[2].set_xlabel("layer")


def _draw_similarity(figure: Any, layers: dict[str, Any], rows: int) -> None:
    """What every head (column) gains or loses when the ranking of another (row) takes the place of its own."""
    axes = figure.subplots(rows, math.ceil(len(layers) / rows), squeeze=False)
    gains = [_beside_own(layer["similarity"]) for layer in layers.values()]
    most = max(abs(value) for gain in gains for values in gain for value in values) or 1.0
    drawn: list[Axes] = list(axes.flat)
    for axis in drawn[len(layers) :]:
        axis.set_axis_off()
    for axis, index, gain in zip(drawn, layers, gains, strict=False):
        image = axis.imshow(gain, cmap="RdBu", vmin=-most, vmax=most, interpolation="nearest")
        axis.set_title(f"layer {index}", fontsize=9)
        ends = sorted({0, len(gain) - 1})  # the first head and the last
        axis.set_xticks(ends)
        axis.set_yticks(ends)
        axis.tick_params(labelsize=6, length=2, pad=1)
    axes[-1, 0].set_xlabel("peaks of head", fontsize=8)
    axes[-1, 0].set_ylabel("ranked by head", fontsize=8)
    tall = min(rows, 3)
    label = "peaks kept, less what\nits own ranking keeps"
    figure.colorbar(image, ax=axes, label=label, fraction=0.03, shrink=tall / rows, aspect=12 * tall, anchor=(0, 1))


def _beside_own(similarity: list[list[float]]) -> list[list[float]]:
    return [[value - similarity[head][head] for head, value in enumerate(values)] for values in similarity]
