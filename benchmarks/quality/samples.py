"""A sample: a sequence of tokens with the answers in it that a model has to predict, and how predictions are judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Span = tuple[int, int]
_MAX_LOGITS = 2**30 if torch.cuda.is_available() else 2**28  # of one sequence at once: 2 GiB in bf16, 1 GiB in fp32
_MAX_WIDE = 2**28  # of these, in fp32


class Sample(NamedTuple):
    """One sequence of a task.

    tokens: int64 ``[S]``.
    answers: first token of each answer, and the one after its last; empty where all of the text is to be predicted.
    bytes_per_token: mean over the tokens of a text that is to be predicted.
    """

    tokens: Tensor
    answers: tuple[Span, ...]
    bytes_per_token: float = 1.0


class Task(NamedTuple):
    """A task: a function of (seed, length) to a sample, the same for the same arguments."""

    name: str
    make: Callable[[int, int], Sample]
    metric: str = "exact"  # or "bits_per_byte", of all text


def scored_positions(sample: Sample, vocabulary: int) -> Tensor:
    """Positions whose next token counts, int64, ascending: those of the answers, or of all text.

    Of a long text with a large vocabulary as many as fit in memory, at equal distances.
    """
    if sample.answers:
        return torch.tensor([n for start, end in sample.answers for n in range(start - 1, end - 1)])
    last = len(sample.tokens) - 1
    count = min(last, max(1, _MAX_LOGITS // vocabulary))
    return torch.linspace(0, last - 1, count, dtype=torch.float64).round().long()


def exact_answers(logits: Tensor, positions: Tensor, sample: Sample) -> list[bool]:
    """Which answers are predicted whole, in their order.

    Every earlier token is given: where all tokens of an answer are the most probable, greedy decoding gives it.

    logits: ``[n, vocabulary]`` at ``positions [n]``, which hold those of ``scored_positions``.
    """
    right = torch.zeros(len(sample.tokens), dtype=torch.bool)
    right[positions + 1] = (logits.argmax(-1) == sample.tokens[positions + 1].to(logits.device)).cpu()
    return [bool(right[start:end].all()) for start, end in sample.answers]


def bits_per_token(logits: Tensor, positions: Tensor, sample: Sample) -> float:
    """Mean bits that the scored tokens take."""
    targets = sample.tokens[positions + 1].to(logits.device)
    rows = max(1, _MAX_WIDE // logits.shape[-1])
    pieces = zip(logits.split(rows), targets.split(rows), strict=True)
    nats = [F.cross_entropy(piece.float(), target, reduction="sum") for piece, target in pieces]
    return float(torch.stack(nats).double().sum()) / len(targets) / math.log(2)
