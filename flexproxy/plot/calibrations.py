"""A picture of a calibration, layer by layer."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING, Any

from flexproxy.plot.figures import DARK, MIDDLE, add_title, plain_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flexproxy.calibration import Calibration


def calibration(calibration: Calibration, *, title: str | None = None) -> Figure:
    """Proxies, density and recovered mass of every layer, beside the same settings in all layers at the same density.

    Args:
        calibration: what ``flexproxy.calibrate`` returned.
        title: line above; None describes the calibration.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    number = len(calibration.layers)
    width = min(max(11.0, 0.2 * number), 16.0)
    with plain_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, 5.8), layout="constrained")
        axes = figure.subplots(3, 1, sharex=True, height_ratios=[1, 2, 2])
        _draw(axes, calibration, 65 * width / number)
        add_title(figure, title or _title(calibration.evidence))
    return figure


def _title(evidence: dict[str, Any]) -> str:
    ((name, value),) = evidence["target"].items()
    ours, uniform = evidence["mean"]["confirmed_on"], evidence["mean"]["uniform"]
    return (
        f"Calibrated for a {name} of {value:g}; measured on texts kept aside, of {evidence['length']} tokens\n"
        f"{ours['recovered']:.3f} of the attention mass at density {ours['density']:.3f}; the same setting everywhere: "
        f"{uniform['recovered']:.3f} at {uniform['density']:.3f}"
    )


def _draw(axes: Any, calibration: Calibration, points: float) -> None:
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
