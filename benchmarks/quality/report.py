"""Results to look at: tables for the terminal and for the documentation, and the plot of quality against density."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Row
from benchmarks.plots import save, tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

HEADER = ("method", "brought to", "density")
LABELS = {"exact": "exact answers, %", "bits_per_byte": "bits per byte"}

# Mostly Okabe and Ito's colours: flexproxy in blues and solid lines, what it is compared with in others and dashed.
OURS = ("#08306b", "#2171b5", "#6baed6")
OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#882255", "#44AA99", "#999933", "#661100", "#BBBBBB", "#DDBB55")
MARKERS = "os^DvPX*hd<>p"
ORACLES = {"oracle": "#000000", "oracle, per row": "#777777"}

Points = list[tuple[float, float, float, float]]
"""density, mean, low, high"""


def scale(row: Row, value: float | None) -> float | None:
    """Shares as percent; bits as they are."""
    return value if value is None or row["metric"] != "exact" else 100 * value


def panels(rows: Sequence[Row]) -> dict[tuple[int, str], list[Row]]:
    """What was measured, by length and task, in the order of the file."""
    found: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        if row["error"] is None:
            found.setdefault((row["length"], row["task"]), []).append(row)
    return found


def series(rows: Sequence[Row]) -> dict[str, Points]:
    """One line for each method but dense: density, mean and interval, by density. Where there is none, the mean."""
    lines: dict[str, Points] = {}
    for row in rows:
        if row["method"] != "dense":
            mean, low, high = (scale(row, row[name]) for name in ("mean", "low", "high"))
            assert mean is not None
            point = (row["density"], mean, mean if low is None else low, mean if high is None else high)
            lines.setdefault(row["method"], []).append(point)
    return {name: sorted(points) for name, points in lines.items()}


# Tables


def cells(row: Row) -> tuple[str, ...]:
    """A row of a table: method, setting, density, mean, interval, number."""
    decimals = 1 if row["metric"] == "exact" else 4
    mean, low, high = (scale(row, row[name]) for name in ("mean", "low", "high"))
    interval = "" if low is None else f"{low:.{decimals}f} to {high:.{decimals}f}"
    return row["method"], row["setting"], f"{row['density']:.3f}", f"{mean:.{decimals}f}", interval, str(row["number"])


def _columns(row: Row) -> tuple[str, ...]:
    return (*HEADER, LABELS[row["metric"]], "95 % interval", "answers" if row["metric"] == "exact" else "sequences")


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One table for each length and task, and one of what failed."""
    from rich.table import Table

    for (length, task), members in panels(rows).items():
        table = Table(title=f"{task}, {tokens(length)} tokens", title_justify="left", box=None)
        for n, name in enumerate(_columns(members[0])):
            table.add_column(name, justify="left" if n < 2 else "right")
        for row in members:
            table.add_row(*cells(row))
        yield table
    failed = [row for row in rows if row["error"] is not None]
    if failed:
        table = Table("length", "task", "method", "error", title="failed", title_justify="left", box=None)
        for row in failed:
            table.add_row(str(row["length"]), row["task"], f"{row['method']}, {row['setting']}", row["error"])
        yield table


def markdown(rows: Sequence[Row]) -> str:
    """One table a length, all tasks side by side: the mean, and half of the interval's width."""
    lines: list[str] = []
    for length in dict.fromkeys(length for length, _ in panels(rows)):
        tasks = {task: members for (n, task), members in panels(rows).items() if n == length}
        names = [f"{task}: {LABELS[members[0]['metric']]}" for task, members in tasks.items()]
        lines += ["| " + " | ".join((*HEADER, *names)) + " |", "|---" * (len(HEADER) + len(names)) + "|"]
        for first, *others in zip(*tasks.values(), strict=True):
            method, setting, density, *_ = cells(first)
            values = [f"{value} ± {_half(row)}" for row in (first, *others) for value in [cells(row)[3]]]
            lines.append("| " + " | ".join((method, setting, density, *values)) + " |")
    return "\n".join(lines)


def _half(row: Row) -> str:
    low, high = scale(row, row["low"]), scale(row, row["high"])
    decimals = 1 if row["metric"] == "exact" else 4
    return "?" if low is None or high is None else f"{(high - low) / 2:.{decimals}f}"


# The plot


def draw(data: Row, path: Path) -> None:
    """Write the plot of a result as a PNG, whole or not at all."""
    found = panels(data["rows"])
    if found:
        save(figure(data, found), path)


def figure(data: Row, found: dict[tuple[int, str], list[Row]]) -> Figure:
    """One panel for each length and task, tasks side by side."""
    from matplotlib.figure import Figure

    lengths = list(dict.fromkeys(length for length, _ in found))
    tasks = list(dict.fromkeys(task for _, task in found))
    drawing = Figure(figsize=(max(6.4 * len(tasks), 8.0), 4.6 * len(lengths) + 1.6), facecolor="white")
    drawing.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    model, device = data["settings"]["model"]["name"], data["environment"]["device"]
    drawing.suptitle(f"Quality against density: {model}, {device}; bars are intervals of 95 %", fontsize=12)
    axes = drawing.subplots(len(lengths), len(tasks), squeeze=False)
    style = styles([row["method"] for row in data["rows"]])
    for n, length in enumerate(lengths):
        for m, task in enumerate(tasks):
            draw_panel(axes[n][m], found.get((length, task), []), style)
            axes[n][m].set_title(f"{task}, {tokens(length)} tokens", fontsize=11)
    known: dict[str, Any] = {}
    for pane in axes.flat:
        handles, labels = pane.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True))
    columns = 5 if len(tasks) > 1 else 3
    drawing.legend(known.values(), known.keys(), loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    return drawing


def styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each method is drawn. Of flexproxy, the colour tells the stride, the marker the number of proxies."""
    names = list(dict.fromkeys(methods))
    ours = [name for name in names if name.startswith("flexproxy")]
    others = [name for name in names if name not in (*ours, *ORACLES, "dense")]
    strides = list(dict.fromkeys(name.rpartition(", ")[2] for name in ours))
    proxies = list(dict.fromkeys(name.rpartition(", ")[0] for name in ours))
    found: dict[str, dict[str, Any]] = {}
    for name in ours:
        first, _, last = name.rpartition(", ")
        colour, marker = OURS[strides.index(last) % len(OURS)], MARKERS[proxies.index(first) % len(MARKERS)]
        found[name] = {"color": colour, "marker": marker, "linestyle": "-", "linewidth": 2.0, "zorder": 4}
    for name, colour in ORACLES.items():
        found[name] = {"color": colour, "marker": "*", "linestyle": "-", "linewidth": 1.5, "zorder": 3}
    for n, name in enumerate(others):
        marker = MARKERS[(n + 2) % len(MARKERS)]
        found[name] = {"color": OTHERS[n % len(OTHERS)], "marker": marker, "linestyle": "--", "linewidth": 1.2}
    return found


def draw_panel(axes: Axes, rows: Sequence[Row], style: dict[str, dict[str, Any]]) -> None:
    axes.set_facecolor("white")
    axes.grid(True, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for row in rows:
        if row["method"] == "dense":
            value = scale(row, row["mean"])
            assert value is not None
            axes.axhline(value, color="#444444", linewidth=1.2, linestyle=":", label="dense")
    for name, points in series(rows).items():
        x, y, low, high = zip(*points, strict=True)
        below = [a - b for a, b in zip(y, low, strict=True)]
        above = [b - a for a, b in zip(y, high, strict=True)]
        axes.errorbar(
            x, y, yerr=(below, above), label=name, markersize=6, elinewidth=0.8, capsize=0, alpha=0.95, **style[name]
        )
    axes.set_xlabel("density (kept / causal blocks)", fontsize=10)
    if rows:
        axes.set_ylabel(LABELS[rows[0]["metric"]], fontsize=10)
