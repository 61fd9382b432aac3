"""The needle task: key-value pairs hidden in a text, and queries that ask for them.

Text is read as bytes. A *needle* ``KEY kkkk VAL vvvv END`` overwrites eleven bytes somewhere in it; later a *query*
``QRY kkkk VAL vvvv END`` repeats the key, and a model that finds the needle predicts the four bytes after its ``VAL``.
Every query has exactly one needle, earlier in the text, and no two needles of a sequence share a key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KEY, VAL, QRY, END = 256, 257, 258, 259
VOCAB_SIZE = 260
ANSWER_LENGTH = 4

ALPHABET = b"abcdefghijklmnopqrstuvwxyz0123456789"
NUM_WORDS = len(ALPHABET) ** ANSWER_LENGTH  # different keys, and different values
_SLOT = 16  # a needle or a query lies somewhere inside an aligned window of 16 tokens
_LENGTH = 3 + 2 * ANSWER_LENGTH


class NeedleBatch(NamedTuple):
    """Token sequences with planted needles.

    tokens:   int64 ``[B, S]``, below ``VOCAB_SIZE``.
    answers:  bool ``[B, S]``, the bytes that a query asks for; four in a row for each query.
    planted:  bool ``[B, S]``, every token that is not text (the answers among them).
    """

    tokens: Tensor
    answers: Tensor
    planted: Tensor


def spell(ids: Tensor) -> Tensor:
    """Spell numbers ``[...]`` below 36**4 as four letters each: ``[..., 4]``."""
    alphabet = torch.tensor(list(ALPHABET), device=ids.device)
    powers = len(ALPHABET) ** torch.arange(ANSWER_LENGTH - 1, -1, -1, device=ids.device)
    return alphabet[ids[..., None] // powers % len(ALPHABET)]


def plant(text: Tensor, num_needles: int, generator: torch.Generator) -> NeedleBatch:
    """Plant ``num_needles`` needles, and one query for each, into a batch of texts.

    Args:
        text: ``[B, S]``, integers below 256.
        num_needles: needles per sequence; each takes two windows of 16 tokens, one for its query.
        generator: source of the positions, keys and values, on the device of ``text``.

    Raises:
        ValueError: the text has no room for so many needles.
    """
    batch, length = text.shape
    slots = length // _SLOT
    if not 0 < 2 * num_needles <= slots:
        raise ValueError(
            f"num_needles: expected 1 to {slots // 2} for a text of {length} tokens, got {num_needles}; "
            f"each needle takes {2 * _SLOT} tokens, so use a longer text or fewer needles"
        )
    device = text.device

    def randint(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    # Two slots for each pair: the earlier holds the needle, the later the query.
    order = torch.rand(batch, slots, generator=generator, device=device).argsort(dim=1)[:, : 2 * num_needles]
    slot = order.view(batch, num_needles, 2).sort(dim=2).values
    start = slot * _SLOT + randint(_SLOT - _LENGTH + 1, batch, num_needles, 2)

    # One key from each of num_needles ranges of words: random, and never the same twice.
    span = NUM_WORDS // num_needles
    key = spell(torch.arange(num_needles, device=device) * span + randint(span, batch, num_needles))
    value = spell(randint(NUM_WORDS, batch, num_needles))
    pattern = torch.empty(batch, num_needles, 2, _LENGTH, dtype=torch.long, device=device)
    pattern[:, :, 0, 0], pattern[:, :, 1, 0] = KEY, QRY
    pattern[..., 1:5] = key[:, :, None]
    pattern[..., 5] = VAL
    pattern[..., 6:10] = value[:, :, None]
    pattern[..., 10] = END

    position = start[..., None] + torch.arange(_LENGTH, device=device)  # [B, needles, 2, 11]
    tokens = text.long().scatter(1, position.flatten(1), pattern.flatten(1))
    nothing = torch.zeros(batch, length, dtype=torch.bool, device=device)
    planted = nothing.scatter(1, position.flatten(1), True)
    answers = nothing.scatter(1, position[:, :, 1, 6:10].flatten(1), True)
    return NeedleBatch(tokens, answers, planted)


def exact_answers(predictions: Tensor, batch: NeedleBatch) -> Tensor:
    """Which queries were answered exactly: bool ``[B * num_needles]``, in reading order.

    predictions: ``[B, S]``, the most probable *next* token at each position. Since every earlier token is given, all
    four being right is the same as greedy decoding giving the whole answer.
    """
    right = predictions[:, :-1] == batch.tokens[:, 1:]
    return right[batch.answers[:, 1:]].view(-1, ANSWER_LENGTH).all(dim=1)
