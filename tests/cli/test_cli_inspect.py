"""``flexproxy inspect``: what it prints and writes, and that it says in one line what cannot be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")

from flexproxy import ProxyConfig, cli
from flexproxy.cli import inputs
from flexproxy.cli.commands import inspect
from flexproxy.integrations.transformers import configure, save_configuration
from tests.tiny_model import HEADS, LAYERS, save_tiny_model
from tests.transformers_models import interpreted


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def not_compiled() -> Any:
    with interpreted("cpu"):
        yield


@pytest.fixture
def small(model_folder: Path) -> list[str]:
    settings = {"--device": "cpu", "--length": "512", "--min-budget": "64", "--gamma": "0.5"}
    return ["inspect", str(model_folder), *(word for pair in settings.items() for word in pair)]


def test_a_table_and_the_pictures(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    assert cli.main([*small, "--pictures", str(folder), "--mass"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "LlamaForCausalLM, CPU: 1 pass with 512 queries and up to 512 keys"
    assert "mass" in lines[1]
    assert [line.split()[:2] for line in lines[2 : 2 + LAYERS]] == [[str(i), "1"] for i in range(LAYERS)]
    assert lines[-2:] == [str(folder / name) for name in ("record.png", "blocks.png")]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("record.png", "blocks.png"))
    assert "The first 512 tokens of " in err
    assert "compiling kernels" in err
    assert "recording" in err


def test_json_is_all_of_stdout_and_the_file_is_the_same(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*small, "--json", "--output", str(tmp_path / "record.json")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "record.json").read_text()) == data
    assert data["text"]["tokens"] == 512
    assert data["pictures"] == []
    assert sorted(data["layers"]) == [str(i) for i in range(LAYERS)]
    for (one,) in data["layers"].values():  # the pass that compiles kernels is not among them
        assert one["config"] == {"gamma": 0.5, "min_budget": 64}
        assert (one["num_queries"], len(one["density"][0]), one["mass"]) == (512, HEADS, None)


def test_the_settings_of_a_file(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = inputs.load_decoder(str(model_folder), torch.device("cpu"), "flexproxy")
    configure(model, {0: ProxyConfig(min_budget=512), 1: ProxyConfig(density=0.6, min_budget=64)})
    save_configuration(model, tmp_path / "settings.json")
    command = ["inspect", str(model_folder), "--device", "cpu", "--length", "512", "--json"]
    assert cli.main([*command, "--config", str(tmp_path / "settings.json")]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert layers["0"][0]["dense"] == "min_budget covers all keys"
    assert layers["1"][0]["config"] == {"density": 0.6, "min_budget": 64}


def test_the_default_length_is_bounded(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of a short text; of a long one as much as the model is made for."""
    taken = []

    def prefill(model: Any, tokens: Any, *_: Any) -> Any:
        taken.append(tokens.shape[1])
        raise inputs.InputError("enough")

    monkeypatch.setattr(inspect, "prefill", prefill)
    text, command = (
        tmp_path / "text",
        ["inspect", str(model_folder), "--device", "cpu", "--text", str(tmp_path / "text")],
    )
    for length in (300, 5000):  # the model is made for 2048
        text.write_bytes(b"x" * length)
        assert cli.main(command) == 2
    assert taken == [300, 2048]
    assert "The first 2048 tokens of " in capsys.readouterr().err


def test_the_layer_whose_heads_differ_most_is_looked_at(model_folder: Path) -> None:
    model: Any = inputs.load_decoder(str(model_folder), torch.device("cpu"), "flexproxy")
    config = ProxyConfig(gamma=0.5, min_budget=64)
    tokens = inputs.read_text(inputs.default_text(), 300).long()
    stages: list[tuple[str, int, int]] = []
    for dense in range(LAYERS):
        configure(model, config)
        configure(model, {dense: ProxyConfig(gamma=1.0)})
        record = inspect.prefill(model, tokens, False, lambda *stage: stages.append(stage))
        assert inspect._most_varied(record) == 1 - dense
        assert [len(passes) for passes in record.layers.values()] == [1] * LAYERS
    want = [(stage, i, LAYERS) for stage in ("compiling kernels", "recording") for i in range(LAYERS + 1)]
    assert stages == want * LAYERS
    assert not any("flexproxy_observers" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gamma 2", "gamma: expected"),
        ("--num-proxies 3", "num_proxies: expected"),
        ("--length 100000000", "--length: expected at most the 2048 tokens that the model is made for, got 100000000"),
        ("--length 0", "--length"),
        ("--layer 1", "--pictures: expected a folder for the pictures"),
        ("--layer 2 --pictures pictures", "--layer: expected one of 0 to 1, got 2"),
        ("--density 0.3", "gamma, density: expected one of the two, got gamma=0.5, density=0.3; leave one of them out"),
        ("--pictures nowhere/deep", "the folder nowhere does not exist"),
        ("--output .", "--output .: is not a regular file; name a file"),
        ("--config settings.json", "--config: expected all settings in the file, got --gamma, --min-budget besides"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*small, *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("flexproxy: ")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 0, "no layer was sparse, so no blocks are drawn (min_budget covers all keys); use a longer text"),
        (["--layer", "1"], 2, "--layer: expected a layer that is sparse, got layer 1, which was dense (min_budget"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_where_all_is_dense_the_record_is_kept(
    small: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
    as_json: bool,
) -> None:
    folder, record = tmp_path / "pictures", tmp_path / "record.json"
    files = ["--pictures", str(folder), "--output", str(record)]
    command = [*small, "--min-budget", "512", *files, *options, *(["--json"] if as_json else [])]
    assert cli.main(command) == code
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if line.startswith("flexproxy: ")] == err.splitlines()[-1:]
    assert message in err.splitlines()[-1]
    data = json.loads(record.read_text())
    assert (list(data["layers"]), data["pictures"]) == (["0", "1"], [str(folder / "record.png")])
    if as_json:
        assert json.loads(out) == data
    else:
        assert out.startswith("LlamaForCausalLM, CPU: ")
        assert out.splitlines()[-2:] == [str(folder / "record.png"), str(record)]
    assert [path.name for path in folder.iterdir()] == ["record.png"]
    assert (folder / "record.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["inspect", "calibrate"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert re.search(rf"flexproxy {command} \[OPTIONS\] \{{?MODEL", words)  # some releases of typer have braces
    assert "default: (" not in words


def test_a_file_for_another_model(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in (("{", "expected JSON in"), ('{"flexproxy": 1, "model": {}, "layers": {}}', "a file for {")):
        (tmp_path / "settings.json").write_text(text)
        command = ["inspect", str(model_folder), "--device", "cpu", "--config", str(tmp_path / "settings.json")]
        assert cli.main(command) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert message in last
