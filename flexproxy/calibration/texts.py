"""Sequences to calibrate on and to confirm with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexproxy.calibration.choose import CalibrationError


def split(texts: Sequence[Any], length: int | None, longest: int, number: int, unit: int) -> tuple[Tensor, Tensor]:
    """Sequences to decide on and others to confirm with: int64 ``[n, S]`` each, without a token in common.

    The texts are cut into sequences. Of each text the first half decides and the second half confirms; texts of one
    sequence take turns.

    Args:
        texts: token ids of each text, ``[S]`` or ``[1, S]``, or ints.
        length: S; None is the longest of which the texts have two, up to ``longest``.
        longest: the longest by default.
        number: sequences at most, at least 2.
        unit: S is rounded down to a multiple of it where it is not given.

    Raises:
        TypeError, ValueError: the texts do not give two sequences; the message says how many they give.
    """
    ids = [_as_ids(text) for text in texts]
    sizes = sorted((len(text) for text in ids), reverse=True)
    if length is None:
        longest_pair = max([size // 2 for size in sizes[:1]] + sizes[1:2], default=0)
        length = min(longest_pair, longest) // unit * unit
    decide: list[Tensor] = []
    confirm: list[Tensor] = []
    for text in ids:
        pieces = [text[start : start + length] for start in range(0, len(text) - length + 1, length or 1)]
        half = (len(pieces) + (len(decide) <= len(confirm))) // 2
        decide, confirm = decide + pieces[:half], confirm + pieces[half:]
    if length < unit or not (decide and confirm):
        raise CalibrationError(
            f"texts: expected two sequences of {max(length, unit)} tokens at least, one to decide on and one to "
            f"confirm by, got texts of {sizes[:5]} tokens; use longer texts or a lower length"
        )
    return _spread(decide, number // 2), _spread(confirm, number // 2)


def _as_ids(text: Any) -> Tensor:
    try:
        ids = torch.as_tensor(text)
    except (TypeError, ValueError, RuntimeError):
        ids = None
    if ids is not None and ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids is None or ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        got = type(text).__name__ if ids is None else f"{ids.dtype} of shape {list(ids.shape)}"
        raise TypeError(f"texts: expected token ids of each text, [S], got {got}; use tokenizer(text).input_ids")
    return ids.to("cpu", torch.int64)


def _spread(pieces: Sequence[Tensor], number: int) -> Tensor:
    number = min(number, len(pieces))
    return torch.stack([pieces[index * len(pieces) // number] for index in range(number)])
