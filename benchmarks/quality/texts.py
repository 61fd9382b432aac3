"""Texts, and what each may be used for: training, calibration or evaluation, never two of them.

The split is made here, and nowhere else. A file below a folder of training texts is held out of the training by a hash
of its path. What is held out is for calibration (tuning, choosing settings) or for evaluation (what is reported), by a
hash of its content, so that a copy under another name is on the same side.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Purpose = Literal["training", "calibration", "evaluation"]
HELD_OUT_SHARE = 0.05
PIECE_BYTES = 16384  # a single file is split piece by piece
SUFFIXES = (".py", ".txt", ".md", ".rst")


class Text(NamedTuple):
    """A text for one purpose: its content, what it was read from, and how many files or pieces it is made of."""

    content: bytes
    name: str
    pieces: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()[:16]


def default_folder() -> Path:
    """The Python packages of the running interpreter."""
    return Path(sysconfig.get_path("purelib"))


def is_held_out(path: str) -> bool:
    """Whether training leaves a file out: one in twenty, by its path below the folder, with forward slashes."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def held_out_purpose(content: bytes) -> Purpose:
    """What a text that no model was trained on is for; one half each."""
    return "evaluation" if hashlib.sha256(content).digest()[0] % 2 else "calibration"


def read_text(path: Path, purpose: Purpose, trained_on: bool = False) -> Text:
    """What of a file, or of all files below a folder, is for one purpose, joined.

    Args:
        path: a folder (Python, text, Markdown and reStructuredText files are read), or a file, split in pieces.
        trained_on: the folder is one that the model may have been trained on by ``training.py``: only its Python files
            count, and those that training takes are for nothing else.

    Raises:
        ValueError: there is no such text.
    """
    kept = [content for content, of in _pieces(path, trained_on, purpose) if of == purpose]
    text = Text(b"".join(kept), path.resolve().name, len(kept))
    if not text.content:
        raise ValueError(
            f"text: expected a file or folder with text for {purpose}, found none in {path}; one piece of "
            f"{PIECE_BYTES // 1024} KiB in two is for evaluation, so use a longer text"
        )
    return text


def _pieces(path: Path, trained_on: bool, wanted: Purpose) -> Iterator[tuple[bytes, Purpose]]:
    """Contents with their purposes; files that are for training are read only if these are wanted."""
    if path.is_file():
        content = path.read_bytes()
        for start in range(0, len(content), PIECE_BYTES):
            piece = content[start : start + PIECE_BYTES]
            yield piece, held_out_purpose(piece)
        return
    for file in sorted(file for file in path.rglob("*") if file.suffix in (SUFFIXES[:1] if trained_on else SUFFIXES)):
        for_training = trained_on and not is_held_out(file.relative_to(path).as_posix())
        if file.is_file() and (not for_training or wanted == "training"):
            content = file.read_bytes()
            yield content, "training" if for_training else held_out_purpose(content)
