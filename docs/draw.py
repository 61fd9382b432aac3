"""Draw the pictures of the documentation: those of docs/concepts.md by its own code, and the plots of the benchmarks.

    python -m docs.draw

The page is a program that saves pictures. Beside them docs/images/drawn.json gets, for each, the digest of the file and
the data that it shows, or the digest of the results that it was drawn from. tests/test_docs.py runs the page again
and compares: so no picture can show other data than the code above it gives.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks import harness, plots
from benchmarks.quality import report
from flexproxy import plot
from flexproxy.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "concepts.md"
IMAGES = ROOT / "docs" / "images"
DRAWN = IMAGES / "drawn.json"
QUALITY = "quality_smollm2"
SHOWN = "speedup", "peers", "build", "stages"  # of the plots of the benchmarks
SOURCES = {name: plots.PLOTS[name][0] for name in SHOWN} | {"quality": QUALITY}
# Of flexproxy's own variants; the notebook beside the benchmarks has the others.
QUALITY_OURS = "flexproxy P 3, stride 4", "flexproxy P 1, stride 4", "flexproxy, as the paper"
QUALITY_PANELS = (8192, "prose"), (8192, "code"), (8192, "single"), (32768, "prose")


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
    """What a figure draws: of every panel its title, and its maps and lines, a row of numbers in each text."""
    return [{"title": axes.get_title(), "data": _panel(axes)} for axes in figure.axes if axes.images or axes.lines]


def _panel(axes: Axes) -> list[list[str]]:
    maps: list[Any] = [image.get_array() for image in axes.images]
    lines: list[Any] = [line.get_xydata() for line in axes.lines]
    arrays = [values.filled(math.nan).tolist() for values in maps] + [points.T.tolist() for points in lines]
    return [[" ".join(f"{value:.3g}" for value in row) for row in array] for array in arrays]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw_quality() -> None:
    data = json.loads((harness.RESULTS / f"{QUALITY}.json").read_text())
    data["rows"] = [row for row in data["rows"] if row["method"] in QUALITY_OURS or "flexproxy" not in row["method"]]
    report.draw(data, IMAGES / "quality.png", QUALITY_PANELS, dpi=100)


def main() -> None:
    drawn: dict[str, Any] = {}
    _, figures = run(PAGE)
    for path, figure in figures.items():
        plot.save(figure, ROOT / path, force=True)
        drawn[path] = {"sha256": digest(ROOT / path), "panels": data_of(figure)}
        print(f"wrote {path}")
    sources = {name: harness.RESULTS / f"{source}.json" for name, source in SOURCES.items()}
    measured = [name for name, source in sources.items() if source.exists()]
    plots.main([*(name for name in measured if name in plots.PLOTS), "--unfinished", "--out", str(IMAGES)])
    draw_quality()
    for name in measured:
        drawn[f"docs/images/{name}.png"] = {"sha256": digest(IMAGES / f"{name}.png"), "source": digest(sources[name])}
    with replacing(DRAWN) as unfinished:
        unfinished.write_text(json.dumps(drawn, indent=1) + "\n")


if __name__ == "__main__":
    main()
