"""The tasks of benchmarks/quality: answers follow from what stands before them, spans are theirs, texts are apart."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.quality import byte_tasks, prompt_tasks, texts
from benchmarks.quality.real_models import byte_pair_tokenizer
from benchmarks.quality.samples import Sample
from benchmarks.quality.texts import Purpose, read_text
from flexproxy.cli.needle import END, KEY, QRY, VAL

TEXT = torch.randint(256, (20000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LENGTHS = (512, 1023, 2048)

Word = tuple[int, ...]


# Byte forms


def parse(tokens: list[int]) -> Iterator[tuple[int, str, Word, Any]]:
    """Entries in reading order: position, kind, key, and what follows; a reading of the docstring, by hand."""
    n = 0
    while n < len(tokens):
        if tokens[n] == KEY:
            key, mark, word = tuple(tokens[n + 1 : n + 5]), tokens[n + 5], tuple(tokens[n + 6 : n + 10])
            assert tokens[n + 10] == END
            assert mark in (VAL, QRY)
            yield n, "needle" if mark == VAL else "alias", key, word
            n += 11
        elif tokens[n] == QRY:
            while tokens[n] == QRY:
                key, n, values = tuple(tokens[n + 1 : n + 5]), n + 5, []
                while tokens[n] == VAL:
                    values.append((n + 1, tuple(tokens[n + 1 : n + 5])))
                    n += 5
                yield n, "query", key, values
            assert tokens[n] == END
            n += 1
        else:
            assert tokens[n] < 256
            n += 1


def check_answers(sample: Sample) -> tuple[int, set[Word]]:
    """Every value that a query asks for follows from earlier entries, and is an answer; the queries, and all keys."""
    known: dict[Word, list[Word]] = {}
    spans, queries = [], 0
    for _, kind, key, what in parse(sample.tokens.tolist()):
        if kind == "needle":
            known.setdefault(key, []).append(what)
        elif kind == "alias":
            assert key not in known
            known[key] = known[what]
        else:
            queries += 1
            assert [value for _, value in what] == known[key]
            spans += [(start, start + 4) for start, _ in what]
    assert list(sample.answers) == spans
    return queries, set(known)


@pytest.mark.parametrize("name", byte_tasks.NAMES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.sampled_from(LENGTHS))
def test_answers_follow_from_the_text(name: str, seed: int, length: int) -> None:
    sample = byte_tasks.tasks(TEXT)[name].make(seed, length)
    assert sample.tokens.shape == (length,)
    assert sample.tokens.dtype == torch.int64
    queries, keys = check_answers(sample)
    assert queries > 0
    assert len(sample.answers) == queries * (byte_tasks.VALUES if name == "multivalue" else 1)
    per_query = {"multikey": 4, "variables": 2}.get(name, 1)
    assert len(keys) == per_query * queries
    heads = {key[:3] for key in keys}  # letters that tell keys apart, of ``single`` all four
    assert len(heads) == (queries if name == "multikey" else len(keys)) or name == "single"


@pytest.mark.parametrize("name", byte_tasks.NAMES)
def test_the_check_sees_a_wrong_answer(name: str) -> None:
    sample = byte_tasks.tasks(TEXT)[name].make(0, 2048)
    sample.tokens[sample.answers[-1][0]] ^= 1
    with pytest.raises(AssertionError):
        check_answers(sample)


def test_a_multikey_query_has_near_keys_before_it() -> None:
    tokens = byte_tasks.tasks(TEXT)["multikey"].make(1, 2048).tokens.tolist()
    earlier: list[Word] = []
    for _, kind, key, _ in parse(tokens):
        if kind == "query":
            near = [other for other in earlier if other[:3] == key[:3]]
            assert len(near) == len(set(near)) == 4
        earlier += [key] if kind == "needle" else []


@pytest.mark.parametrize("name", byte_tasks.NAMES)
def test_the_text_is_untouched_elsewhere(name: str) -> None:
    text = TEXT[:4096].view(2, 2048)
    batch = byte_tasks.plant_task(name, text, torch.Generator().manual_seed(0))
    assert torch.equal(batch.tokens[~batch.planted], text.long()[~batch.planted])
    assert (batch.planted & batch.answers).sum() == batch.answers.sum()
    assert int(batch.planted.sum()) <= text.numel() // 4
    assert not torch.equal(batch.tokens[0], batch.tokens[1])


@pytest.mark.parametrize("name", [*byte_tasks.NAMES, "text"])
def test_a_seed_is_a_sample(name: str) -> None:
    make = byte_tasks.tasks(TEXT)[name].make
    first, again, other = make(3, 1024), make(3, 1024), make(4, 1024)
    assert torch.equal(first.tokens, again.tokens)
    assert first.answers == again.answers
    assert not torch.equal(first.tokens, other.tokens)


def test_what_is_too_short() -> None:
    with pytest.raises(ValueError, match="length: expected at least 320 tokens for multiquery, got 256; use a longer"):
        byte_tasks.tasks(TEXT)["multiquery"].make(0, 256)
    with pytest.raises(ValueError, match="text: expected at least 512 bytes, got 100; use a longer text"):
        byte_tasks.tasks(TEXT[:100])["text"].make(0, 512)


# Prompts


PROSE = "".join(f"The {n}th day was as long as the {n + 1}th. Nobody knew why, or asked. " for n in range(400))


@pytest.fixture(scope="module")
def haystack() -> prompt_tasks.PromptHaystack:
    return prompt_tasks.PromptHaystack(PROSE, make_tokenizer())


def make_tokenizer() -> Any:
    """A byte-level BPE, as large models have, of a few hundred merges."""
    pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([PROSE, "the secret number of the is"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")


def spelled(sample: Sample, haystack: prompt_tasks.PromptHaystack) -> tuple[str, list[str]]:
    """The prompt up to the first answer, and the answers."""
    start = sample.answers[0][0]
    answers = [haystack.tokenizer.decode(sample.tokens[a:b]) for a, b in sample.answers]
    return haystack.tokenizer.decode(sample.tokens[:start]), [answer.strip() for answer in answers]


@pytest.mark.parametrize("name", ["single", "multikey", "multivalue", "multiquery"])
@pytest.mark.parametrize("seed", range(3))
def test_secret_numbers(name: str, seed: int, haystack: prompt_tasks.PromptHaystack) -> None:
    sample = prompt_tasks.tasks(haystack)[name].make(seed, 3000)
    assert sample.tokens.shape == (3000,)
    assert int(sample.tokens[0]) == haystack.tokenizer.bos_token_id
    prompt, answers = spelled(sample, haystack)
    body, _, question = prompt.rpartition("\n\n")
    hidden = re.findall(r"secret number of the (\w+ \w+) is (\d{7})\.", body)
    assert len(hidden) == {"single": 1, "multivalue": 4}.get(name, 3000 // prompt_tasks.TOKENS_PER_KEY or 1)
    assert len({number for _, number in hidden}) == len(hidden)
    assert len({key for key, _ in hidden}) == (1 if name == "multivalue" else len(hidden))
    asked = list(
        dict.fromkeys(re.findall(r"(?:of|,) (?:the )?(\w+ \w+)(?=[,?]| in| is)", question.split("?")[0] + "?"))
    )
    if name == "multivalue":
        assert answers == [number for _, number in hidden]
    elif name == "multiquery":
        assert answers == [dict(hidden)[key.removeprefix("the ")] for key in asked]
    else:
        assert answers == [dict(hidden)[asked[0]]]
    assert sample.answers[-1][1] == 3000, "the answer ends the prompt"


def test_variables_follow_their_chain(haystack: prompt_tasks.PromptHaystack) -> None:
    prompt, answers = spelled(prompt_tasks.tasks(haystack)["variables"].make(0, 2000), haystack)
    value: dict[str, str] = {}
    for name, other, number in re.findall(r"VAR ([A-Z]{5}) = (?:VAR ([A-Z]{5})|(\d{5}))\.", prompt):
        assert name not in value
        value[name] = number or value[other]  # what it refers to stands before it
    wanted = re.findall(r"have the value (\d{5})", prompt)[0]
    assert answers == [name for name, number in value.items() if number == wanted]
    assert len(value) == 2 * len(answers) == 2 * prompt_tasks.CHAIN


def test_common_words_are_the_most_frequent(haystack: prompt_tasks.PromptHaystack) -> None:
    prompt, answers = spelled(prompt_tasks.tasks(haystack)["words"].make(0, 2000), haystack)
    body = prompt.rpartition("\n\n")[0].removeprefix("<s>").split()
    counts = {word: body.count(word) for word in dict.fromkeys(body)}
    assert answers == sorted(answers)
    assert [counts.pop(word) for word in answers] == [prompt_tasks.COMMON_TIMES] * prompt_tasks.COMMON_WORDS
    assert len(counts) > 50
    assert max(counts.values()) <= prompt_tasks.RARE_TIMES


@pytest.mark.parametrize("name", [*prompt_tasks.PROMPTS, "text"])
def test_a_seed_is_a_prompt(name: str, haystack: prompt_tasks.PromptHaystack) -> None:
    make = prompt_tasks.tasks(haystack)[name].make
    first, again, other = make(3, 1500), make(3, 1500), make(4, 1500)
    assert torch.equal(first.tokens, again.tokens)
    assert first.answers == again.answers
    assert not torch.equal(first.tokens, other.tokens)


def test_bytes_of_a_token(haystack: prompt_tasks.PromptHaystack) -> None:
    sample = prompt_tasks.tasks(haystack)["text"].make(0, 500)
    text = haystack.tokenizer.decode(sample.tokens[1:])
    assert text in PROSE
    assert sample.bytes_per_token == pytest.approx(len(text) / 499)
    assert sample.answers == ()


def test_prompts_that_do_not_fit(haystack: prompt_tasks.PromptHaystack) -> None:
    with pytest.raises(ValueError, match=r"length: expected at least \d+ tokens for this task, got 60; use a longer"):
        prompt_tasks.tasks(haystack)["single"].make(0, 60)
    with pytest.raises(ValueError, match=r"text: expected at least 90000 tokens, got \d+; use a longer text"):
        prompt_tasks.tasks(haystack)["text"].make(0, 90000)
    with pytest.raises(ValueError, match="model: expected one with a fast tokenizer, got object; convert it"):
        prompt_tasks.PromptHaystack(PROSE, object())


# Texts


def write_files(folder: Path, count: int) -> dict[str, bytes]:
    """Files of which each has its own content, by name."""
    contents = {f"package{n % 7}/module{n}.py": f"text = {n}\n".encode() for n in range(count)}
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return contents


@pytest.mark.parametrize("trained_on", [True, False])
def test_training_calibration_and_evaluation_are_disjoint_and_complete(tmp_path: Path, trained_on: bool) -> None:
    contents = write_files(tmp_path, 400)
    purposes: tuple[Purpose, ...] = get_args(Purpose) if trained_on else ("calibration", "evaluation")
    lines = {purpose: read_text(tmp_path, purpose, trained_on).content.splitlines() for purpose in purposes}
    for one, other in combinations(purposes, 2):
        assert not set(lines[one]) & set(lines[other]), (one, other)
    everything = [line for found in lines.values() for line in found]
    assert sorted(everything) == sorted(content.strip() for content in contents.values())
    if trained_on:
        held_out = len(lines["calibration"]) + len(lines["evaluation"])
        assert 5 <= held_out <= 40  # one in twenty


def test_the_files_that_training_leaves_out_are_those_of_the_committed_model() -> None:
    """The rule by which examples/needle was trained; another would evaluate it on what it has seen."""
    for path in (f"package/module{n}.py" for n in range(200)):
        share = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") / 2**32
        assert texts.is_held_out(path) == (share < 0.05)


def test_a_copy_is_on_the_same_side(tmp_path: Path) -> None:
    write_files(tmp_path, 60)
    (tmp_path / "copies").mkdir()
    for file in sorted(tmp_path.glob("package*/*.py")):
        (tmp_path / "copies" / f"copy_of_{file.name}").write_bytes(file.read_bytes())
    sides = [set(read_text(tmp_path, side).content.splitlines()) for side in ("calibration", "evaluation")]
    assert not sides[0] & sides[1]
    assert min(map(len, sides)) > 10


def test_a_file_is_split_by_pieces(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    content = TEXT.repeat(10).add(torch.arange(200000) // 20000).to(torch.uint8).numpy().tobytes()
    path.write_bytes(content)
    sides = [read_text(path, side) for side in ("calibration", "evaluation")]
    assert sum(len(text.content) for text in sides) == len(content)
    assert sum(text.pieces for text in sides) == 13
    assert sides[0].content[: texts.PIECE_BYTES] in content
    assert min(text.pieces for text in sides) > 0
    assert sides[0].name == "book.txt"


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text: expected a file or folder with text for evaluation, found none in .*"):
        read_text(tmp_path, "evaluation")


def test_a_sample_is_what_models_are_trained_on() -> None:
    """The harness plants what training plants, with the generator of its seed."""
    generator = torch.Generator().manual_seed(11)
    start = int(torch.randint(len(TEXT) - 1024 + 1, (1,), generator=generator))
    batch = byte_tasks.plant_task("variables", TEXT[None, start : start + 1024], generator)
    sample = byte_tasks.tasks(TEXT)["variables"].make(11, 1024)
    assert isinstance(batch.tokens, Tensor)
    assert torch.equal(batch.tokens[0], sample.tokens)


def test_sentencepiece_joins_the_best_pair_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers reads as Unigram: there "abc" would be one piece, for its score is the best."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers, "convert_slow_tokenizer", None)
    tokens = ["<pad>", "</s>", "<s>", "<unk>", "<0x64>", "\u2581", "a", "b", "c", "ab", "bc", "\u2581ab", "[INST]"]
    scores = [0.0] * 5 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, 0.0]
    kinds = [3, 3, 3, 3, 6, *[1] * 7, 4]
    special = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
    tokenizer = byte_pair_tokenizer(tokens, scores, kinds, special)
    assert tokenizer.is_fast
    ids = tokenizer.encode(" ababcd[INST]", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["\u2581ab", "a", "bc", "<0x64>", "[INST]"]
    assert tokenizer.decode(ids) == " ababcd[INST]"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 0)
