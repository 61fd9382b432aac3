"""Calibration of whole models of transformers: what it leaves behind, its file, and whom the file is for."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import subprocess
import threading
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import flexproxy
from flexproxy import ProxyConfig
from flexproxy import calibration as calibrating
from flexproxy.calibration import Calibration, CalibrationError, calibrate
from flexproxy.calibration.reader import Reader, reading
from flexproxy.cli import inputs
from flexproxy.cli.needle import plant
from flexproxy.integrations.transformers import configuration, configure, save_configuration
from flexproxy.integrations.transformers.settings import sharing_of, when_of
from tests.transformers_models import (
    configure_sparse,
    interpreted,
    logits,
    make_model,
    make_tokens,
    make_vision_language_model,
    use,
)

BLOCK, LENGTH = 16, 256
CONFIG = ProxyConfig.paper(block_size=BLOCK, min_budget=BLOCK, stride=2)
TEXTS = [make_tokens(1, LENGTH, seed) for seed in (1, 2)]


def calibrated(model: Any, **options: Any) -> Calibration:
    default: dict[str, Any] = {"config": CONFIG, "positions": 64} | ({} if "quality" in options else {"density": 0.4})
    return calibrate(model, TEXTS, **(default | options))


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module")
def result(model: Any) -> Calibration:
    return calibrated(model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "gpt_oss", "qwen3_moe"])
def test_what_is_lost_is_what_the_model_loses(family: str) -> None:
    """One layer sparse as ``configure`` makes it, the others dense: divergence and density, measured otherwise."""
    if not hasattr(transformers, {"gpt_oss": "GptOssForCausalLM"}.get(family, "LlamaForCausalLM")):
        pytest.skip("this transformers has no such model")
    model = make_model(family)
    config = dataclasses.replace(CONFIG, density=0.5)
    with interpreted("cpu"), reading(model):
        reader = Reader(model, TEXTS[0], LENGTH)
        found = reader.lost({1: config})
    assert reader.layers == list(configuration(model))
    use(model, "eager")
    dense = logits(model, TEXTS[0])[0, :-1].double().log_softmax(-1)
    use(model, "flexproxy")
    configure(model, ProxyConfig(gamma=1.0))
    configure_sparse(model, {1: config})
    with interpreted("cpu"), flexproxy.record(model, selections=True) as record:
        sparse = logits(model, TEXTS[0])[0, :-1].double().log_softmax(-1)
    assert found.density == {1: pytest.approx(float(record.selections[1].density().mean()))}
    want = torch.nn.functional.kl_div(sparse, dense, log_target=True, reduction="batchmean") / math.log(2)
    assert found.divergence == pytest.approx(float(want), rel=1e-3)
    assert found.agreement == pytest.approx(float((sparse.argmax(-1) == dense.argmax(-1)).double().mean()), abs=0.01)


def test_a_model_is_left_as_it_was(result: Calibration) -> None:
    """And neither its attention nor its settings matter; a second calibration finds the same."""
    model, other = make_model("llama"), make_model("llama")
    use(model, "eager")
    configure(model, {0: ProxyConfig(gamma=0.7), 1: ProxyConfig()}, when="always", share={1: 0})
    before = configuration(model)
    attention = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    registered = attention["flexproxy"]

    def check() -> None:
        assert model.config._attn_implementation == "eager"
        assert configuration(model) == before
        module = model.model.layers[1].self_attn
        assert (when_of(module), sharing_of(module)) == ("always", (0, True))
        assert attention["flexproxy"] is registered

    again = calibrated(model)
    assert (again.layers, again.model, again.versions) == (result.layers, result.model, result.versions)
    assert dict(again.evidence, seconds=0) == dict(result.evidence, seconds=0)
    check()
    with pytest.raises(KeyboardInterrupt):
        flexproxy.calibrate(model, TEXTS, density=0.4, config=CONFIG, progress=_interrupt)
    check()
    use(other, "flexproxy")
    other(input_ids=TEXTS[0])


def test_another_model_in_another_thread_is_not_touched() -> None:
    """It attends as it did, while a calibration is in the middle of its passes."""
    model, other = make_model("llama"), make_model("llama")
    use(other, "flexproxy")
    configure(other, ProxyConfig(block_size=BLOCK, min_budget=BLOCK, gamma=0.5))
    want = logits(other, TEXTS[0])
    found: list[Any] = []

    def look(*_: Any) -> None:
        thread = threading.Thread(target=lambda: found.append(logits(other, TEXTS[0])))
        thread.start()
        thread.join()

    calibrated(model, progress=look)
    assert len(found) == 4
    assert all(torch.equal(one, want) for one in found)


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
    with interpreted("cpu"), reading(model):
        Reader(model, TEXTS[0].clamp(min=7), 64)
    assert [config._attn_implementation for config in configs] == before
    assert {"eager", "sdpa"} <= set(before)


def test_the_density_is_reached_on_texts_kept_aside(result: Calibration) -> None:
    assert list(result.layers) == [0, 1]
    mean = result.evidence["mean"]
    for kind in ("decided_on", "confirmed_on", "uniform"):
        assert mean[kind]["density"] == pytest.approx(0.4, abs=0.03)
    shares = [config.density or 1.0 for config in result.layers.values()]
    assert sum(shares) / 2 == pytest.approx(0.4, abs=0.01)
    assert result.evidence["chosen"] == "shared"
    assert mean["confirmed_on"]["divergence"] < mean["uniform"]["divergence"]
    lost = {layer: one["divergence"][0] for layer, one in result.evidence["layers"].items()}
    assert (lost["0"] > lost["1"]) == (shares[0] > shares[1])


def test_shares_that_do_not_help_on_texts_kept_aside_are_not_chosen(
    model: Any, result: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = [result.layers[layer].density for layer in (1, 0)]  # the wrong way round
    monkeypatch.setattr(calibrating, "share_density", lambda *_: shares)
    found = calibrated(model)
    assert found.evidence["chosen"] == "uniform"
    assert found.layers == dict.fromkeys((0, 1), dataclasses.replace(CONFIG, density=0.4))


def test_one_density_that_does_not_reach_the_quality_is_not_chosen(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Reader.lost

    def worse_if_shared(self: Reader, settings: dict[int, ProxyConfig]) -> Any:
        found = lost(self, settings)
        if len(settings) == 1:
            return found
        uniform = len(set(settings.values())) == 1
        return found._replace(divergence=0.1 if uniform else 0.2, agreement=0.7 if uniform else 0.9)

    monkeypatch.setattr(Reader, "lost", worse_if_shared)
    assert calibrated(model, quality=0.8).evidence["chosen"] == "shared"
    assert calibrated(model, quality=0.6).evidence["chosen"] == "uniform"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_reaches_the_same(model: Any, result: Calibration) -> None:
    found = calibrated(copy.deepcopy(model).cuda())
    assert found.model == result.model
    for kind in ("decided_on", "confirmed_on", "uniform"):
        for name in ("density", "divergence"):
            assert found.evidence["mean"][kind][name] == pytest.approx(result.evidence["mean"][kind][name], abs=0.03)
    half = copy.deepcopy(model).to("cuda", torch.bfloat16)
    assert calibrated(half, quality=0.8).evidence["mean"]["confirmed_on"]["agreement"] >= 0.8


def test_the_quality_is_reached_by_no_more_density_than_needed(model: Any) -> None:
    found = calibrated(model, quality=0.8)
    mean = found.evidence["mean"]
    assert min(mean[kind]["agreement"] for kind in ("decided_on", "confirmed_on")) >= 0.8
    lower = calibrated(model, density=0.8 * mean["confirmed_on"]["density"]).evidence["mean"]
    assert min(lower[kind]["agreement"] for kind in ("decided_on", "confirmed_on")) < 0.8


def test_a_quality_that_the_sparsest_reach(model: Any) -> None:
    found = calibrated(model, quality=0.01)
    sparsest = [layer["density"][0] for layer in found.evidence["layers"].values()]
    densities = [config.density or 1.0 for config in found.layers.values()]
    assert sum(densities) == pytest.approx(sum(sparsest), abs=1e-3)


def test_the_needle_model_is_closer_to_dense_than_with_one_density() -> None:
    """On texts kept aside, at no more density."""
    model = inputs.load_model(Path("examples/needle"), torch.device("cpu"))
    sources = [inputs.read_text(Path(str(module.__file__)), 1024).long() for module in (typing, subprocess)]
    texts = [plant(text, 16, torch.Generator().manual_seed(seed)).tokens for seed, text in enumerate(sources)]
    config = ProxyConfig.paper(block_size=64, min_budget=64)
    found = flexproxy.calibrate(model, texts, density=0.3, config=config)
    ours, uniform = found.evidence["mean"]["confirmed_on"], found.evidence["mean"]["uniform"]
    assert ours["density"] <= uniform["density"] + 0.005
    assert ours["divergence"] < uniform["divergence"]


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
    layers = result.evidence["layers"].values()
    for nth, bars in enumerate(axes[0].containers):
        assert [bar.get_height() for bar in bars] == [layer["divergence"][nth] for layer in layers]
    assert [bar.get_height() for bar in axes[1].patches] == [config.density for config in result.layers.values()]


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": None}, "density, quality: expected one of the two"),
        ({"density": 0.01}, r"density: expected at least 0\.\d+, which min_budget .*, got 0\.01; lower min_budget"),
        ({"length": 200}, r"length: expected more than the 2048 tokens of min_budget, .* got sequences of 200; use"),
        ({"length": 1000, "config": CONFIG}, r"texts: expected two sequences of 1000 tokens at least"),
        ({"sequences": 1}, "sequences: expected an integer of at least 2, got 1; leave it out"),
        ({"positions": 0}, "positions: expected an integer of at least 1, got 0"),
        ({"positions": True}, "positions: expected an integer of at least 1, got True"),
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


def test_a_model_without_a_head() -> None:
    with pytest.raises(CalibrationError, match="model: expected one that predicts the next token, got LlamaModel; loa"):
        calibrated(make_model("llama").model)


def test_a_model_in_training() -> None:
    with pytest.raises(
        CalibrationError, match="model: expected one in eval mode, got one that is in training; call mod"
    ):
        calibrated(make_model("llama").train())
