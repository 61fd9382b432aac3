"""What the commands share: their options, their errors, a progress bar."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TypeAlias

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Advance: TypeAlias = Callable[[str, int, int], None]
"""Called as ``advance(what is being done, how much of it is done, how much there is)``."""


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def fail(message: object) -> typer.BadParameter:
    """A user's mistake, as one line."""
    return typer.BadParameter(" ".join(str(message).split()))


def require(extra: str, *modules: str) -> None:
    """End the command if a package of an extra is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            print(f'flexproxy: {module} is not installed: pip install "flexproxy[{extra}]"', file=sys.stderr)
            raise typer.Exit(1)


@contextmanager
def progress_bar(console: Console) -> Iterator[Advance]:
    """A bar where there is a terminal; elsewhere a line for every stage."""
    if not console.is_terminal:
        begin, last = time.perf_counter(), ""

        def line(stage: str, done: int, total: int) -> None:
            nonlocal last
            if stage != last:
                console.print(f"{time.perf_counter() - begin:6.1f} s  {stage}")
            last = stage

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")

        def advance(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        yield advance
