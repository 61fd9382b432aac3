"""Settings of a model's layers: by model, by layer, by file; read back; errors that say what to do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from flexproxy import ProxyConfig
from flexproxy.integrations.transformers import configuration, configure, save_configuration
from tests.transformers_models import make_model, make_tokens, make_vision_language_model, use

A, B = ProxyConfig(gamma=0.9, num_proxies=2), ProxyConfig(density=0.2, groups=[0, 0, 1, 1], max_budget=4096)


def test_the_whole_model_and_single_layers() -> None:
    model = make_model("llama")
    assert configuration(model) == {0: ProxyConfig(), 1: ProxyConfig()}
    configure(model, A)
    assert configuration(model) == {0: A, 1: A}
    configure(model, {1: B})
    assert configuration(model) == {0: A, 1: B}
    assert configuration(copy.deepcopy(model)) == {0: A, 1: B}
    assert configuration(model.model) == {0: A, 1: B}


def test_layers_without_causal_attention_have_no_settings() -> None:
    """A vision tower has none, and is no layer."""
    model = make_vision_language_model()
    configure(model, {0: A})
    assert configuration(model) == {0: A, 1: ProxyConfig()}
    with pytest.raises(ValueError, match="settings: expected layers among 0-1, got 2; the others have no causal"):
        configure(model, {2: A})


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    model, other = make_model("llama"), make_model("llama")
    configure(model, {0: A, 1: B})
    save_configuration(model, tmp_path / "settings.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["settings.json"]
    for path in (tmp_path / "settings.json", str(tmp_path / "settings.json")):
        configure(other, ProxyConfig())
        configure(other, path)
        assert configuration(other) == {0: A, 1: B}


def written(folder: Path, change: dict[str, Any] | str) -> Path:
    path = folder / "settings.json"
    save_configuration(make_model("llama"), path)
    text = change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", r"settings: expected JSON in .*settings\.json, got .*; write it with save_configuration"),
        ("[]", r'settings: expected \{"flexproxy": 1, .*settings\.json, got something else; write it with'),
        ({"flexproxy": 2}, r'settings: expected \{"flexproxy": 1, '),
        (
            {"layers": {"0": {"gama": 0.9}}},
            r"fields of ProxyConfig for layer 0 in .*, got \['gama'\]; use some of num_",
        ),
        ({"layers": {"0": 3}}, r"fields of ProxyConfig for layer 0 in .*, got \[3\]"),
        ({"layers": {"0": {"gamma": 7.0}}}, r"settings: layer 0 in .*: gamma: expected a number in \(0, 1\], got 7"),
        ({"layers": {"first": {}}}, r"settings: expected layers by number in .*, got 'first'"),
        ({"layers": {"5": {}}}, r"settings: expected layers among 0-1, got 5"),
    ],
)
def test_a_damaged_file(tmp_path: Path, change: dict[str, Any] | str, message: str) -> None:
    model = make_model("llama")
    configure(model, A)
    with pytest.raises(ValueError, match=message):
        configure(model, written(tmp_path, change))
    assert configuration(model) == {0: A, 1: A}


def test_a_file_of_another_model(tmp_path: Path) -> None:
    save_configuration(make_model("qwen3"), tmp_path / "settings.json")
    with pytest.raises(ValueError, match=r"settings: expected a file for .*llama.*, got .* for .*qwen3.*; calibrate"):
        configure(make_model("llama"), tmp_path / "settings.json")
    with pytest.raises(ValueError, match=r"settings: cannot read .*nothing\.json: No such file"):
        configure(make_model("llama"), tmp_path / "nothing.json")


def test_wrong_arguments() -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"num_proxies: expected a divisor of the 2 KV heads, .* got 3; use one of"):
        configure(model, {0: A, 1: ProxyConfig(num_proxies=3)})
    with pytest.raises(
        ValueError, match="groups: expected the proxy index of each of the 4 query heads, got 8 of them"
    ):
        configure(model, ProxyConfig(groups=[0] * 8))
    with pytest.raises(ValueError, match="settings: expected layers among 0-1, got 7"):
        configure(model, {7: A})
    wrong: Any = [
        ({0: 0.9}, "settings: expected a ProxyConfig for layer 0, got float"),
        ({"0": A}, "settings: expected layers by number, got '0' of type str; use for example {0: "),
        (0.9, "settings: expected a ProxyConfig, a dict of them by layer, or the path of a file, got float"),
    ]
    for settings, message in wrong:
        with pytest.raises(TypeError, match=message):
            configure(model, settings)
    assert configuration(model) == {0: ProxyConfig(), 1: ProxyConfig()}  # nothing was set


def test_a_model_without_the_interface() -> None:
    other: Any = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="model: expected a model of transformers, got Linear; pass what"):
        configure(other, A)
    encoder = transformers.BertModel(
        transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(
        ValueError, match=r"model: expected one with causal self-attention .*, got BertModel, which has"
    ):
        configure(encoder, A)


def test_settings_are_found_without_configure() -> None:
    """A model that was never configured has the defaults, under which a short prompt is dense."""
    model, tokens = make_model("llama"), make_tokens(1, 200)
    with torch.no_grad():
        use(model, "sdpa")
        theirs = model(input_ids=tokens).logits
        use(model, "flexproxy")
        assert torch.equal(model(input_ids=tokens).logits, theirs)
