"""Results to look at: tables for the terminal and for the documentation, and the plot of quality against density."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.harness import Row
from benchmarks.plots import plain, save, tokens
from benchmarks.quality.intervals import bootstrap
from benchmarks.quality.methods import COMPENSATED, DELTA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

LABELS = {"exact": "exact answers, %", "bits_per_byte": "bits per byte"}
AXES = {"exact": "exact answers, %", "bits_per_byte": "bits per byte, more than dense"}
DECIMALS = {"exact": 1, "bits_per_byte": 4}

# Mostly Okabe and Ito's colours: flexproxy in blues and solid lines, what it is compared with in others and dashed.
OURS = ("#08306b", "#2171b5", "#6baed6", "#7b3fa0", "#4a1486", "#9e9ac8")
OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#882255", "#44AA99", "#999933", "#661100", "#BBBBBB", "#DDBB55")
MARKERS = "os^DvPXhd<>p"
ORACLES = {"oracle": "#000000", "oracle, per row": "#777777"}


class Estimate(NamedTuple):
    """A mean and its interval of 95 %, which one sequence does not have; answers in percent."""

    mean: float
    low: float | None
    high: float | None

    def text(self, decimals: int, sign: str = "") -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:{sign}.{decimals}f}"
        return f"{self.mean:{sign}.{decimals}f} ({self.low:{sign}.{decimals}f} to {self.high:{sign}.{decimals}f})"


# What is shown, from rows


def panels(rows: Sequence[Row]) -> dict[tuple[int, str], list[Row]]:
    """What was measured, by length and task, in the order of the file."""
    found: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        if row["error"] is None:
            found.setdefault((row["length"], row["task"]), []).append(row)
    return found


def estimate(row: Row) -> Estimate:
    """What a row says."""
    factor = _factor(row)
    interval = (None if row[end] is None else factor * row[end] for end in ("low", "high"))
    return Estimate(factor * row["mean"], *interval)


def against_dense(row: Row, dense: Row) -> Estimate:
    """Difference from dense, with an interval by bootstrap over the sequences, which are the same for both.

    Most of what makes bits per byte vary is the text, which does not count here.
    """
    metric, factor = row["metric"], _factor(row)
    pairs = zip(row["cases"], dense["cases"], strict=True)
    differences = [factor * (_value(case, metric) - _value(other, metric)) for case, other in pairs]
    return Estimate(statistics.mean(differences), *(bootstrap(differences) or (None, None)))


def _factor(row: Row) -> float:
    return 100.0 if row["metric"] == "exact" else 1.0


def _value(case: Row, metric: str) -> float:
    """Of one sequence: its bits, or the share of its answers that is right."""
    return float(statistics.mean(case["exact"]) if metric == "exact" else case[metric])


def dense_of(rows: Sequence[Row]) -> Row | None:
    """The dense row of a panel; None where it failed."""
    return next((row for row in rows if row["method"] == "dense"), None)


def shown(row: Row, dense: Row | None) -> Estimate | None:
    """Of answers the share that is right, of bits those beyond dense: then the interval is not that of the texts."""
    if row["metric"] == "exact":
        return estimate(row)
    return None if dense is None else against_dense(row, dense)


def series(rows: Sequence[Row]) -> dict[str, list[tuple[float, Estimate]]]:
    """One line for each method but dense and trials: density and what is shown, by density.

    A variant of flexproxy whose points are all those of another line of flexproxy would lie under it, and has none.
    """
    dense = dense_of(rows)
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for row in rows:
        drawn = shown(row, dense)
        if drawn is not None and row is not dense and not row["method"].startswith("trial"):
            lines.setdefault(row["method"], []).append((row["density"], drawn))
    found: dict[str, list[tuple[float, Estimate]]] = {}
    for name, points in sorted(lines.items(), key=lambda line: -len(set(line[1]))):
        ours = (set(other) for earlier, other in found.items() if earlier.startswith("flexproxy"))
        if not (name.startswith("flexproxy") and any(set(points) <= other for other in ours)):
            found[name] = sorted(set(points))
    return {name: found[name] for name in lines if name in found}


# Tables


def cells(row: Row, dense: Row | None) -> tuple[str, ...]:
    """Method, setting, density, what was measured, and its difference from dense.

    Bits alone have no interval: it would be that of the texts.
    """
    decimals, own = DECIMALS[row["metric"]], estimate(row)
    measured = own.text(decimals) if row["metric"] == "exact" else f"{own.mean:.{decimals}f}"
    difference = "" if dense is None or row is dense else against_dense(row, dense).text(decimals, "+")
    return row["method"], row["setting"], f"{row['density']:.3f}", measured, difference


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One table for each length and task, and one of what failed."""
    from rich.table import Table

    for (length, task), members in panels(rows).items():
        unit = "answers" if members[0]["metric"] == "exact" else "sequences"
        title = f"{task}, {tokens(length)} tokens, {members[0]['number']} {unit}; in brackets intervals of 95 %"
        table = Table(title=title, title_justify="left", box=None)
        for n, name in enumerate(("method", "brought to", "density", LABELS[members[0]["metric"]], "minus dense")):
            table.add_column(name, justify="left" if n < 2 else "right", no_wrap=n > 0)
        for row in members:
            table.add_row(*cells(row, dense_of(members)))
        yield table
    failed = [row for row in rows if row["error"] is not None]
    if failed:
        table = Table("length", "task", "method", "error", title="failed", title_justify="left", box=None)
        for row in failed:
            table.add_row(str(row["length"]), row["task"], f"{row['method']}, {row['setting']}", row["error"])
        yield table


def markdown(rows: Sequence[Row], length: int, task: str) -> str:
    """A table of one length and task for the documentation: a line for each method, a column for each setting.

    Its figures are those of the plot. A density stands beside those that have another one than the setting says.
    """
    found = panels(rows)[length, task]
    dense = dense_of(found)
    settings = list(dict.fromkeys(row["setting"] for row in found if row is not dense))
    lines = [["method", *settings], ["---"] * (1 + len(settings))]
    for method in dict.fromkeys(row["method"] for row in found if row is not dense):
        own = {row["setting"]: row for row in found if row["method"] == method}
        lines.append([method, *(_short(own[name], dense) if name in own else "" for name in settings)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def columns_markdown(rows: Sequence[Row], columns: Sequence[tuple[int, str, str]], intervals: bool = True) -> str:
    """A line for each method that was measured at the first of the columns: length, task and setting."""
    found = panels(rows)
    names = [f"{task}, {tokens(length)}, {setting.removeprefix('density ')}" for length, task, setting in columns]
    dense = [dense_of(found[length, task]) for length, task, _ in columns]
    measured = [
        {row["method"]: row for row in found[length, task] if row["setting"] == setting}
        for length, task, setting in columns
    ]
    lines = [
        ["method", *names],
        ["---"] * (1 + len(names)),
        ["dense", *("" if x is None else _alone(x) for x in dense)],
    ]
    for method in measured[0]:
        pairs = zip(measured, dense, strict=True)
        cells = (_short(column[method], other, intervals) if method in column else "" for column, other in pairs)
        lines.append([method, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def lengths_markdown(rows: Sequence[Row], task: str, setting: str = "defaults") -> str:
    """What every method keeps with its own settings, and what it loses, by length: a line for each method."""
    found = {length: members for (length, name), members in sorted(panels(rows).items()) if name == task}
    own = {
        length: {row["method"]: row for row in members if row["setting"] == setting}
        for length, members in found.items()
    }
    lengths = [length for length, members in own.items() if members]
    lines = [["method", *map(tokens, lengths)], ["---"] * (1 + len(lengths))]
    for method in dict.fromkeys(name for length in lengths for name in own[length]):
        cells = [method]
        for length in lengths:
            row = own[length].get(method)
            drawn = None if row is None else shown(row, dense_of(found[length]))
            sign = "+" if row is not None and row["metric"] != "exact" else ""
            cells.append("" if row is None or drawn is None else _kept_and_lost(row, drawn, sign))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _kept_and_lost(row: Row, drawn: Estimate, sign: str) -> str:
    return f"{row['density']:.3f}, {drawn.mean:{sign}.{DECIMALS[row['metric']]}f}"


def _alone(row: Row) -> str:
    return f"{estimate(row).mean:.{DECIMALS[row['metric']]}f}{' bits' if row['metric'] != 'exact' else ''}"


def _short(row: Row, dense: Row | None, intervals: bool = True) -> str:
    drawn = shown(row, dense)
    if drawn is not None and not intervals:
        drawn = Estimate(drawn.mean, None, None)
    text = "" if drawn is None else drawn.text(DECIMALS[row["metric"]], "" if row["metric"] == "exact" else "+")
    target = row["setting"].removeprefix("density ")
    met = not target.replace(".", "", 1).isdecimal() or abs(row["density"] - float(target)) <= 0.01
    return text if met else f"{text}, density {row['density']:.3f}"


# The plot


def draw(data: Row, path: Path, only: Sequence[tuple[int, str]] | None = None, dpi: int = 150) -> None:
    """Write the plot of a result as a PNG, whole or not at all.

    only: lengths and tasks to show; None is all.
    """
    found = {place: rows for place, rows in panels(data["rows"]).items() if only is None or place in only}
    if found:
        save(figure(data, found), path, dpi)


def figure(data: Row, found: dict[tuple[int, str], list[Row]]) -> Figure:
    """One panel for each length and task."""
    from matplotlib.figure import Figure

    columns = min(len(found), 3 if len(found) != 4 else 2)
    lines = -(-len(found) // columns)
    drawing = Figure(figsize=(max(4.8 * columns, 8.0), 3.4 * lines + 1.4), facecolor="white")
    drawing.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    model, device = data["settings"]["model"]["name"], data["environment"]["device"]
    drawing.suptitle(f"Quality against density: {model}, {device}; bars are intervals of 95 %", fontsize=11)
    axes = drawing.subplots(lines, columns, squeeze=False)
    style = styles([row["method"] for row in data["rows"]])
    for pane in list(axes.flat)[len(found) :]:
        pane.remove()
    known: dict[str, Any] = {}
    for pane, ((length, task), rows) in zip(axes.flat, found.items(), strict=False):
        draw_panel(pane, rows, style)
        pane.set_title(f"{task}, {tokens(length)} tokens", fontsize=10)
        handles, labels = pane.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True))
    drawing.legend(known.values(), known.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return drawing


def styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each is drawn: flexproxy in blues and solid lines, a broken one with a correction; others dashed."""
    names = list(dict.fromkeys(methods))
    ours = [name for name in names if name.startswith("flexproxy")]
    plain = list(dict.fromkeys(_plain(name) for name in ours))
    others = [name for name in names if name not in (*ours, *ORACLES, "dense")]
    found: dict[str, dict[str, Any]] = {}
    for name in ours:
        place = plain.index(_plain(name))
        found[name] = {"color": OURS[place % len(OURS)], "marker": MARKERS[place % len(MARKERS)], "linewidth": 2.0}
        correction = name.removeprefix(_plain(name))
        found[name] |= {"zorder": 4, "linestyle": {"": "-", COMPENSATED: "-.", DELTA: ":"}[correction]}
    for name, colour in ORACLES.items():
        found[name] = {"color": colour, "marker": "*", "linestyle": "-", "linewidth": 1.2, "zorder": 5}
    for n, name in enumerate(others):
        marker = MARKERS[(n + 2) % len(MARKERS)]
        found[name] = {"color": OTHERS[n % len(OTHERS)], "marker": marker, "linestyle": "--", "linewidth": 1.2}
    return found


def _plain(name: str) -> str:
    """Without the correction of the output."""
    return name.removesuffix(COMPENSATED).removesuffix(DELTA)


def draw_panel(axes: Axes, rows: Sequence[Row], style: dict[str, dict[str, Any]]) -> None:
    plain(axes)
    dense = dense_of(rows)
    if dense is not None:
        value = estimate(dense).mean if dense["metric"] == "exact" else 0.0
        axes.axhline(value, color="#444444", linewidth=1.2, linestyle=":", label="dense")
    for name, points in series(rows).items():
        x = [density for density, _ in points]
        y = [drawn.mean for _, drawn in points]
        below = [0.0 if drawn.low is None else drawn.mean - drawn.low for _, drawn in points]
        above = [0.0 if drawn.high is None else drawn.high - drawn.mean for _, drawn in points]
        axes.errorbar(x, y, yerr=(below, above), label=name, markersize=5, elinewidth=0.7, alpha=0.95, **style[name])
    axes.set_xlabel("density (kept / causal blocks)", fontsize=9)
    axes.set_ylabel(AXES[rows[0]["metric"]], fontsize=9)
    if rows[0]["metric"] != "exact":  # losses of a hundredth stand beside those of a quarter
        axes.set_yscale("symlog", linthresh=0.01)
