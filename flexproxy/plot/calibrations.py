"""A picture of a calibration, layer by layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flexproxy.plot.figures import DARK, MIDDLE, add_title, plain_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flexproxy.calibration import Calibration


def calibration(calibration: Calibration) -> Figure:
    """What every layer loses by itself at each density tried, and the density that is shared out to it.

    Args:
        calibration: what ``flexproxy.calibrate`` returned.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    evidence, number = calibration.evidence, len(calibration.layers)
    with plain_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(min(max(11.0, 0.2 * number), 16.0), 5.0), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True)
        _draw(axes, calibration)
        add_title(figure, _title(evidence))
    return figure


def _title(evidence: dict[str, Any]) -> str:
    ((name, value),) = evidence["target"].items()
    ours, uniform = evidence["mean"]["confirmed_on"], evidence["mean"]["uniform"]
    return (
        f"Calibrated for a {name} of {value:g}; measured on texts kept aside, of {evidence['length']} tokens\n"
        f"{ours['divergence']:.4f} bits per token from dense at density {ours['density']:.3f}; the same density in all "
        f"layers: {uniform['divergence']:.4f}"
    )


def _draw(axes: Any, calibration: Calibration) -> None:
    layers = calibration.evidence["layers"]
    places = range(len(layers))
    columns = list(zip(*(zip(x["density"], x["divergence"], strict=True) for x in layers.values()), strict=True))
    tried = columns[:-1]  # the last is dense
    for nth, column in enumerate(tried):
        mean = sum(density for density, _ in column) / len(column)
        shade = (nth + 1) / len(tried)  # the lower bars stand in front
        axes[0].bar(places, [lost for _, lost in column], color=DARK, alpha=shade, width=0.8, label=f"{mean:.2f}")
    axes[0].set_ylabel("bits per token\nfrom dense, alone")
    axes[0].legend(title="density", ncols=len(tried), frameon=False, fontsize=8, title_fontsize=8)
    axes[1].bar(places, [x["shared"] for x in layers.values()], color=MIDDLE, width=0.8)
    axes[1].set_ylabel("density shared out")
    axes[1].set_ylim(0.0, 1.02)
    step = math.ceil(len(layers) / 40)
    axes[1].set_xticks(list(places)[::step], list(layers)[::step])
    axes[1].set_xlabel("layer")
