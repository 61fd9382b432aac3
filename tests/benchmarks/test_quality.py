"""benchmarks/quality: methods at equal density on one kernel, what a model answers, and results that resume."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

import transformers

from benchmarks.baselines import to_block_mask
from benchmarks.quality import __main__ as command
from benchmarks.quality import evaluate, models, report
from benchmarks.quality.attention import attention_with_lse, prefill_by
from benchmarks.quality.byte_tasks import TASKS
from benchmarks.quality.evaluate import ResultFile, run_case
from benchmarks.quality.methods import BASELINES, DENSE, WITHOUT_CORRECTION, Method, check, methods_of
from benchmarks.quality.models import attention_shape, default_model, fingerprint, name_of, tasks_for
from benchmarks.quality.samples import Sample, Task, bits_per_token, exact_answers, scored_positions
from benchmarks.quality.texts import Text
from flexproxy import ProxyConfig, reference
from flexproxy.cli.inputs import load_decoder, reads_bytes
from tests.accuracy import skip_unless_flex_compiles
from tests.benchmarks.test_quality_tasks import PROSE, make_tokenizer
from tests.tiny_model import HEADS, LAYERS, save_tiny_model

if not hasattr(transformers.PreTrainedModel, "set_attn_implementation"):
    pytest.skip("this transformers cannot switch the attention of a model", allow_module_level=True)

CPU = torch.device("cpu")
LENGTH = 640  # five blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_decoder(str(folder), CPU, "sdpa")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(PROSE * 4)
    return path


# How predictions are judged


def test_answers_and_bits() -> None:
    sample = Sample(torch.tensor([5, 1, 2, 3, 4, 5, 6, 7]), ((2, 4), (6, 8)), 2.0)
    positions = scored_positions(sample, 10)
    assert positions.tolist() == [1, 2, 5, 6]
    logits = torch.zeros(4, 10)
    logits[range(4), [2, 3, 6, 7]] = 50.0
    assert exact_answers(logits, positions, sample) == [True, True]
    logits[3, 1] = 60.0
    assert exact_answers(logits, positions, sample) == [True, False]

    text = Sample(sample.tokens, ())
    assert scored_positions(text, 10).tolist() == list(range(7))
    assert scored_positions(text, 2**27).tolist() == [0, 6], "as many as fit, first and last among them"
    assert bits_per_token(torch.zeros(7, 8), torch.arange(7), text) == pytest.approx(3.0)


# Methods


def layer_inputs(length: int = 2048) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    return 2 * q, k, v


def names(methods: list[Method]) -> list[str]:
    return [str(method) for method in methods]


def test_methods_of() -> None:
    configs = [ProxyConfig(num_proxies=p, stride=4, min_budget=128) for p in (1, 2)]
    found = methods_of(configs, ["oracle", "FlashPrefill V2"], [0.25], [0.9], 128)
    assert names(found) == [
        "dense",
        "flexproxy P 1, stride 4, density 0.25",
        "flexproxy P 2, stride 4, density 0.25",
        "oracle, density 0.25",
        "FlashPrefill V2, density 0.25",
        f"{WITHOUT_CORRECTION}, density 0.25",
        "flexproxy P 1, stride 4, gamma 0.9",
        "flexproxy P 2, stride 4, gamma 0.9",
    ]
    assert [method.corrected for method in found].count(True) == 1
    again = methods_of(configs[:1], [], [0.25], [0.9], 128, compensate=True)
    assert [(method.name, method.corrected) for method in again[1:3]] == [
        ("flexproxy P 1, stride 4", False),
        ("flexproxy P 1, stride 4 + means", True),
    ]
    assert again[1].select is again[2].select
    check(found, 4, 2, 16)
    with pytest.raises(ValueError, match="num_proxies"):
        check(methods_of([ProxyConfig(num_proxies=3)], [], [0.5], [], 128), 4, 2, 16)


def test_every_method_comes_to_the_density() -> None:
    q, k, _ = layer_inputs()
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    configs = [ProxyConfig(num_proxies=2, min_budget=128)]
    for method in methods_of(configs, BASELINES, [0.6], [], 128)[1:]:
        assert method.select is not None
        block_map = method.select(q, k)
        assert not (block_map & ~causal).any(), method
        assert block_map.diagonal(dim1=2, dim2=3).all(), method
        reached = float(block_map.sum() / (4 * causal.sum()))
        # FlashPrefill keeps 0.76 of so short a prompt whatever its threshold.
        assert reached == pytest.approx(0.77 if "Flash" in method.name else 0.6, abs=0.01), method


# The attention of a model


def everything(q: Tensor, _k: Tensor) -> Tensor:
    blocks = -(-q.shape[2] // 128)
    return torch.ones(blocks, blocks, dtype=torch.bool).tril().expand(1, q.shape[1], -1, -1)


def diagonal(q: Tensor, _k: Tensor) -> Tensor:
    blocks = -(-q.shape[2] // 128)
    return torch.eye(blocks, dtype=torch.bool).expand(1, q.shape[1], -1, -1)


def logits_of(model: Any, method: Method, tokens: Tensor) -> tuple[Tensor, dict[int, list[float]]]:
    with torch.no_grad(), prefill_by(model, method) as density:
        return model(input_ids=tokens, use_cache=False).logits, density


def test_all_blocks_are_dense_attention(model: Any) -> None:
    skip_unless_flex_compiles("cpu")
    tokens = torch.randint(256, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    dense, none = logits_of(model, DENSE, tokens)
    assert none == {}
    for corrected in (False, True):  # nothing is dropped, so there is nothing to correct
        logits, density = logits_of(model, Method("all", "", everything, corrected), tokens)
        torch.testing.assert_close(logits, dense, rtol=1e-3, atol=1e-3)
        assert density == {layer: [1.0] * HEADS for layer in range(LAYERS)}
    sparse, density = logits_of(model, Method("diagonal", "", diagonal), tokens)
    assert density == {layer: [pytest.approx(5 / 15)] * HEADS for layer in range(LAYERS)}
    torch.testing.assert_close(sparse[:, :128], dense[:, :128], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(sparse[:, 128:], dense[:, 128:], atol=1e-2)
    corrected_, _ = logits_of(model, Method("diagonal", "", diagonal, corrected=True), tokens)
    error, own = ((x - dense)[:, 128:].abs().mean() for x in (corrected_, sparse))
    assert error < own, "the means of what was dropped are better than nothing"
    assert model.config._attn_implementation == "sdpa"


def test_attention_is_put_back_after_an_error(model: Any) -> None:
    def broken(_q: Tensor, _k: Tensor) -> Tensor:
        raise RuntimeError("no blocks")

    with pytest.raises(RuntimeError, match="no blocks"):
        logits_of(model, Method("broken", "", broken), torch.zeros(1, LENGTH, dtype=torch.long))
    assert model.config._attn_implementation == "sdpa"


def test_what_is_not_plain_causal_attention_is_refused(model: Any) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    tokens = torch.zeros(1, 256, dtype=torch.long)
    mask = torch.ones(1, 256, dtype=torch.long)
    mask[:, :10] = 0
    with pytest.raises(ValueError, match="expected one sequence without padding"), prefill_by(model, DENSE_BLOCKS):
        model(input_ids=tokens, attention_mask=mask)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    sliding = MistralForCausalLM(MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=64, **shape))
    with pytest.raises(ValueError, match="model: expected causal layers, got a sliding window"):
        logits_of(sliding.eval(), DENSE_BLOCKS, tokens)


DENSE_BLOCKS = Method("all", "", everything)


@pytest.mark.parametrize("length", [384, 450])
def test_attention_with_lse(length: int) -> None:
    q, k, v = (x.double() for x in layer_inputs(length))
    block_map = torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))[..., : -(-length // 128), :] > 0.5
    block_map = (block_map[..., : -(-length // 128)] | torch.eye(-(-length // 128), dtype=torch.bool)).tril()
    out, lse = attention_with_lse(q, k, v, block_map)
    allowed = block_map.repeat_interleave(128, 2).repeat_interleave(128, 3)[..., :length, :length]
    allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
    exact = reference.attention(q, k, v, allowed, q.shape[-1] ** -0.5)
    torch.testing.assert_close(out, exact)
    scores = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~allowed, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert to_block_mask(block_map, length).shape == (1, 4, length, length)


# A whole run


def arguments(folder: Path, text: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--model", str(folder), "--text", str(text), "--device", "cpu", "--out", str(out)]
    sizes = ["--lengths", str(LENGTH), "--sequences", "2", "--densities", "0.6", "--min-budget", "128"]
    return [*fixed, *sizes, "--proxies", "2", "--strides", "4", "--baselines", "XAttention", "oracle", *more]


CELLS = [("single", m) for m in ("dense", "flexproxy P 2, stride 4", "XAttention", "oracle")]
CELLS += [("text", method) for _, method in CELLS]


def test_strides_of_queries_and_of_keys() -> None:
    assert command.config_of(2, command.stride_option("8:2"), 128) == ProxyConfig(
        num_proxies=2, query_stride=8, stride=2, min_budget=128
    )
    assert command.config_of(1, command.stride_option("4"), 0).strides == (4, 4)
    assert command.config_of(2, command.stride_option("outlier8:1"), 64) == ProxyConfig.outliers(min_budget=64)
    for text in ("8:", ":2", "0", "8:2:1", "x", "outlier4", "outlier:1", "8:outlier1"):
        with pytest.raises(argparse.ArgumentTypeError, match="as 8:2 or outlier8:1, got"):
            command.stride_option(text)


def without_times(data: dict[str, Any]) -> dict[str, Any]:
    return data | {"environment": None, "rows": [row | {"seconds": None} for row in data["rows"]]}


@pytest.mark.slow
def test_a_run_resumes_and_refuses(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    skip_unless_flex_compiles("cpu")
    whole, out = tmp_path / "whole.json", tmp_path / "stopped.json"
    command.main(arguments(folder, text, whole))
    assert "single, 640 tokens, 10 answers" in capsys.readouterr().out
    data = json.loads(whole.read_text())
    check_result(data)
    assert whole.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in whole.read_text(), "paths of this machine"
    assert str(folder.parent) not in whole.read_text()

    run_cell, done, last = evaluate.run_cell, list[str](), 3

    def stopping(*args: Any) -> Any:
        if len(done) == last:
            raise KeyboardInterrupt
        done.append(args[1].name)
        return run_cell(*args)

    monkeypatch.setattr(evaluate, "run_cell", stopping)
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments(folder, text, out))
    stopped = json.loads(out.read_text())
    assert not stopped["complete"]
    assert [row["method"] for row in stopped["rows"]] == done == [method for _, method in CELLS[:3]]
    with pytest.raises(
        SystemExit, match=r"out: .* same settings, .* min_budget 128 instead of 256; choose another --out"
    ):
        command.main([*arguments(folder, text, out), "--min-budget", "256"])
    assert json.loads(out.read_text()) == stopped

    done.clear()
    last = len(CELLS)
    command.main(arguments(folder, text, out))
    assert done == [method for _, method in CELLS[3:]], "finished cells are not measured again"
    assert without_times(json.loads(out.read_text())) == without_times(data)


def check_result(data: dict[str, Any]) -> None:
    assert data["complete"]
    assert data["environment"]["device"] == "CPU"
    assert {"model", "text", "sequences", "densities", "baselines"} <= set(data["settings"])
    assert [(row["task"], row["method"]) for row in data["rows"]] == CELLS
    for row in data["rows"]:
        assert row["error"] is None
        dense = row["method"] == "dense"
        assert row["density"] == (1.0 if dense else pytest.approx(0.6, abs=0.1))
        assert (row["density_by_layer"] is None) == dense
        if not dense:
            assert [len(heads) for heads in row["density_by_layer"]] == [HEADS] * LAYERS
        assert [case["seed"] for case in row["cases"]] == [0, 1]
        assert row["low"] <= row["mean"] <= row["high"]
        if row["task"] == "single":
            answers = [right for case in row["cases"] for right in case["exact"]]
            assert (row["number"], row["mean"]) == (len(answers), pytest.approx(sum(answers) / len(answers)))
        else:
            assert row["number"] == 2
            assert row["mean"] == pytest.approx(sum(case["bits_per_byte"] for case in row["cases"]) / 2, abs=1e-4)
    bits = {row["method"]: row["mean"] for row in data["rows"] if row["task"] == "text"}
    assert len(set(bits.values())) == 4, "what is compared are four ways, not one four times"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "words"], "--tasks: expected single, .* for this model, got words; leave it out"),
        (["--proxies", "3"], "num_proxies: "),
        (["--model", "/nowhere"], "no folder /nowhere here"),
        (["--lengths", "99999999"], "text: expected at least 99999999 bytes, got"),
    ],
)
def test_what_cannot_run_is_said_first(folder: Path, text: Path, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        command.main([*arguments(folder, text, tmp_path / "out.json"), *more])
    assert not (tmp_path / "out.json").exists()


@pytest.mark.skipif(
    not (models.NEEDLE / "model.safetensors").is_file(), reason="made by python -m benchmarks.quality.train"
)
def test_the_model_of_the_repository_answers() -> None:
    """Without ``--model``: the task that it was trained on most, in text that is not of its training."""
    model = load_decoder(default_model(), CPU, "sdpa")
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    haystack = torch.frombuffer(bytearray(sources), dtype=torch.uint8)
    task = TASKS["single"]
    right = run_case(model, DENSE, task, task.make(0, 2048, haystack))["exact"]
    assert sum(right) >= 0.9 * len(right) > 10


def test_a_missing_model_of_the_repository_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "NEEDLE", tmp_path)
    with pytest.raises(
        SystemExit, match=r"--model: expected a folder or name, got none, .* python -m benchmarks\.quality\.train"
    ):
        command.main(["--device", "cpu", "--out", str(tmp_path / "out.json")])


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    for content in ("not JSON", "[]", "{}"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"out: expected a result of this benchmark, got .*notes\.json; choose"):
            ResultFile(path, {}, {})
        assert path.read_text() == content


def test_a_result_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    ResultFile(path, {"torch": "2.9", "date": "2026-01-01"}, {"lengths": (1,)}).finish()
    ResultFile(path, {"torch": "2.9", "date": "2026-01-02"}, {"lengths": [1]})
    with pytest.raises(ValueError, match=r"with torch '2\.9' instead of '2\.10'; choose another"):
        ResultFile(path, {"torch": "2.10", "date": "2026-01-02"}, {"lengths": [1]})


def test_what_fails_is_a_row_and_is_tried_again(model: Any, tmp_path: Path) -> None:
    broken = True

    def select(q: Tensor, k: Tensor) -> Tensor:
        if broken:
            raise RuntimeError("out of memory")
        return everything(q, k)

    def measure() -> list[dict[str, Any]]:
        results = ResultFile(tmp_path / "result.json", {}, {})
        task = Task("text", lambda seed, length, _: Sample(torch.full((length,), seed), ()))
        list(evaluate.run(model, None, [task], [Method("new", "", select, True), DENSE], [256], 1, results))
        rows: list[dict[str, Any]] = json.loads((tmp_path / "result.json").read_text())["rows"]
        return rows

    rows = measure()
    assert [row["error"] for row in rows] == ["RuntimeError: out of memory", None]
    assert len(list(report.tables(rows))) == 2
    assert rows[1]["low"] is None, "one sequence has no interval"
    broken = False
    rows = measure()
    assert [(row["method"], row["error"]) for row in rows] == [("dense", None), ("new", None)]
    assert rows[0]["mean"] == pytest.approx(rows[1]["mean"], abs=1e-3)


# Models


@pytest.mark.slow
def test_a_model_with_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    save_tiny_model(tmp_path, vocab_size=len(tokenizer))
    model = load_decoder(str(tmp_path), CPU, "sdpa")
    assert not reads_bytes(model)
    tasks, haystack = tasks_for(model, str(tmp_path), Text(PROSE.encode(), "prose", 1))
    method = Method("all", "", everything, corrected=True)
    for name in ("variables", "words", "text"):
        samples = [tasks[name].make(seed, 2000, haystack) for seed in range(2)]
        dense, ours = (evaluate.run_cell(model, m, tasks[name], samples) for m in (DENSE, method))
        assert dense["mean"] == pytest.approx(ours["mean"], abs=1e-3)
        assert ours["density"] == 1.0
        assert dense["number"] == (2 if name == "text" else 10)
    case = dense["cases"][0]
    assert case["bits_per_token"] / case["bits_per_byte"] == pytest.approx(samples[0].bytes_per_token, rel=1e-3)


def test_a_model_with_a_tokenizer_needs_a_text(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, vocab_size=500)
    with pytest.raises(SystemExit, match="--text: expected a file or folder, got none; name a long text"):
        command.main(["--model", str(tmp_path), "--device", "cpu"])


def test_what_tells_models_apart(folder: Path, model: Any) -> None:
    assert reads_bytes(model)
    assert attention_shape(model) == (HEADS, 2, 16)
    assert fingerprint(model) == fingerprint(load_decoder(str(folder), CPU, "sdpa"))
    other = load_decoder(str(folder), CPU, "sdpa")
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    assert fingerprint(model) != fingerprint(other)
    assert name_of(str(folder)) == folder.name
    assert name_of("owner/name") == "owner/name"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
