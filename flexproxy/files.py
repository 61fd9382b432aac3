"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str], force: bool = True) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` at the end; if writing fails, nothing has changed.

    Where ``path`` is a symbolic link, its target is replaced.

    Args:
        force: replace a file that exists.

    Raises:
        ValueError: nothing can be written to ``path``; the message says why.
    """
    problem = write_problem(path, force)
    if problem is not None:
        raise ValueError(f"path: expected a file to write, got {path}: {problem}")
    target = _target(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], data: Any, force: bool = True) -> None:
    """Write a JSON file; arguments and errors as ``replacing``."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    with replacing(path, force) as unfinished:
        unfinished.write_text(text)


def write_problem(path: str | os.PathLike[str], force: bool) -> str | None:
    """Why nothing can be written to ``path``, in a few words; None if it can."""
    target = _target(path)
    if not target.parent.is_dir():
        return f"the folder {target.parent} does not exist"
    if not os.access(target.parent, os.W_OK):
        return f"the folder {target.parent} cannot be written to"
    if os.path.lexists(target) and not target.is_file():
        return "is not a regular file; name a file"
    if os.path.lexists(path) and not force:
        return "exists already; name another file, or replace it with force=True (--force)"
    return None


def _target(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
