"""Draw the pictures of the documentation: those of docs/concepts.md by its own code, and the plots of the benchmarks.

    python -m docs.draw

The page is a program that saves pictures. Beside them docs/images/drawn.json gets, for each, the digest of the file and
the data that it shows, or the digest of the results that it was drawn from. tests/project/test_docs.py runs the page
again and compares: so no picture can show other data than the code above it gives.
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
from docs import figures as figures_of
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
PAGES_OF_OVERVIEW: dict[str, Any] = {
    "overview": {},
    # GitHub's dark page, for README; the site makes all pictures dark by its style sheet.
    "overview-dark": (
        "dark_background",
        dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "#0d1117"),
    ),
}
SOURCES = (
    {name: (plots.PLOTS[name][0],) for name in SHOWN}
    | {"quality": (QUALITY,)}
    | dict.fromkeys(PAGES_OF_OVERVIEW, ("prefill", QUALITY))
)
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


def digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def draw_overview() -> None:
    """For light and for dark pages."""
    from matplotlib import style

    for name, page in PAGES_OF_OVERVIEW.items():
        with style.context(page):
            plots.save(overview(), IMAGES / f"{name}.png", dpi=130)


def overview() -> Figure:
    """Time to the first token, loss and answers against density: flexproxy, dense, and two other methods."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    text = rcParams["text.color"]
    picture = Figure(figsize=(10, 3.4), layout="constrained", dpi=100)
    time, loss, needles = picture.subplots(1, 3)
    rows = [row for row in figures_of.results("prefill")["rows"] if row["part"] == "prefill" and row["error"] is None]
    rows = [row for row in rows if row["length"] == figures_of.LONG]
    ours = sorted((row["density"], row["median_ms"] / 1000) for row in rows if row["contender"] == "flexproxy")
    time.plot(*zip(*ours, strict=True), "o-", color=plots.COLOURS[0], label="flexproxy")
    for number, (contender, name) in enumerate(plots.DENSE.items()):
        for row in rows:
            if row["contender"] == contender:
                seconds = row["median_ms"] / 1000
                time.axhline(seconds, color=text, linestyle=("--", ":")[number], label=name)
    time.set(
        title=f"Llama-3.1-8B shape, 128K, {figures_of.device('prefill')}",
        ylabel="seconds to the first token",
        ylim=(0, None),
    )
    methods = {figures_of.OURS: "flexproxy", "XAttention": "XAttention", "FlexPrefill": "FlexPrefill"}
    for axes, task in ((loss, "prose"), (needles, "single")):
        found = [r for r in figures_of.results(QUALITY)["rows"] if (r["length"], r["task"]) == (8192, task)]
        (dense,) = (row["mean"] for row in found if row["method"] == "dense")
        for colour, (method, name) in zip(plots.COLOURS, methods.items(), strict=False):
            at = [r for r in found if r["method"] == method and r["setting"].startswith("density 0")]
            points = [
                (r["density"], 100 * (r["mean"] if task == "single" else r["mean"] / dense - 1))
                for r in sorted(at, key=lambda r: r["density"])
            ]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
        axes.axhline(100 * dense if task == "single" else 0, color=text, linestyle="--", label="dense")
    loss.set(title="prose, 8K tokens, SmolLM2-135M", ylabel="bits per byte more than dense, %")
    needles.set(title="needles, 8K tokens, SmolLM2-135M", ylabel="found, %", ylim=(0, 100))
    for axes, legend in ((time, "lower right"), (loss, "upper right"), (needles, "lower right")):
        axes.set_title(axes.get_title(), fontsize=10)
        axes.set_xlabel("density (kept / causal blocks)")
        axes.legend(fontsize=8, loc=legend)
        axes.grid(alpha=0.3)
    return picture


def draw_quality() -> None:
    data = json.loads((harness.RESULTS / f"{QUALITY}.json").read_text())
    data["rows"] = figures_of.compared(data["rows"], QUALITY_OURS)
    report.draw(data, IMAGES / "quality.png", QUALITY_PANELS, dpi=90)


def main() -> None:
    drawn: dict[str, Any] = {}
    _, figures = run(PAGE)
    for path, figure in figures.items():
        plot.save(figure, ROOT / path, force=True)
        drawn[path] = {"sha256": digest(ROOT / path), "panels": data_of(figure)}
        print(f"wrote {path}")
    sources = {name: [harness.RESULTS / f"{x}.json" for x in files] for name, files in SOURCES.items()}
    measured = [name for name, files in sources.items() if all(file.exists() for file in files)]
    plots.main([*(name for name in measured if name in plots.PLOTS), "--unfinished", "--out", str(IMAGES)])
    draw_quality()
    draw_overview()
    for name in measured:
        drawn[f"docs/images/{name}.png"] = {"sha256": digest(IMAGES / f"{name}.png"), "source": digest(*sources[name])}
    with replacing(DRAWN) as unfinished:
        unfinished.write_text(json.dumps(drawn, indent=1) + "\n")


if __name__ == "__main__":
    main()
