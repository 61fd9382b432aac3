"""The picture of a selection: one small map of blocks for every head."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

# Told apart by their lightness alone, so also in print and by colour-blind readers.
_COLOURS = ("#e8e8e8", "#f0b44c", "#1f3b73")
_LABELS = ("not admissible", "admissible, dropped", "kept")


def picture_problem(path: Path, overwrite: bool) -> str | None:
    """Why no picture can be written to ``path``, in a few words; None if it can."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        return f"no picture format ends in {path.suffix!r}; use .png, .svg or .pdf"
    if path.is_dir():
        return "is a folder; name a file"
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    if not os.access(path.parent, os.W_OK):
        return f"the folder {path.parent} cannot be written to"
    if os.path.lexists(path) and not overwrite:
        return "exists already; name another file, or pass --force to replace it"
    return None


def draw_block_map(path: Path, kept: Tensor, admissible: Tensor, density: Sequence[float], title: str) -> None:
    """Draw which blocks each head keeps, and write the picture whole or not at all.

    Args:
        path: file to write or replace; its suffix is the format.
        kept: bool ``[Hq, Nq, Nk]``, the blocks of each head.
        admissible: bool ``[Nq, Nk]``, the blocks that the mask allows.
        density: kept blocks / admissible blocks of each head, length Hq.
        title: line above the maps.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heads = kept.shape[0]
    columns = min(heads, 4 if heads <= 8 else 8)
    rows = math.ceil(heads / columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.8 * rows + 1.2), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    classes = admissible.int().expand_as(kept) + (kept & admissible).int()
    for head, axis in enumerate(axes.flat):
        if head >= heads:
            axis.set_axis_off()
            continue
        axis.imshow(classes[head].tolist(), cmap=ListedColormap(_COLOURS), vmin=0, vmax=2, interpolation="nearest")
        axis.set_title(f"head {head}, density {density[head]:.3f}", fontsize=10)
        axis.set_xlabel("key block")
        axis.set_ylabel("query block")
        axis.label_outer()
    figure.suptitle(title)
    patches = [Patch(facecolor=c, edgecolor="#808080", label=name) for c, name in zip(_COLOURS, _LABELS, strict=True)]
    figure.legend(handles=patches[::-1], loc="outside lower center", ncols=3, frameon=False)

    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(unfinished, format=path.suffix.lstrip(".").lower(), dpi=130)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
