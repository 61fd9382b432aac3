"""Sequences to calibrate on and to confirm with, and marks by which a text that was used is known again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexproxy.calibration.errors import CalibrationError

_WINDOW = 32  # tokens that are hashed together
_KNOWN = 256  # tokens in a row that are always known again
_MULTIPLIER = 6364136223846793005  # odd, mixes in 64 bits


def split(texts: Sequence[Any], length: int | None, longest: int, number: int, unit: int) -> tuple[Tensor, Tensor]:
    """Sequences to decide on and others to confirm with: int64 ``[n, S]`` each, with no token in common.

    The texts are cut into sequences. Those in the first half decide, those in the second half confirm; with two texts
    of a length, that is one text each.

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
    pieces = [text[start : start + length] for text in ids for start in range(0, len(text) - length + 1, length or 1)]
    if length < unit or len(pieces) < 2:
        raise CalibrationError(
            f"texts: expected two sequences of {max(length, unit)} tokens at least, one to decide on and one to "
            f"confirm by, got texts of {sizes[:5]} tokens; use longer texts or a lower length"
        )
    half = len(pieces) // 2
    first, second = _spread(pieces[:half], number // 2), _spread(pieces[half:], number // 2)
    return torch.stack(first), torch.stack(second)


def marks(sequences: Iterable[Tensor]) -> list[str]:
    """Hashes of some windows of 32 tokens, sorted; texts that have 256 tokens in a row in common share one at least.

    Of the windows in any 256 tokens the one with the lowest hash is taken ("Winnowing", Schleimer and others, 2003), so
    it does not matter where a text was cut.
    """
    found: set[int] = set()
    powers = torch.tensor([_wrapped(pow(_MULTIPLIER, power, 2**64)) for power in range(1, _WINDOW + 1)])
    for sequence in sequences:
        tokens = sequence.reshape(-1).to("cpu", torch.int64)
        if len(tokens) < _WINDOW:
            continue
        hashes = (tokens.unfold(0, _WINDOW, 1) * powers).sum(-1)  # modulo 2**64
        hashes = (hashes ^ (hashes >> 29)) * _MULTIPLIER
        hashes ^= hashes >> 32
        found.update(hashes.unfold(0, min(len(hashes), _KNOWN - _WINDOW + 1), 1).amin(-1).tolist())
    return sorted(f"{value % 2**64:016x}" for value in found)


def _wrapped(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


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


def _spread(pieces: Sequence[Tensor], number: int) -> list[Tensor]:
    number = min(number, len(pieces))
    return [pieces[index * len(pieces) // number] for index in range(number)]
