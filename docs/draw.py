"""Draw the pictures of the documentation: those of docs/concepts.md by its own code, and the plots of the benchmarks.

    python -m docs.draw

The page is a program that saves pictures. Beside them docs/images/drawn.json gets, for each, the digest of the file and
a summary of the data in it, or the digest of the results that it was drawn from. tests/test_docs.py runs the page again
and compares: so no picture can show other data than the code above it gives.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from benchmarks import harness, plots
from flexproxy import plot
from flexproxy._files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "concepts.md"
IMAGES = ROOT / "docs" / "images"
DRAWN = IMAGES / "drawn.json"


def blocks_of(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def run(page: Path) -> tuple[str, dict[str, Figure]]:
    """What the code of a page prints, and the figures that it saves, by their paths. No file is written."""
    figures: dict[str, Figure] = {}
    printed, before = io.StringIO(), Path.cwd()

    def keep(figure: Figure, path: str, force: bool = False) -> None:
        figures[path] = figure

    os.chdir(ROOT)
    try:
        with mock.patch.object(plot, "save", keep), contextlib.redirect_stdout(printed):
            names: dict[str, Any] = {}
            for block in blocks_of(page, "python"):
                exec(compile(block, page.name, "exec"), names)
    finally:
        os.chdir(before)
    return printed.getvalue(), figures


def data_of(figure: Figure) -> list[dict[str, Any]]:
    """What a figure draws: of every panel its title, and the shape and two sums of each map and each line."""
    return [{"title": axes.get_title(), "data": _panel(axes)} for axes in figure.axes if axes.images or axes.lines]


def _panel(axes: Axes) -> list[list[Any]]:
    maps = [torch.tensor(image.get_array().filled(torch.nan).tolist()) for image in axes.images]  # type: ignore[union-attr]
    lines = [torch.tensor(line.get_xydata().tolist()) for line in axes.lines]  # type: ignore[union-attr]
    return [_summary(values.double().nan_to_num(0.0)) for values in (*maps, *lines)]


def _summary(values: torch.Tensor) -> list[Any]:
    """Shape, mean, and the mean with weights that grow, which sees a change of order as well."""
    weights = torch.linspace(0, 1, values.numel(), dtype=values.dtype)
    return [list(values.shape), round(float(values.mean()), 5), round(float((values.flatten() * weights).mean()), 5)]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    drawn: dict[str, Any] = {}
    _, figures = run(PAGE)
    for path, figure in figures.items():
        plot.save(figure, ROOT / path, force=True)
        drawn[path] = {"sha256": digest(ROOT / path), "panels": data_of(figure)}
        print(f"wrote {path}")
    sources = {name: harness.RESULTS / f"{source}.json" for name, (source, _) in plots.PLOTS.items()}
    measured = [name for name, source in sources.items() if source.exists()]
    plots.main([*measured, "--unfinished", "--out", str(IMAGES)])
    for name in measured:
        drawn[f"docs/images/{name}.png"] = {"sha256": digest(IMAGES / f"{name}.png"), "source": digest(sources[name])}
    with replacing(DRAWN) as unfinished:
        unfinished.write_text(json.dumps(drawn, indent=1) + "\n")


if __name__ == "__main__":
    main()
