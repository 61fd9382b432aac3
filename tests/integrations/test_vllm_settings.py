"""The settings of a vLLM server: without vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexproxy import ProxyConfig
from flexproxy.integrations.vllm.settings import Settings, parse

SHAPE = {"model_type": "llama", "num_hidden_layers": 4, "head_dim": 64}


def parsed(**settings: Any) -> Settings:
    return parse({"flexproxy": settings, "another plug-in": 1})


def calibration(folder: Path) -> str:
    layers = {"0": {"density": 0.3}, "2": {"groups": [0, 1, 1, 0]}}
    path = folder / "calibration.json"
    path.write_text(json.dumps({"flexproxy": 1, "model": SHAPE | {"weights": "sha256:0"}, "layers": layers}))
    return str(path)


def test_nothing_is_the_defaults() -> None:
    nothings: list[object] = [{}, {"flexproxy": {}}, {"other": 2}, None, SimpleNamespace()]
    for nothing in nothings:
        assert parse(nothing) == Settings()
    assert Settings().of(7) == ProxyConfig()


def test_fields_and_layers() -> None:
    settings = parsed(density=0.15, min_budget=512, layers={"0": {"gamma": 0.99}, "3": {"stride": 8}}, when="always")
    assert settings.of(1) == ProxyConfig(density=0.15, min_budget=512)
    assert settings.of(0) == ProxyConfig(gamma=0.99, min_budget=512)  # the density would replace its gamma
    assert settings.of(3) == ProxyConfig(density=0.15, min_budget=512, stride=8)
    assert settings.when == "always"


def test_calibration(tmp_path: Path) -> None:
    settings = parsed(calibration=calibration(tmp_path), gamma=0.8, layers={"2": {"num_proxies": 2}})
    assert settings.of(0) == ProxyConfig(density=0.3)
    assert settings.of(1) == ProxyConfig(gamma=0.8)
    assert settings.of(2) == ProxyConfig(num_proxies=2)
    settings.check_model(SimpleNamespace(**SHAPE, vocab_size=3), 4)
    with pytest.raises(ValueError, match=r'"calibration"\]: expected a file for .*\'head_dim\': 32.*; calibrate anew'):
        settings.check_model(SimpleNamespace(**(SHAPE | {"head_dim": 32})), 4)


def test_layers_beyond_the_model() -> None:
    with pytest.raises(ValueError, match=r'"layers"\]: expected layers from 0 to 3, got 4'):
        parsed(layers={"4": {}}).check_model(SimpleNamespace(), 4)


MISTAKES: dict[str, tuple[Any, str]] = {
    "a number": (1, r'additional_config\["flexproxy"\]: expected settings by name, got 1'),
    "misspelt": ({"densty": 0.1}, "got 'densty'; did you mean 'density'\\?"),
    "unknown": ({"xyz": 0.1}, "got 'xyz'; use some of num_proxies, "),
    "out of range": ({"density": 2.0}, r'additional_config\["flexproxy"\]: .*; density: expected .* got 2.0'),
    "a text": ({"gamma": "0.9"}, "gamma: expected a number"),
    "when": ({"when": "never"}, r'\["when"\]: expected "auto" or "always", got \'never\''),
    "layers": ({"layers": [1]}, r'\["layers"\]: expected settings by layer, got \[1\]'),
    "a layer's number": ({"layers": {"first": {}}}, "expected layers by number, got 'first'"),
    "a layer's settings": ({"layers": {"0": 0.9}}, r'\["layers"\]\["0"\]: expected settings by name, got 0.9'),
    "a layer's field": ({"layers": {"0": {"when": "auto"}}}, r'\["0"\]: expected names of settings, got \'when\''),
    "a layer's value": ({"layers": {"0": {"stride": 7}}}, r'\["layers"\]\["0"\]: .* stride: expected a divisor'),
    "no file": ({"calibration": "/nowhere.json"}, r'\["calibration"\]: cannot read /nowhere.json'),
    "no path": ({"calibration": 3}, r'\["calibration"\]: expected the path of a file, got 3'),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_one_line(name: str) -> None:
    given, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message) as caught:
        parse({"flexproxy": given})
    assert "\n" not in str(caught.value)
