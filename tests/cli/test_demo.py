"""The demo as a function: what it measures, what it leaves as it was, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import flexproxy
from flexproxy.cli import demo, inputs
from flexproxy.cli.demo import DemoResult
from flexproxy.cli.inputs import InputError
from flexproxy.cli.needle import VOCAB_SIZE, plant
from tests.tiny_model import HEADS, LAYERS, save_tiny_model

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from flexproxy.integrations.transformers import configuration

ROOT = Path(__file__).resolve().parents[2]
LENGTH, NEEDLES = 512, 8
CONFIG = flexproxy.ProxyConfig.paper(num_proxies=2, gamma=0.5, min_budget=64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    return inputs.load_model(model_folder, CPU)


def run(model: Any, **overrides: Any) -> DemoResult:
    text = inputs.read_text(inputs.default_text(), LENGTH)
    arguments: dict[str, Any] = {"config": CONFIG, "num_needles": NEEDLES, "seed": 0} | overrides
    return demo.run(model, text, **arguments)


@pytest.fixture(scope="module")
def result(model: Any) -> DemoResult:
    return run(model)


def test_result_describes_the_run(result: DemoResult) -> None:
    assert (result.tokens, result.queries) == (LENGTH, NEEDLES)
    assert (result.device, result.dtype, result.config) == ("CPU", "float32", CONFIG)
    assert [len(heads) for heads in result.density] == [HEADS] * LAYERS
    (block_map,) = result.selection.block_map()
    assert block_map.shape == (HEADS, 4, 4)
    assert min(result.dense.seconds, result.sparse.seconds, result.first_seconds) > 0
    for prefill in (result.dense, result.sparse):
        assert 0 <= prefill.exact_answers <= NEEDLES
        assert 0 < prefill.bits_per_byte < 50


def test_density_is_kept_over_admissible(result: DemoResult) -> None:
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    (block_map,) = result.selection.block_map()
    assert not (block_map & ~causal).any()
    assert block_map.diagonal(dim1=1, dim2=2).all()
    expected = block_map.sum((1, 2)) / causal.sum()
    torch.testing.assert_close(torch.tensor(result.density[result.layer]), expected)
    everything = torch.tensor(result.density)
    assert result.mean_density == pytest.approx(float(everything.mean()))
    assert result.mean_density < 1, "the test's model keeps every block, so it would not notice a dense run"


def test_sparse_differs_from_dense_but_not_with_every_block(result: DemoResult, model: Any) -> None:
    assert result.sparse.bits_per_byte != result.dense.bits_per_byte
    full = run(model, config=flexproxy.ProxyConfig(num_proxies=2, gamma=1.0))
    assert full.mean_density == 1
    assert full.sparse.bits_per_byte == pytest.approx(full.dense.bits_per_byte, rel=1e-5)
    assert full.dense.bits_per_byte == pytest.approx(result.dense.bits_per_byte, rel=1e-6)


def test_bits_per_byte_are_those_of_the_text() -> None:
    text = inputs.read_text(inputs.default_text(), LENGTH)
    batch = plant(text, NEEDLES, torch.Generator().manual_seed(0))
    logits = torch.zeros(1, LENGTH, 2 * VOCAB_SIZE)
    assert demo._measure(batch, logits, 1.0).bits_per_byte == pytest.approx(math.log2(2 * VOCAB_SIZE), rel=1e-5)

    # Sure of every planted token and of none of the text, then the other way round.
    planted = batch.planted[0, 1:].nonzero().flatten()
    logits[0, planted, batch.tokens[0, planted + 1]] = 100.0
    sure_of_planted = demo._measure(batch, logits, 1.0)
    assert sure_of_planted.exact_answers == NEEDLES
    assert sure_of_planted.bits_per_byte == pytest.approx(math.log2(2 * VOCAB_SIZE), rel=1e-5)
    logits.zero_()
    rest = (~batch.planted[0, 1:]).nonzero().flatten()
    logits[0, rest, batch.tokens[0, rest + 1]] = 100.0
    sure_of_text = demo._measure(batch, logits, 1.0)
    assert sure_of_text.exact_answers == 0
    assert sure_of_text.bits_per_byte == pytest.approx(0, abs=1e-6)


def test_progress_counts_every_layer_of_every_prefill(model: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    run(model, progress=lambda *event: seen.append(event))
    totals = {total for _, _, total in seen}
    counts = [done for _, done, _ in seen]
    assert totals == {9 * LAYERS}
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 9 * LAYERS)
    assert {stage for stage, _, _ in seen} >= {"flexproxy, warming up", "dense, timed", "flexproxy, timed"}


def test_the_model_is_left_as_it_was(result: DemoResult, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = configuration(model)
    monkeypatch.setattr(demo, "_measure", interrupted)
    monkeypatch.setattr(flexproxy, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert model.config._attn_implementation == "sdpa"
    assert configuration(model) == before
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_json_holds_everything_but_the_map(result: DemoResult) -> None:
    data = result.to_json()
    assert json.loads(json.dumps(data)) == data
    assert "selection" not in data
    assert data["dense"]["bits_per_byte"] == result.dense.bits_per_byte
    assert data["config"]["min_budget"] == CONFIG.min_budget
    assert torch.equal(torch.tensor(data["density"]), torch.tensor(result.density))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layer": LAYERS}, r"--layer: the model has layers 0 to 1, got 2"),
        ({"layer": -1}, r"--layer: .*got -1"),
        ({"num_needles": 17}, r"num_needles: expected 1 to 16"),
        ({"config": flexproxy.ProxyConfig(num_proxies=3)}, r"num_proxies: .*got 3"),
    ],
)
def test_what_cannot_be_run_is_said_before_it_is_run(model: Any, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(model, **overrides, progress=lambda *_: pytest.fail("a prefill was started"))


def test_text_is_the_first_bytes_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(256)))
    assert inputs.read_text(tmp_path / "text", 200).tolist() == [list(range(200))]
    with pytest.raises(InputError, match=r"has 256 bytes, and --length asks for 257; use a longer text"):
        inputs.read_text(tmp_path / "text", 257)
    with pytest.raises(InputError, match=r"cannot read the text .*nowhere"):
        inputs.read_text(tmp_path / "nowhere", 1)


def test_models_that_cannot_be_loaded(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"no config\.json in .*the folder examples/needle of flexproxy's repository: run .*, or pass --model DIR",
    ):
        inputs.load_model(tmp_path / "nowhere", CPU)

    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match=r"cannot load the model in .*broken: "):
        inputs.load_model(broken, CPU)
    (broken / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot load the model in .*broken: "):
        inputs.load_model(broken, CPU)

    incomplete = save_tiny_model(tmp_path / "incomplete")
    settings = json.loads((incomplete / "config.json").read_text())
    (incomplete / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": LAYERS + 1}))
    with pytest.raises(InputError, match=r"lacks weights: model\.layers\.2\."):
        inputs.load_model(incomplete, CPU)

    with pytest.raises(InputError, match=r"with 100 tokens; the needle task is for a LlamaForCausalLM with 260"):
        inputs.load_model(save_tiny_model(tmp_path / "small", vocab_size=100), CPU)


def test_an_explicit_device_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert inputs.pick_device("auto") == inputs.pick_device("cpu") == CPU
    with pytest.raises(InputError, match="no CUDA device"):
        inputs.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (inputs.pick_device("auto").type, inputs.pick_device("cpu").type) == ("cuda", "cpu")


def test_a_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(InputError, match=r"no C\+\+ compiler: .*no-such-compiler is not to be found"):
        inputs.check_compiler(CPU)
    inputs.check_compiler(torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="the checkpoint is in the repository, not in the sdist")
def test_the_trained_model_answers_dense_and_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with its defaults. The text differs a little from Python to Python, so the bounds have some room."""
    monkeypatch.setattr(demo, "_REPEATS", 1)
    model = inputs.load_model(ROOT / "examples" / "needle", CPU)
    text = inputs.read_text(inputs.default_text(), 8192)
    result = demo.run(model, text, flexproxy.ProxyConfig(num_proxies=2, min_budget=512), num_needles=32, seed=0)
    assert result.dense.exact_answers >= 0.95 * 32
    assert result.sparse.exact_answers >= 0.85 * 32
    assert result.sparse.bits_per_byte == pytest.approx(result.dense.bits_per_byte, rel=0.01)
    assert 0.12 <= result.mean_density <= 0.5
