"""Shared by the commands: options, errors, files, a progress bar."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flexproxy import files
from flexproxy.cli.inputs import ImpossibleError, InputError
from flexproxy.files import write_problem

Advance: TypeAlias = Callable[[str, int, int], None]
"""Called as ``advance(what is being done, how much of it is done, how much there is)``."""

# Arguments and options of several commands.
Model: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Folder or Hugging Face name of a decoder; examples/needle of the repository works."
    ),
]
Prompt: TypeAlias = Annotated[
    Path | None, typer.Option(help="Text file to prefill; by default the source of Python's argparse.")
]
PROMPT_LENGTH = (
    "Tokens of the text; by default all, at most 8192 on a CPU and 131072 on a GPU, and what the model is made for."
)
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Where: TypeAlias = Annotated[Device, typer.Option(help="Where to run; auto takes a GPU if there is one.")]


def require(*modules: str) -> None:
    """End the command if a package is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ImpossibleError(f'{module} is not installed: pip install "flexproxy[hf]"')


def check_output(option: str, path: Path, force: bool) -> None:
    """End the command before the work is done if its result cannot be written."""
    problem = write_problem(path, force)
    if problem is not None:
        raise InputError(f"{option} {path}: {problem}")


def check_picture(path: Path | None, force: bool) -> None:
    """``check_output`` for ``--picture``, which also needs matplotlib; None asks for none."""
    if path is None:
        return
    require("matplotlib")
    from flexproxy.plot.figures import save_problem

    problem = save_problem(path, force)
    if problem is not None:
        raise InputError(f"--picture {path}: {problem}")


def check_outputs(option: str, folder: Path, names: Sequence[str], force: bool) -> list[Path]:
    """``check_output`` for files in a folder, which may have to be made; gives their paths."""
    paths = [folder / name for name in names]
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{option}: expected a folder, got the file {folder}; name a folder")
    for path in paths if folder.exists() else [folder]:
        check_output(option, path, force)
    return paths


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Turn errors of writing, such as a full disk, into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ImpossibleError(f"{option} {path}: {getattr(error, 'strerror', None) or error}") from error


def write_json(option: str, path: Path, data: Any) -> None:
    with writing(option, path):
        files.write_json(path, data)


@contextmanager
def progress_bar(console: Console) -> Iterator[Advance]:
    """A progress bar on a terminal; elsewhere a line for every stage."""
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
