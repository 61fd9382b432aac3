"""Tasks for models that read bytes: entries planted into a text, in the tokens of ``flexproxy.cli.needle``.

- ``single``: ``KEY kkkk VAL vvvv END``, later ``QRY kkkk VAL vvvv END``; many keys, each with one value, asked once.
- ``multikey``: as ``single``, and before each query three more needles whose keys differ in the last letter alone.
- ``multivalue``: four needles of one key; the query ``QRY kkkk VAL vvvv VAL vvvv VAL vvvv VAL vvvv END`` asks for all
  values, in the order of the text.
- ``multiquery``: four keys; one query asks for all, in any order, ``QRY kkkk VAL vvvv QRY kkkk VAL vvvv ... END``.
- ``variables``: a needle, later ``KEY jjjj QRY kkkk END``, which gives j the value of k, later the query for j.

All windows that are planted into take a quarter of the text, or hold one group of entries. What a model answers here it
must have been trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.samples import Sample, Task
from flexproxy.cli.needle import ALPHABET, ANSWER_LENGTH, END, KEY, NUM_WORDS, QRY, VAL, NeedleBatch, plant, spell

Randint = Callable[..., Tensor]
TOKENS_PER_NEEDLE = 128  # of ``single``
VALUES = KEYS = 4  # of ``multivalue`` and ``multiquery``
DISTRACTORS = 3
_FREE = -1  # a place that is left to the text


def plant_task(name: str, text: Tensor, generator: torch.Generator) -> NeedleBatch:
    """Plant a task into a batch of texts: what models are trained and evaluated on.

    Args:
        name: one of ``NAMES``.
        text: ``[B, S]``, integers below 256.
        generator: source of all that is random, on the device of ``text``.

    Raises:
        ValueError: the text is too short.
    """
    batch, length = text.shape
    if name == "single":
        return plant(text, max(1, length // TOKENS_PER_NEEDLE), generator)
    patterns_of, entries, slot, offsets = _PLANS[name]
    if length < entries * slot:
        least = entries * slot
        raise ValueError(f"length: expected at least {least} tokens for {name}, got {length}; use a longer text")
    groups = max(1, length // (4 * entries * slot))

    def randint(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (batch, groups, *shape), generator=generator, device=text.device)

    patterns = patterns_of(groups, randint)
    slots = torch.rand(batch, length // slot, generator=generator, device=text.device).argsort(dim=1)
    order = slots[:, : groups * entries].view(batch, groups, entries).sort(dim=2).values
    start = order * slot + randint(slot - patterns.shape[3] + 1, entries)
    position = (start[..., None] + torch.arange(patterns.shape[3], device=text.device)).flatten(1)
    pattern = patterns.flatten(1)
    planted = torch.zeros_like(text, dtype=torch.bool).scatter_(1, position, pattern != _FREE)
    tokens = text.long().scatter(1, position, torch.where(pattern == _FREE, text.long().gather(1, position), pattern))
    letters = (torch.tensor(offsets)[:, None] + torch.arange(ANSWER_LENGTH)).flatten().to(text.device)
    asked = (start[:, :, -1, None] + letters).flatten(1)  # the query is the last entry of its group
    answers = torch.zeros_like(planted).scatter_(1, asked, True)
    return NeedleBatch(tokens, answers, planted)


# One function for each task: the entries of its groups ``[B, groups, entries, size]``, the query the last of them.


def _multikey(groups: int, randint: Randint) -> Tensor:
    key = _keys(groups, 1, randint)[:, :, 0]
    letters = torch.tensor(list(ALPHABET), device=key.device)
    last = (letters == key[..., 3:]).int().argmax(-1)  # place of the last letter in the alphabet
    steps = randint(2**30, len(ALPHABET) - 1).argsort(-1)[..., :DISTRACTORS] + 1
    near = key[:, :, None].repeat(1, 1, DISTRACTORS, 1)
    near[..., 3] = letters[(last[..., None] + steps) % len(ALPHABET)]
    keys = torch.cat([key[:, :, None], near], 2)
    values = spell(randint(NUM_WORDS, 1 + DISTRACTORS))
    order = randint(2**30, 1 + DISTRACTORS).argsort(-1)
    needles = _entries(KEY, keys, VAL, values, END)
    needles = needles.gather(2, order[..., None].expand_as(needles))
    return _stack(needles, _entries(QRY, key[:, :, None], VAL, values[:, :, :1], END))


def _multivalue(groups: int, randint: Randint) -> Tensor:
    key = _keys(groups, 1, randint)
    values = spell(randint(NUM_WORDS, VALUES))
    asked = [part for n in range(VALUES) for part in (VAL, values[:, :, n : n + 1])]
    return _stack(_entries(KEY, key.expand_as(values), VAL, values, END), _entries(QRY, key, *asked, END))


def _multiquery(groups: int, randint: Randint) -> Tensor:
    keys, values = _keys(groups, KEYS, randint), spell(randint(NUM_WORDS, KEYS))
    order = randint(2**30, KEYS).argsort(-1)[..., None].expand_as(keys)
    asked_keys, asked_values = keys.gather(2, order), values.gather(2, order)
    asked = [
        part for n in range(KEYS) for part in (QRY, asked_keys[:, :, n : n + 1], VAL, asked_values[:, :, n : n + 1])
    ]
    return _stack(_entries(KEY, keys, VAL, values, END), _entries(*asked, END))


def _variables(groups: int, randint: Randint) -> Tensor:
    keys, value = _keys(groups, 2, randint), spell(randint(NUM_WORDS, 1))
    first, second = keys[:, :, :1], keys[:, :, 1:]
    return _stack(
        _entries(KEY, first, VAL, value, END),
        _entries(KEY, second, QRY, first, END),
        _entries(QRY, second, VAL, value, END),
    )


# name: the entries, how many there are, tokens of the window of each, first letters of the answers in the query
_PLANS: dict[str, tuple[Callable[[int, Randint], Tensor], int, int, Sequence[int]]] = {
    "multikey": (_multikey, 2 + DISTRACTORS, 16, [6]),
    "multivalue": (_multivalue, 1 + VALUES, 32, range(6, 6 + 5 * VALUES, 5)),
    "multiquery": (_multiquery, 1 + KEYS, 64, range(6, 6 + 10 * KEYS, 10)),
    "variables": (_variables, 3, 16, [6]),
}
NAMES = ("single", *_PLANS)


def _keys(groups: int, each: int, randint: Randint) -> Tensor:
    """Keys ``[B, groups, each, 4]``: in a sequence no two share the first three letters."""
    heads = NUM_WORDS // len(ALPHABET)
    count = groups * each
    span = heads // count
    place = torch.arange(count).view(groups, each)
    drawn = randint(span, each)
    return spell((place.to(drawn.device) * span + drawn) * len(ALPHABET) + randint(len(ALPHABET), each))


def _entries(*parts: int | Tensor) -> Tensor:
    """Entries ``[B, groups, n, size]`` of single tokens and words ``[B, groups, n, 4]``, in this order."""
    shape = next(part.shape[:3] for part in parts if isinstance(part, Tensor))
    device = next(part.device for part in parts if isinstance(part, Tensor))
    columns = [p if isinstance(p, Tensor) else torch.full((*shape, 1), p, device=device) for p in parts]
    return torch.cat(columns, 3)


def _stack(*entries: Tensor) -> Tensor:
    """Entries of different sizes as one tensor, the shorter ones with free places at their end."""
    size = max(entry.shape[3] for entry in entries)
    return torch.cat([F.pad(entry, (0, size - entry.shape[3]), value=_FREE) for entry in entries], 2)


# As tasks of the harness: one sequence each.


def _window(seed: int, length: int, haystack: Tensor) -> tuple[Tensor, torch.Generator]:
    """A piece of the text ``[1, length]`` that the seed chooses, and the generator for what is planted."""
    if len(haystack) < length:
        raise ValueError(f"text: expected at least {length} bytes, got {len(haystack)}; use a longer text")
    generator = torch.Generator().manual_seed(seed)
    start = int(torch.randint(len(haystack) - length + 1, (1,), generator=generator))
    return haystack[None, start : start + length], generator


def _make(name: str, seed: int, length: int, haystack: Tensor) -> Sample:
    batch = plant_task(name, *_window(seed, length, haystack))
    starts = batch.answers[0].nonzero().flatten()[::ANSWER_LENGTH].tolist()
    return Sample(batch.tokens[0], tuple((start, start + ANSWER_LENGTH) for start in starts))


def _text(seed: int, length: int, haystack: Tensor) -> Sample:
    return Sample(_window(seed, length, haystack)[0][0].long(), ())


def tasks(haystack: Tensor) -> dict[str, Task]:
    """All tasks, made from a text as uint8 ``[bytes]``."""
    found = {name: Task(name, functools.partial(_make, name, haystack=haystack)) for name in NAMES}
    return found | {"text": Task("text", functools.partial(_text, haystack=haystack), "bits_per_byte")}
