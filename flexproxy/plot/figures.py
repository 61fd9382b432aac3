"""Style of the figures, and writing them to files."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flexproxy.files import replacing, write_problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# They differ in lightness, so they can be told apart in print and by colour-blind readers.
LIGHT, MIDDLE, DARK = "#e8e8e8", "#f0b44c", "#1f3b73"
_TITLE_POINTS = 12


def save(figure: Figure, path: str | Path, force: bool = False) -> None:
    """Write a figure whole or not at all; the suffix of the path is the format.

    Args:
        force: replace the file if it exists.

    Raises:
        ValueError: nothing can be written there; the message says why.
        OSError: writing failed; the old file, if any, is unchanged.
    """
    path = Path(path)
    problem = save_problem(path, force)
    if problem is not None:
        raise ValueError(f"path: expected a file to write, got {path}: {problem}")
    with replacing(path) as unfinished, plain_style():
        figure.savefig(unfinished, format=path.suffix.lstrip(".").lower(), dpi=130, facecolor="white")


def save_problem(path: Path, force: bool) -> str | None:
    """Why no picture can be written to ``path``, in a few words; None if it can."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        return f"no picture format ends in {path.suffix!r}; use .png, .svg or .pdf"
    return write_problem(path, force)


def add_title(figure: Figure, title: str) -> None:
    """Add a title; the figure grows by its lines. Long words, such as paths, are broken as well."""
    lines = [part for line in title.splitlines() for part in _wrapped(line, 0.97 * 72 * figure.get_figwidth())]
    figure.set_figheight(figure.get_figheight() + 1.2 * _TITLE_POINTS / 72 * (len(lines) - 1))
    figure.suptitle("\n".join(lines), fontsize=_TITLE_POINTS, wrap=True)


def _wrapped(line: str, points: float) -> list[str]:
    from matplotlib.textpath import TextPath

    if not line.strip():
        return [""]
    needed = TextPath((0, 0), line, size=_TITLE_POINTS).get_extents().width
    return textwrap.wrap(line, max(1, int(0.95 * len(line) * points / needed))) if needed > points else [line]


@contextmanager
def plain_style() -> Iterator[None]:
    """Use matplotlib's default style inside, whatever the user's is: dark on white."""
    try:
        from matplotlib import style
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed, which flexproxy.plot needs: pip install matplotlib", name=error.name
        ) from error
    with style.context("default"):
        yield
