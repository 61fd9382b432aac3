"""``flexproxy bench``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flexproxy.cli.common import check_outputs, fail, impossible, writing

if TYPE_CHECKING:
    from flexproxy.cli.benchmarking import Comparison

_FOLDER = Path("flexproxy-bench")


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME", help="Among build, attention, memory, tiles, cold, prefill, calibrate; by default all."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few, short cases, to see that everything runs.")] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Measure nothing; show the committed results. Works without a GPU.")
    ] = False,
    list_all: Annotated[
        bool, typer.Option("--list", help="Say which benchmarks and committed results there are.")
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Folder for the results, NAME.json for each; what is done is there at any time.")
    ] = _FOLDER,
    force: Annotated[bool, typer.Option("--force", help="Replace results that exist.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON, and nothing else.")] = False,
) -> None:
    """Run the project's benchmarks on this GPU, and compare with the committed results."""
    from flexproxy.cli import benchmarking
    from flexproxy.cli.inputs import InputError

    chosen = names or list(benchmarking.BENCHMARKS)
    for name in chosen:
        if name not in benchmarking.BENCHMARKS:
            raise fail(f"NAME: expected some of {', '.join(benchmarking.BENCHMARKS)}, got {name}; see --list")
    try:
        known = {name: benchmarking.committed(name) for name in chosen}
    except InputError as error:
        raise impossible(error) from error
    if list_all:
        _list(known, as_json)
        return
    measured: dict[str, dict[str, Any] | None] = known if show else {**_measure(chosen, output, quick, force)}
    comparisons = {
        name: benchmarking.compare(name, result["rows"], (known[name] or {"rows": []})["rows"])
        for name, result in measured.items()
        if result is not None
    }
    if show:  # what is committed beside itself
        comparisons = {
            name: [replace(x, measured=None, ratio=None) for x in found] for name, found in comparisons.items()
        }
        measured = dict.fromkeys(measured)
    if as_json:
        entries = ({"benchmark": name} | _environments(measured[name], known[name]) for name in comparisons)
        rows = ([row.to_json() for row in found] for found in comparisons.values())
        print(json.dumps([entry | {"rows": found} for entry, found in zip(entries, rows, strict=True)], indent=1))
        return
    for name, found in comparisons.items():
        _print(name, _environments(measured[name], known[name]), found, committed_only=show)
    for name in (name for name in chosen if known[name] is None):
        print(f"{name}: no committed result")


def _measure(names: Sequence[str], folder: Path, quick: bool, force: bool) -> dict[str, dict[str, Any]]:
    """Run benchmarks one after another; each checks its results before it times anything."""
    import torch

    from flexproxy.cli import benchmarking

    if not torch.cuda.is_available():
        raise impossible("bench: expected a CUDA GPU, torch finds none; --show shows the committed results")
    paths = check_outputs("--output", folder, [f"{name}.json" for name in names], force)
    with writing("--output", folder):
        folder.mkdir(exist_ok=True)
    for name, path in zip(names, paths, strict=True):
        with writing("--output", path), _benchmark_errors(name), contextlib.redirect_stdout(sys.stderr):
            benchmarking.main_of(name)([*(["--quick"] if quick else []), "--out", str(path)])
    return {name: benchmarking.read(path) for name, path in zip(names, paths, strict=True)}


@contextlib.contextmanager
def _benchmark_errors(name: str) -> Iterator[None]:
    """A benchmark ends itself where its results are wrong, or where something is missing."""
    try:
        yield
    except SystemExit as error:
        raise impossible(f"{name}: {error}") from error
    except ModuleNotFoundError as error:
        raise impossible(f'{name}: {error.name} is not installed: pip install "flexproxy[all]"') from error


def _environments(measured: Mapping[str, Any] | None, committed: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "measured_on": None if measured is None else measured["environment"],
        "committed_from": None if committed is None else committed["environment"],
    }


def _list(known: Mapping[str, Mapping[str, Any] | None], as_json: bool) -> None:
    from flexproxy.cli.benchmarking import BENCHMARKS

    if as_json:
        entries = [
            {"benchmark": name, "about": BENCHMARKS[name].about, "committed_from": result and result["environment"]}
            for name, result in known.items()
        ]
        print(json.dumps(entries, indent=1))
        return
    table = Table()
    for heading in ("benchmark", "what it measures", "committed result"):
        table.add_column(heading)
    for name, result in known.items():
        table.add_row(name, BENCHMARKS[name].about, "none" if result is None else _where(result["environment"]))
    Console(highlight=False).print(table)


def _where(environment: Mapping[str, Any] | None) -> str:
    if environment is None:
        return "nowhere"
    return f"{environment['gpu']}, torch {environment['torch']}, {environment['date']}"


def _print(name: str, environments: dict[str, Any], rows: Sequence[Comparison], committed_only: bool) -> None:
    title = f"{name}: committed, {_where(environments['committed_from'])}"
    if not committed_only:
        title = f"{name}: measured, {_where(environments['measured_on'])}\nbeside {title}"
    table = Table(title=title)
    for heading in ("case", "value"):
        table.add_column(heading)
    for heading in ("committed",) if committed_only else ("measured", "committed", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        case = ", ".join(f"{key} {value}" for key, value in row.case.items())
        numbers = [_number(row.committed, 3)]
        if not committed_only:
            numbers = [row.error or _number(row.measured, 3), *numbers, _number(row.ratio, 2)]
        table.add_row(case, row.value, *numbers)
    Console(highlight=False).print(table)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
