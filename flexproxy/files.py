"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, beside ``path``, which takes its place at the end; if writing fails, nothing has changed.

    Where ``path`` is a symbolic link, the link stays, and what it leads to is replaced.

    Raises:
        OSError: what is there is no ordinary file.
    """
    path = Path(os.path.realpath(path))
    if _is_special(path):
        raise FileExistsError(errno.EEXIST, "is no ordinary file", str(path))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, force: bool) -> None:
    """Write a text whole or not at all.

    Raises:
        ValueError: nothing can be written there; the message says why.
        OSError: writing failed; what was there before still is.
    """
    check_problem(path, write_problem(Path(path), force))
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def check_problem(path: str | os.PathLike[str], problem: str | None) -> None:
    """Raise ValueError if there is one, as ``write_problem`` finds it."""
    if problem is not None:
        raise ValueError(f"path: expected a file to write, got {path}: {problem}")


def write_problem(path: Path, force: bool) -> str | None:
    """Why nothing can be written to ``path``, in a few words; None if it can."""
    if path.is_dir():
        return "is a folder; name a file"
    folder = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    if not os.access(folder, os.W_OK):
        return f"the folder {folder} cannot be written to"
    if _is_special(path):
        return "is no ordinary file; name another file"
    if os.path.lexists(path) and not force:
        return "exists already; name another file, or replace it with force=True (--force)"
    return None


def _is_special(path: Path) -> bool:
    """Whether a device, a pipe or a folder is there, which a file must not replace; or a link that leads to itself."""
    return os.path.lexists(os.path.realpath(path)) and not path.is_file()
