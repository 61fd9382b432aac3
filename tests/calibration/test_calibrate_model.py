"""Calibration of whole models of transformers: what it leaves behind, its file, and whom the file is for."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import threading
import typing
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import flexproxy
from benchmarks import bench_calibrate
from flexproxy import ProxyConfig, stats
from flexproxy.calibration import Calibration, CalibrationError, calibrate, choose
from flexproxy.calibration.collect import Layer, read
from flexproxy.cli import inputs
from flexproxy.cli.needle import plant
from flexproxy.integrations.transformers import configuration, configure, save_configuration
from tests.transformers_models import interpreted, make_model, make_tokens, make_vision_language_model, use

BLOCK, LENGTH = 16, 256
CONFIG = ProxyConfig.paper(block_size=BLOCK, min_budget=BLOCK, stride=2)
TEXTS = [make_tokens(1, LENGTH, seed) for seed in (1, 2)]


@pytest.fixture(autouse=True)
def few_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "NUM_LEVELS", 10)


def calibrated(model: Any, **options: Any) -> Calibration:
    default: dict[str, Any] = {"config": CONFIG, "rows": 64} | ({} if "quality" in options else {"density": 0.4})
    return calibrate(model, TEXTS, **(default | options))


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module")
def result(model: Any) -> Calibration:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "NUM_LEVELS", 10)
        return calibrated(model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "gpt_oss", "qwen3_moe"])
def test_layers_are_looked_at_with_the_attention_that_they_have(family: str) -> None:
    """q, k and the mask are those of the sparse layers that transformers runs; each layer once, in order."""
    if not hasattr(transformers, {"gpt_oss": "GptOssForCausalLM"}.get(family, "LlamaForCausalLM")):
        pytest.skip("this transformers has no such model")
    model = make_model(family)
    seen: dict[int, Layer] = {}
    with interpreted("cpu"):
        read(model, TEXTS[0], BLOCK, lambda index, layer: seen.update({index: layer}))
        assert list(seen) == list(configuration(model))
        use(model, "flexproxy")
        every = ProxyConfig(gamma=1.0, max_budget=2**20, min_budget=BLOCK, block_size=BLOCK)
        configure(model, every)
        with flexproxy.record(model, selections=True) as record, torch.no_grad():
            model(input_ids=TEXTS[0], use_cache=False)
    for index, selection in record.selections.items():
        q, k, block_mask, scale = seen[index]
        ours = flexproxy.select(q, k, block_mask=block_mask, config=every, scale=scale)
        assert torch.equal(ours.block_map(), selection.block_map())
        assert torch.equal(ours.rank, selection.rank)
    assert record.selections


def test_a_model_is_left_as_it_was(result: Calibration) -> None:
    """And neither its attention nor its settings matter; a second calibration finds the same."""
    model, other = make_model("llama"), make_model("llama")
    use(model, "eager")
    configure(model, {1: ProxyConfig(gamma=0.7)})
    before = configuration(model)
    attention = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    registered = attention["flexproxy"]
    again = calibrated(model)
    assert (again.layers, again.model, again.versions) == (result.layers, result.model, result.versions)
    assert dict(again.evidence, seconds=0) == dict(result.evidence, seconds=0)
    assert model.config._attn_implementation == "eager"
    assert configuration(model) == before
    assert attention["flexproxy"] is registered
    with pytest.raises(KeyboardInterrupt):
        flexproxy.calibrate(model, TEXTS, density=0.4, config=CONFIG, progress=_interrupt)
    assert model.config._attn_implementation == "eager"
    assert configuration(model) == before
    assert attention["flexproxy"] is registered
    use(other, "flexproxy")
    other(input_ids=TEXTS[0])


def test_another_model_in_another_thread_is_not_touched() -> None:
    """It attends as it did, while a calibration is in the middle of a layer."""
    model, other = make_model("llama"), make_model("llama")
    use(other, "flexproxy")
    configure(other, ProxyConfig(block_size=BLOCK, min_budget=BLOCK, gamma=0.5))
    with interpreted("cpu"), torch.no_grad():
        want = other(input_ids=TEXTS[0]).logits
    seen: list[int] = []
    found: list[Any] = []

    def run() -> None:
        with torch.no_grad():
            found.append(other(input_ids=TEXTS[0]).logits)

    def look(index: int, layer: Layer) -> None:
        seen.append(index)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    with interpreted("cpu"):
        read(model, TEXTS[1], BLOCK, look)
    assert seen == [0, 1]
    assert len(found) == 2
    assert all(torch.equal(logits, want) for logits in found)


def _interrupt(stage: str, done: int, total: int) -> None:
    if done == 1:
        raise KeyboardInterrupt


def test_a_vision_language_model_keeps_its_attentions() -> None:
    model = make_vision_language_model()
    use(model, "sdpa")
    configs = [module.config for module in model.modules() if isinstance(module, transformers.PreTrainedModel)]
    vision = next(config for config in configs if "siglip" in config.model_type)
    vision._attn_implementation = "eager"
    before = [config._attn_implementation for config in configs]
    with interpreted("cpu"):
        read(model, TEXTS[0].clamp(min=7), BLOCK, lambda index, layer: None)
    assert [config._attn_implementation for config in configs] == before
    assert {"eager", "sdpa"} <= set(before)


def test_the_density_is_reached_on_texts_kept_aside(result: Calibration) -> None:
    assert list(result.layers) == [0, 1]
    mean = result.evidence["mean"]
    for kind in ("decided_on", "confirmed_on", "uniform"):
        assert mean[kind]["density"] == pytest.approx(0.4, abs=0.03)
    assert mean["decided_on"]["recovered"] >= mean["uniform"]["recovered"] - 0.02
    for layer in result.evidence["layers"].values():
        assert {len(grouping["groups"]) for grouping in layer["groupings"]} == {1, 2, 3, 4}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_reaches_the_same(model: Any, result: Calibration) -> None:
    found = calibrated(copy.deepcopy(model).cuda())
    assert found.model == result.model
    for kind in ("decided_on", "confirmed_on"):
        for name in ("density", "recovered"):
            assert found.evidence["mean"][kind][name] == pytest.approx(result.evidence["mean"][kind][name], abs=0.03)
    half = copy.deepcopy(model).to("cuda", torch.bfloat16)
    assert calibrated(half, quality=0.8).evidence["mean"]["confirmed_on"]["recovered_worst_layer"] >= 0.8


def test_the_quality_is_reached_on_texts_kept_aside(model: Any) -> None:
    """And with a lower gamma it is not: by statistics of the prefill itself, not by what calibration says."""
    found = calibrated(model, quality=0.9)
    levels = choose.Target.of(None, 0.9).levels()
    reached: dict[int, tuple[float, float]] = {}

    def look(index: int, layer: Layer) -> None:
        config = found.layers[index]
        assert config.density is None
        lower = max([level for level in levels if level < config.gamma], default=config.gamma)
        reached[index] = recovered(layer, config), recovered(layer, ProxyConfig(**changed(config, gamma=lower)))

    def recovered(layer: Layer, config: ProxyConfig) -> float:
        selection = flexproxy.select(layer.q, layer.k, block_mask=layer.block_mask, config=config, scale=layer.scale)
        return float(stats.recovered_mass(layer.q, layer.k, selection, rows=torch.arange(LENGTH)).mean())

    read(model, TEXTS[1], BLOCK, look)
    for index, (at, below) in reached.items():
        assert at >= 0.9 - 0.02  # 64 of the rows were looked at
        kept = found.evidence["layers"][str(index)]
        assert fmean(kept["confirmed_on"]["recovered"]) >= 0.9
        assert fmean(kept["decided_on"]["recovered"]) >= 0.9
        assert below < at


def changed(config: ProxyConfig, **fields: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__} | fields


def test_the_needle_model_recovers_more_than_with_the_same_settings_everywhere() -> None:
    """On texts kept aside, at no more density: the mean over its layers, and the worst of them."""
    model = inputs.load_model(Path("examples/needle"), torch.device("cpu"))
    sources = [inputs.read_text(Path(str(module.__file__)), 1024).long() for module in (typing, subprocess)]
    texts = [plant(text, 16, torch.Generator().manual_seed(seed)).tokens for seed, text in enumerate(sources)]
    config = ProxyConfig.paper(block_size=64, min_budget=64)
    found = flexproxy.calibrate(model, texts, density=0.3, config=config, max_proxies=2, rows=256)
    ours, uniform = found.evidence["mean"]["confirmed_on"], found.evidence["mean"]["uniform"]
    assert ours["density"] <= uniform["density"] + 0.005
    assert ours["recovered"] > uniform["recovered"]
    assert ours["recovered_worst_layer"] > uniform["recovered_worst_layer"]


# --------------------------------------------------------------------------------------------------------- the file


def test_the_file_configures_the_model(model: Any, result: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    result.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["calibration.json"]
    assert ProxyConfig.load_layers(path) == result.layers
    assert json.loads(path.read_text()) == json.loads(json.dumps(result.to_json()))
    assert Calibration.load(path) == result
    assert max(map(len, path.read_text().splitlines())) < 2000
    other = copy.deepcopy(model)
    configure(other, path)
    assert configuration(other) == result.layers
    configure(other.model, path)  # without the head
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        configure(copy.deepcopy(model).to(dtype), path)
    reloaded = tmp_path / "model"
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(reloaded)
    configure(transformers.AutoModelForCausalLM.from_pretrained(reloaded), path)


def test_a_file_of_another_model_is_refused(model: Any, result: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    result.save(path)
    for other in (make_model("qwen3"), make_model("llama", num_key_value_heads=4), make_model("llama", head_dim=16)):
        with pytest.raises(ValueError, match=r"settings: expected a file for .*; calibrate this model"):
            configure(other, path)
    save_configuration(model, tmp_path / "by_hand.json")
    with pytest.raises(
        ValueError, match=r"path: expected a file of flexproxy calibrate, got .*, which has settings al"
    ):
        Calibration.load(tmp_path / "by_hand.json")


def test_weights_that_are_not_here() -> None:
    with torch.device("meta"):
        empty = make_model("llama")
    with pytest.raises(CalibrationError, match="model: expected one with all of its weights in this process, got sha"):
        calibrated(empty)


def test_a_file_is_not_replaced_unless_told_to(result: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text("precious")
    with pytest.raises(ValueError, match=r"path: expected a file to write, got .*: exists already"):
        result.save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", _no_space)
        with pytest.raises(OSError, match="No space left"):
            result.save(path, force=True)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("calibration.json", "precious")]
    result.save(path, force=True)
    assert ProxyConfig.load_layers(path) == result.layers


def _no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_the_picture_shows_what_was_found(result: Calibration) -> None:
    pytest.importorskip("matplotlib")
    axes: Any = flexproxy.plot.calibration(result).axes
    assert [round(bar.get_height()) for bar in axes[0].patches] == list(result.num_proxies.values())
    for axis, name in zip(axes[1:], ("density", "recovered"), strict=True):
        for line, kind in zip((axis.containers[0][0], axis.containers[1][0]), ("uniform", "confirmed_on"), strict=True):
            want = [fmean(layer[kind][name]) for layer in result.evidence["layers"].values()]
            assert line.get_ydata().tolist() == pytest.approx(want)


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": None}, "density, quality: expected one of the two"),
        ({"density": 0.01}, r"density: expected at least 0\.\d+, which min_budget .*, got 0\.01; lower min_budget"),
        ({"length": 200}, r"length: expected more than the 2048 tokens of min_budget, .* got sequences of 200; use"),
        ({"length": 1000, "config": CONFIG}, r"texts: expected two sequences of 1000 tokens at least"),
        ({"sequences": 1}, "sequences: expected an integer of at least 2, got 1; leave it out"),
        ({"max_proxies": 0}, "max_proxies: expected an integer of at least 1, got 0"),
        ({"rows": True}, "rows: expected an integer of at least 1, got True"),
    ],
)
def test_mistakes_are_named(model: Any, options: dict[str, Any], message: str) -> None:
    default: dict[str, Any] = {"density": 0.4} | ({} if "length" in options else {"config": CONFIG})
    with pytest.raises(CalibrationError, match=message):
        flexproxy.calibrate(model, TEXTS, **(default | options))


def test_a_model_without_the_interface() -> None:
    linear: Any = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="model: expected a model of transformers, got Linear"):
        flexproxy.calibrate(linear, TEXTS, density=0.4)


def test_a_model_in_training() -> None:
    with pytest.raises(
        CalibrationError, match="model: expected one in eval mode, got one that is in training; call mod"
    ):
        calibrated(make_model("llama").train())


def test_the_benchmark_measures_a_calibration(model: Any, result: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run(model: Any, texts: Any, **options: Any) -> Calibration:
        asked.append(([len(text) for text in texts], options))
        return result

    monkeypatch.setattr(flexproxy, "calibrate", run)
    row = bench_calibrate.measure(model, bench_calibrate.Case(LENGTH, 2, {"quality": 0.8}))
    assert asked == [([LENGTH] * 2, {"sequences": 2, "quality": 0.8})]
    mean = result.evidence["mean"]
    assert (row["decided"], row["confirmed"]) == tuple(mean[kind]["density"] for kind in ("decided_on", "confirmed_on"))
