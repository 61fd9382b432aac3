"""Tasks for models with a tokenizer: prompts in the manner of RULER (arXiv 2404.06654), in words of our own.

- ``single``: one sentence with a number hidden in the text, and asked for at the end.
- ``multikey``: such a sentence every few hundred tokens, each with its own key; one is asked for.
- ``multivalue``: four sentences with one key; all numbers are asked for, in their order.
- ``multiquery``: as ``multikey``, and four keys are asked for.
- ``variables``: two chains of assignments between variables; which variables have the value of one?
- ``words``: a list in which five words are much more frequent than the others; which, in alphabetical order?

The answer stands at the end of the prompt, so one prefill tells what greedy decoding would give, and is sparse for the
tokens of the answer too, where generation would decode dense. RULER counts an answer that is part of what was
generated; here every token must be the most probable one, so figures are not those of RULER.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from benchmarks.quality.samples import Sample, Task

TOKENS_PER_KEY = 512  # of ``multikey`` and ``multiquery``
ASKED = 4
CHAIN = 5
COMMON_WORDS, COMMON_TIMES, RARE_TIMES = 5, 30, 3
_ADJECTIVES = "amber brisk calm dusty eager faint gentle hollow jolly keen lively mellow narrow plain quiet rapid"
_NOUNS = (
    "anchor basket candle drum engine feather garden harbor island jacket kettle ladder mirror orchard pillow river"
)
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


class Prompt(NamedTuple):
    """What a task hides in the text, and what it asks.

    hidden: sentences for random places of the text, in this order.
    question: after the text, up to the answer.
    answers: joined by ``separators``, one fewer, at the end of the prompt.
    filler: more sentences until the prompt is full; None is the text itself.
    """

    hidden: Sequence[str]
    question: str
    answers: Sequence[str]
    separators: Sequence[str] = (", ",)
    filler: Sequence[str] | None = None


class PromptHaystack:
    """A text as sentences, and the tokenizer of the model.

    Raises:
        ValueError: the tokenizer does not say which characters a token stands for.
    """

    def __init__(self, text: str, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            got = type(tokenizer).__name__
            raise ValueError(f"model: expected one with a fast tokenizer, got {got}; convert it to tokenizer.json")
        self.text = text
        self.tokenizer = tokenizer
        self.sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+|\n+", text) if s.strip()]
        self.start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        self.encode = functools.lru_cache(maxsize=None)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def assemble(prompt: Prompt, length: int, haystack: PromptHaystack, rng: random.Random) -> Sample:
    """The prompt as exactly ``length`` tokens: text with the hidden sentences, question, answers.

    Raises:
        ValueError: the hidden sentences, the question and the answers alone are longer.
    """
    tail, answers = _tail(prompt, haystack)
    hidden = [haystack.encode(f" {sentence}") for sentence in prompt.hidden]
    room = length - len(haystack.start) - len(tail) - sum(map(len, hidden))
    if room < 0:
        raise ValueError(
            f"length: expected at least {length - room} tokens for this task, got {length}; use a longer text"
        )
    filler = haystack.sentences if prompt.filler is None else prompt.filler
    sentences: list[tuple[int, ...]] = []
    n = rng.randrange(len(filler)) if prompt.filler is None else 0
    while room > 0:
        sentence = haystack.encode(f" {filler[n % len(filler)]}")[:room]
        sentences.append(sentence)
        room, n = room - len(sentence), n + 1
    places = sorted(rng.randrange(len(sentences) + 1) for _ in hidden)
    tokens = list(haystack.start)
    for place, sentence in enumerate([*sentences, ()]):
        for position, needle in zip(places, hidden, strict=True):
            tokens += needle if position == place else ()
        tokens += sentence
    offset = len(tokens)
    spans = tuple((offset + start, offset + end) for start, end in answers)
    return Sample(torch.tensor(tokens + tail), spans)


def _tail(prompt: Prompt, haystack: PromptHaystack) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of the question and the answers, and where the answers are, tokenized in one piece as a model reads it."""
    text, characters = f"\n\n{prompt.question}", []
    for n, answer in enumerate(prompt.answers):
        text += " " if n == 0 else prompt.separators[(n - 1) % len(prompt.separators)]
        characters.append((len(text), len(text) + len(answer)))
        text += answer
    encoded = haystack.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = []
    for begin, end in characters:
        touched = [n for n, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > begin]
        spans.append((touched[0], touched[-1] + 1))
    return list(encoded["input_ids"]), spans


# One function for each task


def _needle(key: str, number: int) -> str:
    return f"Keep in mind that the secret number of the {key} is {number}."


def _numbers(rng: random.Random, count: int) -> list[int]:
    return rng.sample(range(1_000_000, 10_000_000), count)


def _draw_keys(rng: random.Random, count: int) -> list[str]:
    pairs = [f"{adjective} {noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split()]
    return rng.sample(pairs, min(count, len(pairs)))


def single(length: int, rng: random.Random) -> Prompt:
    (key,), (number,) = _draw_keys(rng, 1), _numbers(rng, 1)
    return Prompt([_needle(key, number)], _asking(key), [str(number)])


def _asking(key: str) -> str:
    return f"What is the secret number of the {key}? The text above says that the secret number of the {key} is"


def multikey(length: int, rng: random.Random) -> Prompt:
    keys = _draw_keys(rng, max(2, length // TOKENS_PER_KEY))
    numbers = _numbers(rng, len(keys))
    asked = rng.randrange(len(keys))
    return Prompt(list(map(_needle, keys, numbers)), _asking(keys[asked]), [str(numbers[asked])])


def multivalue(length: int, rng: random.Random) -> Prompt:
    (key,), numbers = _draw_keys(rng, 1), _numbers(rng, ASKED)
    question = (
        f"What are the {ASKED} secret numbers of the {key}, in the order of the text? The text above says that the "
        f"secret numbers of the {key} are"
    )
    return Prompt([_needle(key, number) for number in numbers], question, list(map(str, numbers)))


def multiquery(length: int, rng: random.Random) -> Prompt:
    keys = _draw_keys(rng, max(ASKED, length // TOKENS_PER_KEY))
    numbers = _numbers(rng, len(keys))
    asked = rng.sample(range(len(keys)), ASKED)
    names = [f"the {keys[n]}" for n in asked]
    question = (
        f"What are the secret numbers of {', '.join(names)}? The text above says that the secret number of {names[0]} "
        "is"
    )
    between = [f", that of {name} is " for name in names[1:]]
    return Prompt(list(map(_needle, keys, numbers)), question, [str(numbers[n]) for n in asked], between)


def variables(length: int, rng: random.Random) -> Prompt:
    names = ["".join(letters) for letters in _distinct(rng, 2 * CHAIN)]
    numbers = rng.sample(range(10_000, 100_000), 2)
    chains = [names[:CHAIN], names[CHAIN:]]
    lines = [
        [f"VAR {chain[0]} = {number}."] + [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(chain)]
        for chain, number in zip(chains, numbers, strict=True)
    ]
    hidden = [lines[n].pop(0) for n in rng.sample([0] * CHAIN + [1] * CHAIN, 2 * CHAIN)]
    question = (
        f"Which variables have the value {numbers[0]}, set directly or by another variable, in the order in which they "
        f"were set? The {CHAIN} variables are"
    )
    return Prompt(hidden, question, chains[0])


def _distinct(rng: random.Random, count: int) -> list[tuple[str, ...]]:
    found: dict[tuple[str, ...], None] = {}
    while len(found) < count:
        found[tuple(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))] = None
    return list(found)


def words(length: int, rng: random.Random) -> Prompt:
    """The rare words fill the prompt, whatever its length."""
    drawn: dict[str, None] = {}
    while len(drawn) < COMMON_WORDS + length // RARE_TIMES + 1:  # a word is a token or more
        drawn["".join(rng.choices(_SYLLABLES, k=4))] = None
    common, rare = list(drawn)[:COMMON_WORDS], list(drawn)[COMMON_WORDS:]
    hidden = common * COMMON_TIMES
    rng.shuffle(hidden)
    filler = [word for n in range(0, len(rare), 64) for word in rare[n : n + 64] * RARE_TIMES]
    question = (
        f"Which {COMMON_WORDS} words are the most frequent of the list above, in alphabetical order? The most frequent "
        "words are"
    )
    return Prompt(hidden, question, sorted(common), filler=filler)


def _make(
    prompt_of: Callable[[int, random.Random], Prompt], seed: int, length: int, haystack: PromptHaystack
) -> Sample:
    rng = random.Random(seed)
    return assemble(prompt_of(length, rng), length, haystack, rng)


def spread(seed: int) -> float:
    """Places in [0, 1) that fill it evenly, whatever their number: the bits of the seed behind the point, reversed."""
    return int(f"{seed:064b}"[::-1], 2) / 2**64


def _text(seed: int, length: int, haystack: PromptHaystack) -> Sample:
    """A piece of the text, tokenized anew. The pieces of the seeds lie evenly over the text, apart if it is long."""
    characters = 8 * length  # more than any common tokenizer needs
    while True:
        start = int(spread(seed) * max(1, len(haystack.text) - characters + 1))
        tokens = [*haystack.start, *haystack._encode(haystack.text[start : start + characters])][:length]
        if len(tokens) == length:
            break
        if characters >= len(haystack.text):
            raise ValueError(f"text: expected at least {length} tokens, got {len(tokens)}; use a longer text")
        characters *= 2
    read = tokens[len(haystack.start) :]
    return Sample(torch.tensor(tokens), (), len(haystack.tokenizer.decode(read).encode()) / len(read))


PROMPTS = {
    "single": single,
    "multikey": multikey,
    "multivalue": multivalue,
    "multiquery": multiquery,
    "variables": variables,
    "words": words,
}


def tasks(haystack: PromptHaystack, others: Mapping[str, PromptHaystack] = MappingProxyType({})) -> dict[str, Task]:
    """All tasks, made from a text; its own modelling is ``text``, that of others has their names."""
    found = {
        name: Task(name, functools.partial(_make, prompt_of, haystack=haystack)) for name, prompt_of in PROMPTS.items()
    }
    texts = {"text": haystack, **others}
    return found | {n: Task(n, functools.partial(_text, haystack=text), "bits_per_byte") for n, text in texts.items()}
