"""What ``flexproxy.cli.needle`` plants, and how it judges answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexproxy.cli.needle import ANSWER_LENGTH, END, KEY, QRY, VAL, VOCAB_SIZE, NeedleBatch, exact_answers, plant

# (batch size, length, needles); the last has a needle or query in every window, the third a ragged end.
SHAPES = [(1, 32, 1), (3, 512, 4), (2, 1023, 9), (2, 512, 16)]


def planted(batch: int, length: int, needles: int, seed: int = 0) -> tuple[Tensor, NeedleBatch]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(256, (batch, length), generator=generator, dtype=torch.uint8)
    return text, plant(text, needles, generator)


def entries(tokens: Tensor, start: int) -> dict[tuple[int, ...], tuple[int, tuple[int, ...]]]:
    """All entries of one sequence that begin with the token ``start``: key -> (position, value)."""
    found = {}
    for position in (tokens == start).nonzero().flatten().tolist():
        entry = tokens[position : position + 11].tolist()
        assert (entry[5], entry[10]) == (VAL, END)
        key = tuple(entry[1:5])
        assert key not in found, "two entries share a key"
        found[key] = (position, tuple(entry[6:10]))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_every_query_has_one_earlier_needle_that_says_its_answer(shape: tuple[int, int, int], seed: int) -> None:
    _, data = planted(*shape, seed=seed)
    for tokens in data.tokens:
        needles, queries = entries(tokens, KEY), entries(tokens, QRY)
        assert len(needles) == shape[2]
        assert needles.keys() == queries.keys()
        for key, (position, value) in queries.items():
            assert needles[key][0] + 11 <= position
            assert needles[key][1] == value


@pytest.mark.parametrize("shape", SHAPES)
def test_the_text_is_untouched_elsewhere(shape: tuple[int, int, int]) -> None:
    text, data = planted(*shape)
    assert torch.equal(data.tokens[~data.planted], text.long()[~data.planted])
    assert (data.planted.sum(1) == 2 * 11 * shape[2]).all()
    assert data.tokens.dtype == torch.int64
    assert int(data.tokens.max()) < VOCAB_SIZE


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_the_values_of_the_queries(shape: tuple[int, int, int]) -> None:
    _, data = planted(*shape)
    for tokens, answers in zip(data.tokens, data.answers, strict=True):
        expected = torch.zeros_like(answers)
        for position, _ in entries(tokens, QRY).values():
            expected[position + 6 : position + 10] = True
        assert torch.equal(answers, expected)


def test_the_same_seed_plants_the_same_needles() -> None:
    (_, first), (_, again), (_, other) = planted(2, 512, 4), planted(2, 512, 4), planted(2, 512, 4, seed=1)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize("needles", [0, 17])
def test_no_room_for_the_needles(needles: int) -> None:
    with pytest.raises(
        ValueError, match=rf"num_needles: expected 1 to 16 .* 512 tokens, got {needles}; .* fewer needles"
    ):
        planted(1, 512, needles)


def test_exact_answers_wants_all_four_bytes() -> None:
    _, data = planted(2, 512, 4)
    predictions = data.tokens.roll(-1, dims=1)  # the next token, everywhere right
    assert exact_answers(predictions, data).tolist() == [True] * 8

    # One byte of the second answer of the first sequence, and all but the answers of the second sequence.
    second = data.answers[0].nonzero().flatten()[ANSWER_LENGTH + 2]
    predictions[0, second - 1] += 1
    before_answer = data.answers[1].roll(-1)
    predictions[1] = torch.where(before_answer, predictions[1], predictions[1] + 1)
    assert exact_answers(predictions, data).tolist() == [True, False] + [True] * 6
