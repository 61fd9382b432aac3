"""Pictures by layer and head: densities, recovered mass, times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexproxy.inspect.record import Record, Totals, mean, together, totals_of
from flexproxy.plot.figures import DARK, LIGHT, MIDDLE, add_title, plain_style
from flexproxy.selection import Selection
from flexproxy.stats import check_index

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DENSITY, _MASS = "kept blocks / admissible blocks", "recovered attention mass"


def density(
    densities: Tensor | Selection | Sequence[Selection] | Mapping[int, Selection],
    *,
    batch: int = 0,
    title: str | None = None,
) -> Figure:
    """A heat map of kept / admissible blocks, a row for every layer and a column for every head.

    Args:
        densities: a Selection; one for each layer, in a sequence or by the layer's index, as in the ``selections`` of
            ``flexproxy.record(model, selections=True)``; or a tensor ``[layers, Hq]``.
        batch: which sequence of the selections.
        title: line above the map; None describes it.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
        ModuleNotFoundError: matplotlib is not installed.
    """
    layers, values = _layers(densities, batch)
    found = values[~values.isnan()]
    with plain_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=_size(*values.shape), layout="constrained")
        axis = figure.subplots()
        _heat_map(figure, axis, values, _DENSITY, 0.0)
        _name_layers(axis, layers)
        span = f"mean {found.mean():.3f}, from {found.min():.3f} to {found.max():.3f}"
        add_title(figure, title or f"Density of every layer and head: {span}")
    return figure


def record(record: Record, *, title: str | None = None) -> Figure:
    """What ``flexproxy.record`` collected: density and, if asked for, recovered mass by layer and head; times by layer.

    Sparse passes are taken together, over all sequences; a map is grey where a layer had none.

    Args:
        record: after at least one forward pass.
        title: line above; None describes the record.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not isinstance(record, Record):
        raise TypeError(f"record: expected what flexproxy.record gives, got {type(record).__name__}; pass that")
    totals = {layer: totals_of(passes) for layer, passes in record.layers.items()}
    if not totals:
        raise ValueError("record: expected at least one forward pass, got none; run the model inside of the with")
    layers = list(totals)
    maps = {_DENSITY: (_padded([x.density for x in totals.values()]), 0.0)}
    masses = _padded([x.mass for x in totals.values()])
    if not masses.isnan().all():
        maps[_MASS] = masses, _lowest(masses)
    columns = max(values.shape[1] for values, _ in maps.values())
    with plain_style():
        from matplotlib.figure import Figure

        width, height = _size(len(layers), columns)
        widths = [min(width, 9.0)] * len(maps) + [5.0]
        figure = Figure(figsize=(sum(widths), height + 0.5), layout="constrained")
        axes = figure.subplots(1, len(widths), sharey=True, width_ratios=widths)
        for axis, (label, (values, lowest)) in zip(axes[:-1], maps.items(), strict=True):
            _heat_map(figure, axis, values, None, lowest)
            axis.set_title(label, fontsize=10)
        _time_bars(axes[-1], list(totals.values()))
        _name_layers(axes[0], layers)
        add_title(figure, title or _title(record, together(list(totals.values()))))
    return figure


def _title(record: Record, all_layers: Totals) -> str:
    shares = {"density": all_layers.density, "recovered mass": all_layers.mass}
    means = [f"{name} {mean(values):.3f}" for name, values in shares.items() if values]
    time = all_layers.sparse_ms + all_layers.dense_ms
    return ", ".join([f"{record.model['class']}: attention of {len(record.layers)} layers in {time:.1f} ms", *means])


def _size(num_layers: int, num_heads: int) -> tuple[float, float]:
    """Inches of a map."""
    return min(max(0.28 * num_heads + 2.4, 6.5), 14.0), min(max(0.28 * num_layers + 1.6, 3.0), 13.0)


def _heat_map(figure: Figure, axis: Axes, values: Tensor, label: str | None, lowest: float) -> None:
    """Layers by heads ``[layers, Hq]`` in colours from ``lowest`` to 1; NaN is grey."""
    from matplotlib.ticker import MaxNLocator

    axis.set_facecolor(LIGHT)
    image = axis.imshow(values.numpy(), cmap="viridis", vmin=lowest, vmax=1.0, aspect="auto", interpolation="nearest")
    axis.set_xlabel("query head")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axis, aspect=40, label=label or "")


def _name_layers(axis: Axes, layers: Sequence[int]) -> None:
    step = math.ceil(len(layers) / 40)
    axis.set_ylabel("layer")
    axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])


def _time_bars(axis: Axes, totals: Sequence[Totals]) -> None:
    """A bar for every layer: building masks, attending under them, dense passes."""
    parts = {
        "building the mask": (MIDDLE, [x.build_ms for x in totals]),
        "sparse attention": (DARK, [x.sparse_ms - x.build_ms for x in totals]),
        "dense passes": (LIGHT, [x.dense_ms for x in totals]),
    }
    left = [0.0] * len(totals)
    for name, (colour, widths) in parts.items():
        if any(widths):
            axis.barh(range(len(totals)), widths, left=left, color=colour, edgecolor="#808080", label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_xlabel("time of attention, ms")
    axis.grid(axis="x", color="#dddddd")
    axis.set_axisbelow(True)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8)


def _lowest(masses: Tensor) -> float:
    """Where the colours of masses begin: they lie close to 1."""
    found = masses[~masses.isnan()]
    return min(0.9, math.floor(float(found.min()) * 10) / 10) if found.numel() else 0.0


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """fp32 ``[layers, Hq]``, NaN where a layer has fewer heads than others, or none."""
    width = max(1, *map(len, rows))
    return torch.tensor([[*row, *[math.nan] * (width - len(row))] for row in rows], dtype=torch.float32)


def _layers(densities: Any, batch: int) -> tuple[list[int], Tensor]:
    """Indices of the layers, and fp32 ``[layers, Hq]``, NaN where a layer has fewer heads than others."""
    if isinstance(densities, Tensor):
        if densities.dim() != 2 or 0 in densities.shape:
            raise ValueError(
                f"densities: expected a tensor [layers, Hq], got shape {list(densities.shape)}; take one sequence of "
                "every layer"
            )
        return list(range(len(densities))), densities.detach().float().cpu()
    if isinstance(densities, Selection):
        densities = [densities]
    several = isinstance(densities, Iterable)
    by_layer = dict(densities) if isinstance(densities, Mapping) else dict(enumerate(densities if several else ()))
    if not by_layer or not all(isinstance(selection, Selection) for selection in by_layer.values()):
        kinds = sorted({type(x).__name__ for x in by_layer.values()}) if several else [type(densities).__name__]
        raise TypeError(
            "densities: expected a Selection for each layer, or a tensor [layers, Hq], got "
            f"{', '.join(kinds) or 'none'}; use flexproxy.record(model, selections=True), or for other masks "
            "torch.stack([stats.density(q, k, mask)[0], ...])"
        )
    for selection in by_layer.values():
        check_index("batch", batch, selection.count.shape[0])
    layers = sorted(by_layer)
    return layers, _padded([by_layer[layer].density()[batch].tolist() for layer in layers])
