"""Plots of the benchmarks, drawn from their result files and from nothing else.

    python -m benchmarks.plots            # all of them
    python -m benchmarks.plots time peers

time, speedup and peers come from attention.json, build and stages from build.json, memory from memory.json,
prefill from prefill.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from benchmarks.baselines import METHODS
from benchmarks.contenders import SHAPE
from benchmarks.harness import (
    RESULTS,
    Density,
    Row,
    command,
)
from benchmarks.stages import STAGES
from flexproxy.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = dict[str, list[tuple[float, float]]]


class Wanted(NamedTuple):
    """What plots of one density or one length are drawn for."""

    density: float = 0.1
    length: int = 131072


# Mostly Okabe and Ito's colours, told apart by colour-blind readers; on white, so they look the same on a dark page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#882255", "#F0E442", "#BDBDBD")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
DENSE = {"SDPA FlashAttention-2": "dense FlashAttention-2", "SDPA cuDNN": "dense cuDNN"}


# What is drawn, from rows


def pick(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Rows that were measured, with these values, by length and density."""
    found = [r for r in rows if r["error"] is None and all(r.get(name) == value for name, value in wanted.items())]
    return sorted(found, key=lambda r: (r["length"], r.get("density") or 0.0))


def times(rows: Sequence[Row], density: float) -> Series:
    """Milliseconds by length: dense attention, and flexproxy at one target density."""
    wanted = {label: {"contender": name, "part": "dense"} for name, label in DENSE.items()}
    ours: Row = {"contender": "flexproxy", "target_density": density}
    wanted["flexproxy, build + attention"] = ours | {"part": "total", "kernel": "default"}
    wanted["flexproxy, build alone"] = ours | {"part": "build"}
    return {label: [(r["length"], r["median_ms"]) for r in pick(rows, **w)] for label, w in wanted.items()}


def speedups(rows: Sequence[Row], dense: str, least_length: int = 32768) -> Series:
    """Time of a dense contender divided by build + attention, by the density reached; one line for each length."""
    series: Series = {}
    for base in pick(rows, contender=dense, part="dense"):
        length = base["length"]
        ours = pick(rows, contender="flexproxy", part="total", kernel="default", length=length)
        if ours and length >= least_length:
            series[tokens(length)] = [(r["density"], base["median_ms"] / r["median_ms"]) for r in ours]
    return series


def peers(rows: Sequence[Row], length: int, density: float) -> dict[str, Row]:
    """Milliseconds of choosing blocks, making lists and attention, and the density reached, of each method."""
    bars: dict[str, Row] = {}
    for name in (*METHODS, "flexproxy"):
        for row in pick(rows, contender=name, length=length, target_density=density):
            bar = bars.setdefault(name, {"map": 0.0, "lists": 0.0, "sparse": 0.0, "density": row["density"]})
            if row["part"] in ("map", "lists", "build") or (row["part"] == "sparse" and row["kernel"] == "default"):
                bar["map" if row["part"] == "build" else row["part"]] = row["median_ms"]
    return bars


def stages(rows: Sequence[Row], length: int) -> dict[str, Row]:
    """Device milliseconds of each stage by number of proxy heads, the rest of the time between them as "gaps"."""
    bars: dict[str, Row] = {}
    for row in pick(rows, length=length, stage_error=None):
        parts = {stage: row[f"stage_{stage}_ms"] for stage in (*STAGES, "other")}
        parts["gaps"] = max(0.0, row["median_ms"] - sum(parts.values()))
        bars[_proxies(row)] = parts
    return bars


def _proxies(row: Row) -> str:
    rows = f", stride {row['query_stride']}, rows share" if row.get("sharing") == "rows" else ""
    return f"P = {row['num_proxies']}{rows}"


def builds(rows: Sequence[Row]) -> Series:
    """Milliseconds by length: of build, a line for each number of proxies, and of dense attention in the same run."""
    series: Series = {}
    for row in pick(rows):
        series.setdefault(f"build, {_proxies(row)}", []).append((row["length"], row["median_ms"]))
    dense = {row["length"]: row["dense_ms"] for row in pick(rows) if row.get("dense_ms") is not None}
    return series | {"dense cuDNN": list(dense.items())}


def memory(rows: Sequence[Row]) -> Series:
    """Peak MiB beyond the result by length, and the BlockMask itself."""
    series: Series = {}
    for row in pick(rows, part="build"):
        series.setdefault(f"build, P = {row['num_proxies']}", []).append((row["length"], row["extra_mib"]))
    series["the BlockMask itself"] = [(r["length"], r["kept_mib"]) for r in pick(rows, part="build", num_proxies=1)]
    series["attention with it"] = [(r["length"], r["extra_mib"]) for r in pick(rows, part="sparse")]
    return series


def prefills(rows: Sequence[Row], column: str, unit: float) -> Series:
    """A column of the prefills of a model, divided by a unit, by length: dense, and at each target density."""
    series: Series = {}
    for row in pick(rows, part="prefill"):
        ours = row["contender"] == "flexproxy"
        label = f"flexproxy, density {row['density']:g}" if ours else DENSE[row["contender"]]
        series.setdefault(label, []).append((row["length"], row[column] / unit))
    return series


# How it is drawn


def tokens(number: float) -> str:
    """131072 as 128K, 1048576 as 1M."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if number >= size and number % size == 0:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


def axes_of(title: str, environment: Row, panels: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6 if panels == 1 else 11.0, 4.8), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    figure.suptitle(f"{title}\n{environment['gpu']}, {SHAPE}", fontsize=12)
    panes = list(figure.subplots(1, panels, squeeze=False).flat)
    for axes in panes:
        plain(axes)
        axes.tick_params(labelsize=10)
    return figure, panes


def plain(axes: Axes) -> None:
    """White, with a grid behind what is drawn."""
    axes.set_facecolor("white")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_lines(axes: Axes, series: Series, xlabel: str, ylabel: str, lengths: bool = True) -> None:
    """Lines on logarithmic x; with ``lengths``, its ticks are the lengths, as 128K."""
    from matplotlib.ticker import NullFormatter, NullLocator

    for n, (label, points) in enumerate(series.items()):
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, label=label, color=COLOURS[n], marker=MARKERS[n], linewidth=2, markersize=6)
    axes.set_xscale("log", base=2 if lengths else 10)
    places = sorted({x for points in series.values() for x, _ in points})
    if not lengths:
        places = [x for x in (0.02, 0.05, 0.1, 0.2, 0.4, 1.0) if places and x <= 1.1 * places[-1]]
    axes.set_xticks(places, [tokens(x) if lengths else f"{x:g}" for x in places])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(xlabel, fontsize=11)
    axes.set_ylabel(ylabel, fontsize=11)
    axes.legend(fontsize=10, framealpha=1.0)


def logarithmic(axes: Axes) -> None:
    """A logarithmic y axis with numbers at 1, 2 and 5, or where these are many, at 1."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,), numticks=20))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_bars(figure: Figure, axes: Axes, bars: dict[str, Any], parts: dict[str, str], notes: Sequence[str]) -> None:
    """Horizontal bars, made of parts (key: label), in milliseconds; a note stands at the end of each."""
    names = list(bars)
    left = [0.0] * len(names)
    for n, (part, label) in enumerate(parts.items()):
        widths = [bars[name][part] for name in names]
        axes.barh(names, widths, left=left, color=COLOURS[n], label=label, edgecolor="white", height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, (end, note) in enumerate(zip(left, notes, strict=True)):
        axes.annotate(note, (end, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(left))
    axes.grid(False, axis="y")
    axes.set_xlabel("milliseconds", fontsize=11)
    figure.legend(fontsize=10, frameon=False, loc="outside lower center", ncols=min(5, len(parts)))


def plot_time(data: Row, options: Wanted) -> Figure:
    figure, (axes,) = axes_of(f"Causal attention, density {options.density:g}", data["environment"])
    draw_lines(axes, times(data["rows"], options.density), "tokens", "milliseconds")
    logarithmic(axes)
    return figure


def plot_speedup(data: Row, options: Wanted) -> Figure:
    figure, panes = axes_of("Build + attention against dense attention", data["environment"], len(DENSE))
    for axes, (name, label) in zip(panes, DENSE.items(), strict=True):
        series = speedups(data["rows"], name)
        draw_lines(axes, series, "density (kept / causal blocks)", f"times as fast as {label}", lengths=False)
        axes.axhline(1.0, color="#6B6B6B", linewidth=1, linestyle="--")
        logarithmic(axes)
    return figure


def plot_peers(data: Row, options: Wanted) -> Figure:
    title = f"{tokens(options.length)} tokens, density {options.density:g}: ways to choose blocks, one sparse kernel"
    figure, (axes,) = axes_of(title, data["environment"])
    bars = peers(data["rows"], options.length, options.density)
    notes = [f"{b['map'] + b['lists'] + b['sparse']:.1f} ms, density {b['density']:.3f}" for b in bars.values()]
    labels = {
        "map": "choice of blocks (flexproxy: all of build)",
        "lists": "lists for the kernel",
        "sparse": "attention",
    }
    draw_bars(figure, axes, bars, labels, notes)
    return figure


def plot_stages(data: Row, options: Wanted) -> Figure:
    figure, (axes,) = axes_of(f"Stages of build, {tokens(options.length)} tokens", data["environment"])
    bars = stages(data["rows"], options.length)
    shown = {part: part for part in (*STAGES, "other", "gaps") if any(bar[part] > 0 for bar in bars.values())}
    draw_bars(figure, axes, bars, shown, [f"{sum(bar.values()):.2f} ms" for bar in bars.values()])
    return figure


def plot_build(data: Row, options: Wanted) -> Figure:
    figure, (axes,) = axes_of("Build beside dense attention", data["environment"])
    draw_lines(axes, builds(data["rows"]), "tokens", "milliseconds")
    logarithmic(axes)
    return figure


def plot_memory(data: Row, options: Wanted) -> Figure:
    figure, (axes,) = axes_of("Peak device memory beyond inputs and result", data["environment"])
    draw_lines(axes, memory(data["rows"]), "tokens", "MiB")
    axes.set_yscale("symlog", linthresh=1)  # there may be a 0
    axes.set_ylim(0, 2 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter("{x:g}")
    return figure


def plot_prefill(data: Row, options: Wanted) -> Figure:
    figure, (seconds, memory_) = axes_of("Prefill of the Llama-3.1-8B shape in transformers", data["environment"], 2)
    draw_lines(seconds, prefills(data["rows"], "median_ms", 1000), "tokens", "time to first token, s")
    draw_lines(memory_, prefills(data["rows"], "peak_mib", 1024), "tokens", "peak memory beyond the weights, GiB")
    logarithmic(seconds)
    logarithmic(memory_)
    return figure


PLOTS: dict[str, tuple[str, Callable[[Row, Wanted], Figure]]] = {
    "time": ("attention", plot_time),
    "speedup": ("attention", plot_speedup),
    "peers": ("attention", plot_peers),
    "build": ("build", plot_build),
    "stages": ("build", plot_stages),
    "memory": ("memory", plot_memory),
    "prefill": ("prefill", plot_prefill),
}


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a PNG whole or not at all."""
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=dpi)


def draw(
    names: Annotated[list[str] | None, typer.Argument(help=f"By default all: {', '.join(PLOTS)}.")] = None,
    *,
    results: Annotated[Path, typer.Option(help="Folder of the result files.")] = RESULTS,
    out: Annotated[Path | None, typer.Option(help="Folder of the plots; by default that of the result files.")] = None,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Also draw runs that were stopped.")] = False,
    density: Density = 0.1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of peers and stages.")] = 131072,
) -> None:
    unknown = sorted(set(names or ()) - set(PLOTS))
    if unknown:
        raise typer.BadParameter(f"NAMES: expected {', '.join(PLOTS)}, got {', '.join(unknown)}")
    missing = []
    for name in names or PLOTS:
        source, plot = PLOTS[name]
        path = results / f"{source}.json"
        if not path.exists():
            missing.append(f"{name}: {path} does not exist; make it with python -m benchmarks.bench_{source}")
            continue
        data = json.loads(path.read_text())
        if not data.get("complete"):
            if not unfinished:
                missing.append(f"{name}: {path} is not from a finished run; repeat python -m benchmarks.bench_{source}")
                continue
            data["environment"]["gpu"] += ", a run that was stopped"  # part of every title
        picture = (out or results) / f"{name}.png"
        save(plot(data, Wanted(density, length)), picture)
        print(f"wrote {picture}")
    if missing:
        sys.exit("\n".join(missing))


def main(argv: Sequence[str] | None = None) -> None:
    command(draw, argv)


if __name__ == "__main__":
    main()
