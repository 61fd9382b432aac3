"""``flexproxy compare``: what it measures, prints and writes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")

from transformers import PreTrainedModel

from flexproxy import ProxyConfig, cli
from flexproxy.cli import comparison, inputs
from flexproxy.cli.comparison import DENSITIES, Comparison, Setting, settings_of
from tests.tiny_model import save_tiny_model
from tests.transformers_models import interpreted, make_model, make_tokens

NAMES = ["dense", *settings_of(DENSITIES)]

if not hasattr(PreTrainedModel, "set_attn_implementation"):
    pytest.skip("this transformers cannot switch the attention of a model", allow_module_level=True)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def not_compiled() -> Any:
    with interpreted("cpu"):
        yield


def test_a_table_a_verdict_and_a_picture(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "compared.png"
    command = ["compare", str(model_folder), "--device", "cpu", "--length", "1500", "--picture", str(picture)]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert "Prefill of 1500 tokens, float32, CPU" in out
    for name in NAMES:
        assert sum(line.strip().startswith(f"{name}  ") for line in out.splitlines()) == 1, name
    assert "1024 places of the text are compared" in out
    assert out.splitlines()[-1] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "The first 1500 tokens of " in err
    assert "warming up" in err
    assert cli.main(command) == 2
    assert f"--picture {picture}: " in capsys.readouterr().err.splitlines()[-1]


def test_json_is_all_of_stdout(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(model_folder), "--device", "cpu", "--length", "1500", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    dense, default, some, few = data["settings"]
    assert [x["name"] for x in data["settings"]] == NAMES
    assert [x["asked"] for x in data["settings"]] == [1.0, None, *DENSITIES]
    assert (dense["density"], dense["agreement"], dense["loss_over_dense_percent"]) == (1.0, 1.0, 0.0)
    assert default["density"] == 1.0  # its least budget is longer than the text
    assert default["loss"] == pytest.approx(dense["loss"], abs=1e-4)
    assert few["density"] == some["density"] < 1  # at this length both are what is forced
    assert few["agreement"] < 1
    assert min(x["seconds"] for x in data["settings"]) > 0
    assert data["verdict"]


def test_densities_of_your_own(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--length", "1500", "--density", "0.9", "--density", "0.05", "--json"]
    assert cli.main(["compare", str(model_folder), *options]) == 0
    found = json.loads(capsys.readouterr().out)["settings"]
    assert [(x["name"], x["asked"]) for x in found[2:]] == [("density 0.9", 0.9), ("density 0.05", 0.05)]
    assert abs(found[2]["density"] - 0.9) < 0.05
    assert found[3]["density"] > 0.05  # what is forced


def test_each_is_prefilled_once_and_warmed_by_two_layers(tmp_path: Path) -> None:
    model = inputs.load_decoder(str(save_tiny_model(tmp_path, num_hidden_layers=4)), torch.device("cpu"), "sdpa")
    calls: list[int] = []
    attention = comparison._Prefills(model, torch.zeros(1, 2, dtype=torch.int64), lambda *_: None).modules
    hooks = [module.register_forward_hook(lambda *_, n=n: calls.append(n)) for n, module in enumerate(attention)]
    stages: list[str] = []
    tokens = inputs.read_text(inputs.default_text(), 700).long()
    settings = settings_of(DENSITIES)
    found = comparison.compare(
        model, tokens, lambda stage, done, total: stages.append(f"{stage} {done}/{total}"), settings
    )
    for hook in hooks:
        hook.remove()
    assert calls == [0, 1, 0, 1, 2, 3] * 4
    assert stages[:3] == ["dense, warming up 0/4", "dense, warming up 1/4", "dense, warming up 2/4"]
    assert stages[-1] == "density 0.12 4/4"
    assert (found.tokens, found.compared) == (700, 699)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())


def test_figures_are_those_of_the_logits(model_folder: Path) -> None:
    """Against a prefill by hand, at every position."""
    model: Any = inputs.load_decoder(str(model_folder), torch.device("cpu"), "sdpa")
    tokens = inputs.read_text(inputs.default_text(), 600).long()
    config = ProxyConfig(gamma=0.5, min_budget=64)
    dense, half = comparison.compare(model, tokens, lambda *_: None, {"half": config}).settings
    from flexproxy.integrations.transformers import configure

    logits = {}
    with torch.no_grad():
        for name in ("sdpa", "flexproxy"):
            configure(model, config, when="always")
            model.set_attn_implementation(name)
            logits[name] = model(tokens).logits[0, :-1]
    for setting, found in ((dense, logits["sdpa"]), (half, logits["flexproxy"])):
        bits = -found.log_softmax(-1).gather(1, tokens[0, 1:, None]).mean() / torch.tensor(2.0).log()
        assert setting.loss == pytest.approx(float(bits), rel=1e-4)
    same = (logits["sdpa"].argmax(-1) == logits["flexproxy"].argmax(-1)).float().mean()
    assert half.agreement == pytest.approx(float(same), abs=2 / 599)
    assert 0 < half.density < 1


def test_a_hybrid() -> None:
    """A warm-up reaches the first layer of every kind; windows count as well."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    model = make_model("gemma3", num_hidden_layers=4, layer_types=kinds)
    model.set_attn_implementation("sdpa")
    stages: list[str] = []
    settings = settings_of(DENSITIES)
    found = comparison.compare(
        model, make_tokens(1, 700), lambda stage, done, total: stages.append(f"{stage} {done}"), settings
    )
    assert stages[:5] == ["dense, warming up 0", *(f"dense, warming up {n}" for n in (1, 2, 3)), "dense 0"]
    assert 0 < found.settings[-1].density < 1


def compared(*settings: tuple[str, float, float]) -> Comparison:
    dense = Setting("dense", 1.0, 1.0, 1.0, 2.0, 10.0)
    others = (replace(dense, name=name, loss=loss, seconds=seconds) for name, loss, seconds in settings)
    return Comparison(8192, 1024, "CPU", "float32", (dense, *others))


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        (
            [("a", 2.0, 11.0), ("b", 2.0, 9.8)],
            "Stay dense at this length: no setting is faster at 8192 tokens on this CPU.",
        ),
        ([("a", 2.01, 8.0), ("b", 2.01, 5.0), ("c", 2.1, 1.0)], "loses at most 1 %: b, 2.00 times as fast as dense"),
        ([("a", 2.2, 8.0), ("b", 2.1, 5.0)], "loses more than 1 %; the one that loses least: b, 2.00 times"),
    ],
)
def test_verdict(settings: list[tuple[str, float, float]], verdict: str) -> None:
    assert verdict in compared(*settings).verdict()


def test_only_the_needed_text_is_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And cut tokens are not taken: the same tokens as of the whole text."""
    given: list[int] = []

    class Words:
        def __call__(self, text: str, return_tensors: str) -> Any:
            given.append(len(text))
            ids = torch.tensor([[len(word) for word in text.split(" ")]])
            return type("Encoded", (), {"input_ids": ids})

    monkeypatch.setattr(inputs, "load_tokenizer", lambda name: Words())
    model = inputs.load_decoder(str(save_tiny_model(tmp_path / "m", vocab_size=300)), torch.device("cpu"), "sdpa")
    text = " ".join("é" * (1 + i % 40) for i in range(50_000))
    (tmp_path / "text").write_text(text, encoding="utf-8")
    whole = torch.tensor([[len(word) for word in text.split(" ")]])
    found = inputs.read_tokens(tmp_path / "text", model, "m", 1000)
    assert torch.equal(found, whole[:, :1000])
    assert max(given) < len(text) / 10
    assert torch.equal(inputs.read_tokens(tmp_path / "text", model, "m", None), whole)
    assert torch.equal(inputs.prompt(tmp_path / "text", model, "m", None), whole[:, :2048])  # the model's positions
    with pytest.raises(inputs.InputError, match="has 50000 tokens, and --length asks for 60000"):
        inputs.read_tokens(tmp_path / "text", model, "m", 60_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--length 1", "--length"),
        ("--length 100000000", "--length: expected at most the 2048 tokens that the model is made for, got 100000000"),
        ("--picture nowhere/deep.png", "the folder nowhere does not exist"),
        ("--picture compared.txt", "no picture format ends in '.txt'"),
        ("--text nothing", "cannot read the text nothing: No such file or directory"),
        ("--text one", "the text has one token; pass a longer one"),
        ("--density 0", "--density: expected a number in (0, 1], got 0.0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one").write_text("x")
    assert cli.main(["compare", str(model_folder), "--device", "cpu", *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
