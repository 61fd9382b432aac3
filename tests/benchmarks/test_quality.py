"""benchmarks/quality: methods at equal density on one kernel, what a model answers, and results that resume."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

from benchmarks import harness
from benchmarks.baselines import to_block_mask
from benchmarks.quality import __main__ as command
from benchmarks.quality import evaluate, report
from benchmarks.quality.attention import dense_with_lse, full_layers, prefill_by
from benchmarks.quality.evaluate import Cell, ResultFile, run_batch
from benchmarks.quality.methods import (
    BASELINES,
    DENSE,
    EXPERIMENTS,
    Method,
    Place,
    delta_correction,
    fits,
    methods_of,
    name_of_config,
    of_config,
    of_layers,
    shared,
)
from benchmarks.quality.models import NEEDLE, attention_shape, fingerprint, name_of, tasks_for
from benchmarks.quality.samples import Sample, Task, bits_per_token, exact_answers, scored_positions
from benchmarks.quality.trials import changing_counts, counts, sampled
from flexproxy import ProxyConfig, reference
from flexproxy.cli.inputs import load_decoder, reads_bytes
from flexproxy.config import default_proxies
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


MEANS = BASELINES["FlashPrefill V2"].correct


def layer_inputs(length: int = 2048) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    return 2 * q, k, v


ONLY = Place(0, 0, 1)


def test_methods_of() -> None:
    configs = [ProxyConfig(num_proxies=p, min_budget=128) for p in (1, 2)]
    found = methods_of(configs, ["oracle", "FlashPrefill V2"], [0.25], [0.9], 128)
    assert list(map(str, found)) == [
        "dense",
        "flexproxy P 1, stride 4, density 0.25",
        "flexproxy P 2, stride 4, density 0.25",
        "oracle, density 0.25",
        "FlashPrefill V2, density 0.25",
        "flexproxy P 1, stride 4, gamma 0.9",
        "flexproxy P 2, stride 4, gamma 0.9",
    ]
    assert [method.correct is not None for method in found].count(True) == 1
    again = methods_of(configs[:1], [], [0.25], [0.9], 128, compensate=True)
    assert [(method.name, method.correct is None) for method in again[1:4]] == [
        ("flexproxy P 1, stride 4", True),
        ("flexproxy P 1, stride 4 + means", False),
        ("flexproxy P 1, stride 4 + delta", False),
    ]
    assert again[1].select is again[2].select
    other = ProxyConfig(num_proxies=2, query_stride=8, query_choice="outlier", stride=1, sink_blocks=0)
    assert name_of_config(other).startswith("flexproxy P 2, outlier 8:1, sink 0, local 2")
    shared = ProxyConfig(num_proxies=9, query_stride=16, sharing="rows")
    assert name_of_config(shared) == "flexproxy P 9, stride 16:4, rows"


@pytest.mark.parametrize(("heads", "kv_heads", "proxies"), [(9, 3, 3), (15, 5, 5), (14, 7, 7), (32, 8, 8), (20, 10, 5)])
def test_any_number_of_heads_has_its_proxies(heads: int, kv_heads: int, proxies: int) -> None:
    """The default fits; of those that were asked for, what does not is left out."""
    assert default_proxies(kv_heads) == proxies
    configs = command.configs_for(["1", "2", "kv"], ["4"], 128, heads, kv_heads)
    assert [config.num_proxies for config in configs] == ([1, 2] if kv_heads % 2 == 0 else [1]) + [proxies]
    assert all(fits(config, heads, kv_heads) is None for config in configs)
    with pytest.raises(ValueError, match="num_proxies: expected a divisor"):
        command.configs_for(["6"], ["4"], 128, heads, kv_heads)


def test_every_method_comes_to_the_density() -> None:
    q, k, _ = layer_inputs()
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    for method in methods_of([ProxyConfig(num_proxies=2, min_budget=128)], [*BASELINES, *EXPERIMENTS], [0.6], [], 128)[
        1:
    ]:
        assert method.select is not None
        place = Place(9, 9, 10)
        block_map = method.select(q, k, place)
        assert not (block_map & ~causal).any(), method
        assert block_map.diagonal(dim1=2, dim2=3).all(), method
        reached = float(block_map.sum() / (4 * causal.sum()))
        # So short a prompt is nearly all of what these keep in any case; of ten layers four are dense.
        always = {
            "FlashPrefill V2": 0.98,
            "FlashPrefill": 0.765,
            "FlashPrefill V2, 2 last rows, no dense layers": 0.765,
        }
        assert reached == pytest.approx(always.get(method.name, 0.6), abs=0.02), method


def test_dense_layers_count_in_a_density() -> None:
    q, k, _ = layer_inputs()
    contender = BASELINES["XAttention"]
    some = type(contender)("some dense", contender.levels, dense_layers=2).at(0.7, 0)
    assert some.select is not None
    maps = [some.select(q, k, Place(n, n, 4)) for n in range(4)]
    density = [float(found.sum()) / (4 * 136) for found in maps]
    assert density[:2] == [1.0, 1.0]
    assert sum(density) / 4 == pytest.approx(0.7, abs=0.01)


def test_defaults_of_the_authors() -> None:
    from benchmarks import baselines

    q, k, _ = layer_inputs()
    expected = {
        "XAttention": baselines.xattention(q, k, 0.9),
        "FlexPrefill": baselines.flexprefill(q, k, 0.95, min_budget=1024),
        "FlashPrefill": baselines.flashprefill(q, k, 0.12),
        "Prism": baselines.prism(q, k, 0.95),
    }
    for name, kept in expected.items():
        method = BASELINES[name].with_defaults()
        assert method.select is not None
        assert method.setting == "defaults"
        assert torch.equal(method.select(q, k, ONLY), kept), name


def test_settings_of_every_layer() -> None:
    q, k, _ = layer_inputs()
    configs = {
        0: ProxyConfig(density=0.3, min_budget=0),
        1: ProxyConfig(density=0.8, min_budget=0, groups=(0, 1, 0, 1)),
    }
    method = of_layers("calibrated", "density 0.5", configs)
    assert method.select is not None
    for layer, config in configs.items():
        expected = of_config(config).select
        assert expected is not None
        assert torch.equal(method.select(q, k, Place(layer, layer, 2)), expected(q, k, ONLY))


def test_layers_that_share() -> None:
    """The first of every two that attend to everything selects."""
    config = ProxyConfig(num_proxies=2, density=0.6, min_budget=0)
    method, own = shared(config, 2), of_config(config)
    assert str(method) == f"{own.name}, shared by 2 layers, density 0.6"
    assert method.select is not None
    assert own.select is not None
    q, k, _ = layer_inputs()
    inputs = [(q, k), (q, k.flip(2)), (q.flip(2), k), (q.flip(2), k.flip(2))]
    for nth, (own_q, own_k) in enumerate(inputs):
        expected = own.select(*inputs[nth - nth % 2], ONLY)
        assert torch.equal(method.select(own_q, own_k, Place(6 * nth, nth, 4)), expected)
    assert not torch.equal(own.select(*inputs[0], ONLY), own.select(*inputs[1], ONLY))


def test_the_first_trial_is_flexproxy() -> None:
    """So what the others differ in is what their names say."""
    q, k, _ = layer_inputs()
    own = of_config(ProxyConfig(num_proxies=2, density=0.4, min_budget=128, dense_last_blocks=0)).select
    trial = EXPERIMENTS["trial: kv 4:4 max, no dense row"].at(0.4, 128).select
    assert own is not None
    assert trial is not None
    assert torch.equal(own(q, k, ONLY), trial(q, k, ONLY))


@pytest.mark.parametrize("reduction", ["max", "sums", "mass"])
def test_sampled_scores(reduction: str) -> None:
    q, k, _ = (x.double() for x in layer_inputs(450))
    found = sampled(q, k, (8, 4), reduction)
    queries, keys = torch.arange(0, 450, 8), torch.arange(0, 450, 4)
    logits = q[:, :, queries] @ k.repeat_interleave(2, 1)[:, :, keys].mT / 4
    probability = logits.masked_fill(keys > queries[:, None], -torch.inf).softmax(-1)
    for i in range(4):
        for j in range(i + 1):
            pairs = probability[:, :, queries // 128 == i][..., keys // 128 == j]
            expected = {"max": pairs.amax((2, 3)), "sums": pairs.sum(3).amax(2), "mass": pairs.sum((2, 3))}[reduction]
            torch.testing.assert_close(found[:, :, i, j].exp(), expected)


def test_counts_that_change_by_no_power_are_the_papers() -> None:
    q, k, _ = layer_inputs()
    scores = sampled(q, k, (8, 8), "max")
    always = torch.eye(16, dtype=torch.bool)
    assert torch.equal(changing_counts(q, k, scores, always, 2, 0.0), counts(q, k, scores, always, 2))


def test_delta_correction() -> None:
    """Every 64th query is as in dense attention, and its change is that of those behind it."""
    q, k, v = (x.double() for x in layer_inputs(450))
    every = torch.ones(1, 4, 4, 4, dtype=torch.bool).tril()
    kept = torch.eye(4, dtype=torch.bool).expand(1, 4, 4, 4)
    dense, _ = dense_with_lse(q, k, v, every)
    out, lse = dense_with_lse(q, k, v, kept)
    found = delta_correction(q, k, v, out, lse, kept)
    torch.testing.assert_close(found[:, :, ::64], dense[:, :, ::64])
    torch.testing.assert_close((found - out)[:, :, 65:128], (dense - out)[:, :, 64:65].expand(-1, -1, 63, -1))
    torch.testing.assert_close(delta_correction(q, k, v, dense, lse, every), dense)


# The attention of a model


def everything(q: Tensor, _k: Tensor, _place: Place) -> Tensor:
    blocks = -(-q.shape[2] // 128)
    return torch.ones(blocks, blocks, dtype=torch.bool).tril().expand(*q.shape[:2], -1, -1)


def diagonal(q: Tensor, _k: Tensor, _place: Place) -> Tensor:
    blocks = -(-q.shape[2] // 128)
    return torch.eye(blocks, dtype=torch.bool).expand(*q.shape[:2], -1, -1)


def logits_of(model: Any, method: Method, tokens: Tensor) -> tuple[Tensor, dict[int, list[list[float]]]]:
    with torch.no_grad(), prefill_by(model, method) as density:
        return model(input_ids=tokens, use_cache=False).logits, density


def test_all_blocks_are_dense_attention(model: Any) -> None:
    skip_unless_flex_compiles("cpu")
    tokens = torch.randint(256, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    dense, none = logits_of(model, DENSE, tokens)
    assert none == {}
    for correct in (None, MEANS):  # nothing is dropped, so there is nothing to correct
        logits, density = logits_of(model, Method("all", "", everything, correct), tokens)
        torch.testing.assert_close(logits, dense, rtol=1e-3, atol=1e-3)
        assert density == {layer: [[1.0] * HEADS] for layer in range(LAYERS)}
    sparse, density = logits_of(model, Method("diagonal", "", diagonal), tokens)
    assert density == {layer: [[pytest.approx(5 / 15)] * HEADS] for layer in range(LAYERS)}
    torch.testing.assert_close(sparse[:, :128], dense[:, :128], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(sparse[:, 128:], dense[:, 128:], atol=1e-2)
    corrected_, _ = logits_of(model, Method("diagonal", "", diagonal, MEANS), tokens)
    error, own = ((x - dense)[:, 128:].abs().mean() for x in (corrected_, sparse))
    assert error < own, "the means of what was dropped are better than nothing"
    assert model.config._attn_implementation == "sdpa"


def test_attention_is_put_back_after_an_error(model: Any) -> None:
    def broken(_q: Tensor, _k: Tensor, _place: Place) -> Tensor:
        raise RuntimeError("no blocks")

    with pytest.raises(RuntimeError, match="no blocks"):
        logits_of(model, Method("broken", "", broken), torch.zeros(1, LENGTH, dtype=torch.long))
    assert model.config._attn_implementation == "sdpa"


def test_what_is_not_plain_causal_attention_is_refused(model: Any) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    tokens = torch.zeros(1, 256, dtype=torch.long)
    mask = torch.ones(1, 256, dtype=torch.long)
    mask[:, :10] = 0
    with pytest.raises(ValueError, match="expected sequences without padding"), prefill_by(model, DENSE_BLOCKS):
        model(input_ids=tokens, attention_mask=mask)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    sliding = MistralForCausalLM(MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=64, **shape))
    with pytest.raises(ValueError, match="model: expected layers that attend to everything, got sliding_attention"):
        logits_of(sliding.eval(), DENSE_BLOCKS, tokens)


@pytest.mark.slow
def test_layers_with_a_window_stay_dense() -> None:
    """A hybrid: blocks are chosen where a layer attends to everything, and nowhere else."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    skip_unless_flex_compiles("cpu")
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "num_key_value_heads": 1}
    config = Gemma3TextConfig(
        vocab_size=64, num_hidden_layers=4, num_attention_heads=4, sliding_window=96, layer_types=kinds, **shape
    )
    hybrid: Any = Gemma3ForCausalLM(config).eval()
    hybrid.set_attn_implementation("sdpa")
    assert full_layers(hybrid) == [1, 3]
    tokens = torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    places: list[Place] = []

    def noted(q: Tensor, k: Tensor, place: Place) -> Tensor:
        places.append(place)
        return everything(q, k, place)

    dense, _ = logits_of(hybrid, DENSE, tokens)
    logits, density = logits_of(hybrid, Method("all", "", noted), tokens)
    torch.testing.assert_close(logits, dense, rtol=1e-3, atol=1e-3)
    assert places == [(1, 0, 2), (3, 1, 2)]
    assert density == {layer: [[1.0] * 4] * 2 for layer in (1, 3)}
    sparse, _ = logits_of(hybrid, Method("diagonal", "", diagonal), tokens)
    assert not torch.allclose(sparse, dense, atol=1e-2)


DENSE_BLOCKS = Method("all", "", everything)


@pytest.mark.parametrize("length", [384, 450])
def test_dense_with_lse(length: int) -> None:
    q, k, v = (x.double() for x in layer_inputs(length))
    block_map = torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))[..., : -(-length // 128), :] > 0.5
    block_map = (block_map[..., : -(-length // 128)] | torch.eye(-(-length // 128), dtype=torch.bool)).tril()
    out, lse = dense_with_lse(q, k, v, block_map)
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
    sizes = ["--lengths", "1280", "--texts", "2", "--answers", "20", "--densities", "0.7", "--min-budget", "128"]
    return [*fixed, *sizes, "--proxies", "2", "--baseline", "XAttention", "--baseline", "oracle", *more]


def run_command(argv: list[str]) -> None:
    harness.command(command.main, argv)


CELLS = [("single", m) for m in ("dense", "flexproxy P 2, stride 4", "XAttention", "oracle")]
CELLS += [("text", method) for _, method in CELLS]


def test_strides_of_queries_and_of_keys() -> None:
    assert command.strides("8:2,4") == ["8:2", "4"]
    assert command.config_of(2, "8:2", 128) == ProxyConfig(num_proxies=2, query_stride=8, stride=2, min_budget=128)
    assert command.config_of(1, "4", 0).strides == (4, 4)
    assert command.config_of(2, "outlier8:1", 64) == ProxyConfig(
        num_proxies=2, min_budget=64, stride=1, query_stride=8, query_choice="outlier"
    )
    for text in ("8:", ":2", "0", "8:2:1", "x", "outlier4", "outlier:1", "8:outlier1"):
        with pytest.raises(ValueError):
            command.strides(text)


def without_times(data: dict[str, Any]) -> dict[str, Any]:
    return data | {"environment": None, "rows": [row | {"seconds": None} for row in data["rows"]]}


class StoppedError(BaseException):
    pass


@pytest.mark.slow
def test_a_run_resumes_and_refuses(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    skip_unless_flex_compiles("cpu")
    whole, out = tmp_path / "whole.json", tmp_path / "stopped.json"
    run_command(arguments(folder, text, whole))
    assert "single, 1280 tokens, 20 answers" in capsys.readouterr().out
    data = json.loads(whole.read_text())
    check_result(data)
    assert whole.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in whole.read_text(), "paths of this machine"
    assert str(folder.parent) not in whole.read_text()

    run_cell, done, last = evaluate.run_cell, list[str](), 3

    def stopping(*args: Any) -> Any:
        if len(done) == last:
            raise StoppedError
        done.append(args[1].name)
        return run_cell(*args)

    monkeypatch.setattr(evaluate, "run_cell", stopping)
    with pytest.raises(StoppedError):
        run_command(arguments(folder, text, out))
    stopped = json.loads(out.read_text())
    assert not stopped["complete"]
    assert [row["method"] for row in stopped["rows"]] == done == [method for _, method in CELLS[:3]]
    with pytest.raises(
        SystemExit, match=r"out: .* same settings, .* min_budget 128 instead of 256; choose another --out"
    ):
        run_command([*arguments(folder, text, out), "--min-budget", "256"])
    assert json.loads(out.read_text()) == stopped

    done.clear()
    last = len(CELLS)
    run_command(arguments(folder, text, out))
    assert done == [method for _, method in CELLS[3:]], "finished cells are not measured again"
    assert without_times(json.loads(out.read_text())) == without_times(data)


def check_result(data: dict[str, Any]) -> None:
    assert data["complete"]
    assert data["environment"]["device"] == "CPU"
    assert {"model", "text", "texts", "answers", "densities", "baselines"} <= set(data["settings"])
    assert [(row["task"], row["method"]) for row in data["rows"]] == CELLS
    for row in data["rows"]:
        assert row["error"] is None
        dense = row["method"] == "dense"
        assert row["density"] == (1.0 if dense else pytest.approx(0.7, abs=0.1))
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


def test_cells_are_measured_until_the_time_is_over(model: Any, tmp_path: Path) -> None:
    task = Task("text", lambda seed, length: Sample(torch.full((length,), seed), ()), "bits_per_byte")
    cells = [Cell(256, task, DENSE, number) for number in (1, 2)]
    results = ResultFile(tmp_path / "result.json", {}, {})
    assert len(list(evaluate.run(model, cells, results, until=time.monotonic() - 1))) == 1
    assert (results.rows, results.data["complete"]) == ([], False)
    lengths: list[int] = []

    @contextmanager
    def reading(length: int) -> Iterator[None]:
        lengths.append(length)
        yield

    list(evaluate.run(model, cells, results, reading))
    assert (len(results.rows), results.data["complete"], lengths) == (1, True, [256])


def test_a_batch_is_its_sequences(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_flex_compiles("cpu")
    tasks, _ = tasks_for(model, "", Path(__file__).parents[1])
    method = methods_of([], ["XAttention"], [0.6], [], 128)[1]
    for name in ("single", "text"):
        samples = [tasks[name].make(seed, LENGTH) for seed in range(3)]
        together = run_batch(model, method, tasks[name], samples)
        for sample, row in zip(samples, together, strict=True):
            alone = run_batch(model, method, tasks[name], [sample])[0]
            assert row["density"] == alone["density"]
            if name == "single":
                assert row["exact"] == alone["exact"]
            else:
                assert row["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], abs=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "words"], "--tasks: expected some of single, .* for this model, got words; leave it out"),
        (["--proxies", "3"], "num_proxies: "),
        (["--model", "/nowhere"], "no folder /nowhere here"),
        (["--lengths", "4096"], "--lengths: expected at most 2048 for this model, got 4096"),
        (["--baseline", "nobody"], "--baseline: expected some of XAttention; .*, got nobody"),
    ],
)
def test_what_cannot_run_is_said_first(folder: Path, text: Path, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run_command([*arguments(folder, text, tmp_path / "out.json"), *more])
    assert not (tmp_path / "out.json").exists()


@pytest.mark.skipif(not (NEEDLE / "model.safetensors").is_file(), reason="made by python -m benchmarks.quality.train")
def test_the_model_of_the_repository_answers() -> None:
    """The task that it was trained on most, in text that is not of its training."""
    model = load_decoder(str(NEEDLE), CPU, "sdpa")
    tasks, _ = tasks_for(model, str(NEEDLE), Path(__file__).parents[1])
    right = run_batch(model, DENSE, tasks["single"], [tasks["single"].make(0, 2048)])[0]["exact"]
    assert sum(right) >= 0.9 * len(right) > 10


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

    def select(q: Tensor, k: Tensor, place: Place) -> Tensor:
        if broken:
            raise RuntimeError("out of memory")
        return everything(q, k, place)

    def measure() -> list[dict[str, Any]]:
        results = ResultFile(tmp_path / "result.json", {}, {})
        task = Task("text", lambda seed, length: Sample(torch.full((length,), seed), ()), "bits_per_byte")
        methods = Method("new", "", select, MEANS), DENSE
        list(evaluate.run(model, [Cell(256, task, method, 1) for method in methods], results))
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
def test_a_model_with_a_tokenizer(tmp_path: Path, text: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    save_tiny_model(tmp_path, vocab_size=len(tokenizer))
    model = load_decoder(str(tmp_path), CPU, "sdpa")
    assert not reads_bytes(model)
    text.write_text(PROSE * 60)
    tasks, _ = tasks_for(model, str(tmp_path), text)
    method = Method("all", "", everything, MEANS)
    for name in ("variables", "words", "text"):
        samples = [tasks[name].make(seed, 2000) for seed in range(2)]
        dense, own = (evaluate.run_cell(model, m, tasks[name], samples) for m in (DENSE, method))
        assert dense["mean"] == pytest.approx(own["mean"], abs=1e-3)
        assert own["density"] == 1.0
        assert dense["number"] == (2 if name == "text" else 10)
    case = dense["cases"][0]
    assert case["bits_per_token"] / case["bits_per_byte"] == pytest.approx(samples[0].bytes_per_token, rel=1e-3)


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
