"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, beside ``path``, which takes its place at the end; if writing fails, nothing has changed."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_problem(path: Path, force: bool) -> str | None:
    """Why nothing can be written to ``path``, in a few words; None if it can."""
    if path.is_dir():
        return "is a folder; name a file"
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    if not os.access(path.parent, os.W_OK):
        return f"the folder {path.parent} cannot be written to"
    if os.path.lexists(path) and not force:
        return "exists already; name another file, or replace it with force=True (--force)"
    return None
