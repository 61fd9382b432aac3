"""The training of needle models: what it is fed, what it writes, and that it says what it did."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from transformers import LlamaForCausalLM

from benchmarks.quality import train as command
from benchmarks.quality import training
from benchmarks.quality.byte_tasks import plant_task
from benchmarks.quality.texts import read_text
from flexproxy.cli.inputs import load_decoder, reads_bytes
from flexproxy.cli.needle import VOCAB_SIZE, NeedleBatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for n in range(400):
        (folder / f"module{n}.py").write_text(f"number = {n}\n" * 60)
    return folder


def arguments(text: Path, out: Path, *more: str) -> list[str]:
    return ["--recipe", "toy", "--device", "cpu", "--text", str(text), "--out", str(out), "--sequences", "1", *more]


@pytest.mark.slow
def test_two_seeds(text: Path, tmp_path: Path) -> None:
    command.main(arguments(text, tmp_path, "--steps", "3", "--seeds", "0,1"))
    records = [json.loads((tmp_path / f"seed{seed}" / "training_log.json").read_text()) for seed in (0, 1)]
    for seed, record in enumerate(records):
        assert record["seed"] == seed
        assert record["steps"] == record["limits"]["steps"] == record["log"][-1]["step"] == 3
        assert record["environment"]["device"] == "CPU"
        assert record["recipe"]["tasks"] == ["single", "variables"]
        assert sorted(record["calibration"]) == ["single", "variables"]
        for lengths in record["calibration"].values():
            assert list(lengths) == ["256", "2048"]
            for measured in lengths.values():
                assert measured["queries"] > 0
                assert 5 < measured["bits_per_byte"] < 12, "three steps teach nothing"
        model = load_decoder(str(tmp_path / f"seed{seed}"), CPU, "sdpa")
        assert reads_bytes(model)
        assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert records[0]["log"][-1]["loss"] != records[1]["log"][-1]["loss"]


def test_the_corpus_has_no_evaluation_text(text: Path) -> None:
    corpus = training.read_corpus(text, CPU)
    evaluation = set(read_text(text, "evaluation", trained_on=True).content.splitlines())
    for part in (corpus.training, corpus.calibration):
        assert not evaluation & set(bytes(part.tolist()).splitlines())
    assert corpus.counts["training_bytes"] == len(corpus.training) > 10 * len(corpus.calibration) > 0
    assert len(evaluation) > 1


def test_training_learns(text: Path) -> None:
    corpus = training.read_corpus(text, CPU)
    recipe = training.Recipe(shape=command.RECIPES["toy"].shape, lengths={128: (2, 1.0)}, learning_rate=0.02)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(training.model_config(recipe))
    log = training.train(model, corpus.training, recipe, training.Limits(steps=50), seed=0)
    assert [entry["step"] for entry in log] == [25, 50]
    assert log[-1]["loss"] < log[0]["loss"] - 0.5


def test_a_training_ends_at_the_first_limit() -> None:
    assert training.Limits(seconds=10, steps=100).progress(5.0, 80) == pytest.approx(0.8)
    assert training.Limits(seconds=10, steps=100).progress(9.0, 80) == pytest.approx(0.9)
    assert training.Limits(seconds=10).progress(5.0, 10**9) == pytest.approx(0.5)


@pytest.mark.parametrize("name", command.RECIPES)
def test_every_task_fits_every_length_of_its_recipe(name: str) -> None:
    recipe = command.RECIPES[name]
    assert sum(share for _, share in recipe.lengths.values()) == pytest.approx(1.0)
    assert training.model_config(recipe).max_position_embeddings >= max(*recipe.lengths, *recipe.evaluated)
    for task in dict.fromkeys(recipe.tasks):
        for length in (*recipe.lengths, *recipe.evaluated):
            text = torch.zeros(1, length, dtype=torch.uint8)
            assert plant_task(task, text, torch.Generator().manual_seed(0)).answers.any()


def test_what_weighs_in_the_loss() -> None:
    """Text 1, answers 4, the rest of what is planted 0.05; and the mean over the answers alone."""
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    answers, planted = (torch.tensor([[bool(x) for x in row]]) for row in ([0, 0, 0, 1, 0], [0, 0, 1, 1, 0]))
    logits = torch.zeros(1, 4, VOCAB_SIZE)
    logits[0, 2, 4] = 100.0  # sure of the answer, and of nothing else

    def lm_head(hidden: Tensor) -> Tensor:
        return logits

    def body(**_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=torch.zeros(1, 5, 1))

    model = SimpleNamespace(model=body, lm_head=lm_head)
    loss, answer_loss = training.loss_of(model, NeedleBatch(tokens, answers, planted))
    unsure = torch.log(torch.tensor(float(VOCAB_SIZE)))
    torch.testing.assert_close(loss, unsure * (2 + 0.05) / (2 + 0.05 + 4))
    torch.testing.assert_close(answer_loss, torch.tensor(0.0))


def test_what_is_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SystemExit, match=r"text: expected more than 65536 bytes for calibration, got \d+; use more files"
    ):
        command.main([*arguments(text, tmp_path), "--recipe", "large"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda: torch finds no CUDA device"):
        command.main([*arguments(text, tmp_path), "--device", "cuda"])
    assert list(tmp_path.iterdir()) == []


def test_the_example_shares_the_training() -> None:
    example = pytest.importorskip("examples.needle.train")  # not part of a source distribution
    assert (example.run, example.save) == (training.run, training.save)
    config = json.loads(Path(example.__file__).with_name("config.json").read_text())
    assert {name: config[name] for name in example.RECIPE.shape} == example.RECIPE.shape
