"""``flexproxy calibrate``: what it writes and prints, and what it says to a mistake."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from flexproxy import ProxyConfig, calibration, cli
from flexproxy.calibration import Calibration
from tests.conftest import COMMAND
from tests.tiny_model import LAYERS, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
TEXT = Path(argparse.__file__).read_bytes()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(model_folder: Path, tmp_path: Path) -> list[str]:
    """A calibration that takes a second."""
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT[:2600])
    options = {
        "--text": text,
        "--density": 0.8,
        "--min-budget": 128,
        "--output": tmp_path / "out" / "calibration.json",
        "--device": "cpu",
    }
    (tmp_path / "out").mkdir()
    return ["calibrate", str(model_folder), *(str(word) for pair in options.items() for word in pair)]


@pytest.fixture
def known(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration that takes no time, for tests of what becomes of it."""
    found = Calibration({0: ProxyConfig(density=0.5)}, {}, _evidence(), {})
    monkeypatch.setattr(calibration, "calibrate", lambda *_, **__: found)


def _evidence() -> dict[str, Any]:
    mean = {"density": 0.5, "divergence": 0.1, "agreement": 0.9}
    return {
        "target": {"density": 0.5},
        "length": 1,
        "sequences": {"decided_on": 1, "confirmed_on": 1},
        "chosen": "uniform",
        "mean": {"confirmed_on": mean, "uniform": mean},
        "layers": {"0": {"density": [0.5, 1.0], "divergence": [0.1, 0.0], "shared": 0.5}},
    }


def test_files_and_table(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "out" / "picture.png"
    assert cli.main([*command, "--picture", str(picture)]) == 0
    out, err = capsys.readouterr()
    path = tmp_path / "out" / "calibration.json"
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["calibration.json", "picture.png"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    settings = ProxyConfig.load_layers(path)
    assert sorted(settings) == list(range(LAYERS))
    means = Calibration.load(path).evidence["mean"]
    for name, key in (("shared out", "confirmed_on"), ("same in all layers", "uniform")):
        row = next(line for line in out.splitlines() if name in line)
        assert f"{means[key]['divergence']:.4f}" in row
    assert "Densities by layer: " in out or "Sharing does not help: " in out
    assert str(path) in out.replace("\n", "")
    for stage in ("measuring layers", "confirming"):
        assert stage in err


def test_json_is_all_of_stdout(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quality = ["--quality" if word == "--density" else word for word in command]
    assert cli.main([*quality, "--json"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert data == json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert data["evidence"]["target"] == {"quality": 0.8}
    assert data["evidence"]["mean"]["confirmed_on"]["agreement"] >= 0.8
    assert "reaching the quality" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--quality 0.9", "density, quality: expected one of the two"),
        ("--density 2", "density: expected a number in (0, 1], got 2.0"),
        ("--density much", "--density"),
        ("--density 0.05", "density: expected at least 0."),
        ("--min-budget 2048", "length: expected more than the 2048 tokens of min_budget"),
        ("--min-budget -1", "--min-budget"),
        ("--stride 3", "stride: expected a divisor of block_size"),
        ("--length 2000", "texts: expected two sequences of 2000 tokens at least"),
        ("--sequences 1", "--sequences"),
        ("--text nowhere.txt", "cannot read the text nowhere.txt: No such file or directory"),
        ("--text .", "cannot read the text .: Is a directory"),
        ("--output .", "is not a regular file; name a file"),
        ("--output nowhere/calibration.json", "the folder nowhere does not exist"),
        ("--picture picture.txt", "no picture format ends in '.txt'"),
        ("--device tpu", "tpu"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert cli.main([*command, *options.split()]) == 2
    assert_one_line(capsys, message)
    assert not list((tmp_path / "out").iterdir())


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.endswith(" s  measuring layers")]
    assert len(lines) == 1
    assert lines[0].startswith("flexproxy: ")
    assert message in lines[0]


def test_texts_that_are_no_texts(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    assert cli.main([*command, "--text", str(empty)]) == 2
    assert_one_line(capsys, f"the text {empty} is empty; pass a text file")


def test_a_binary_file_for_a_model_with_a_tokenizer(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that reads bytes takes any file; all others want UTF-8."""
    binary = tmp_path / "binary"
    binary.write_bytes(bytes(range(256)) * 8)
    command[1] = str(save_tiny_model(tmp_path, vocab_size=300))
    capsys.readouterr()
    assert cli.main([*command, "--text", str(binary)]) == 2
    assert_one_line(capsys, "cannot load the tokenizer of")  # of the first text
    command[command.index("--text") + 1] = str(binary)
    assert cli.main(command) == 2
    assert_one_line(capsys, f"the text {binary} is not UTF-8, at byte 128; pass a text file")


def test_an_unknown_model(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command[1] = str(tmp_path)  # a folder without a model
    assert cli.main(command) == 2
    assert_one_line(capsys, f"cannot load the model in {tmp_path}")


def test_a_file_is_replaced_only_when_told_to(
    command: list[str], tmp_path: Path, known: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "calibration.json"
    path.write_text("precious")
    assert cli.main(command) == 2
    assert_one_line(capsys, "exists already")
    assert path.read_text() == "precious"
    assert cli.main([*command, "--force"]) == 0
    assert ProxyConfig.load_layers(path)


def test_a_full_disk(
    command: list[str], tmp_path: Path, known: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    for options in ([], ["--json"]):
        assert cli.main([*command, *options]) == 1
        out, err = capsys.readouterr()
        last = err.splitlines()[-1]
        assert last.startswith("flexproxy: ")
        assert last.endswith(f"--output {tmp_path / 'out' / 'calibration.json'}: No space left on device")
        assert json.loads(out[out.index("{") :])["layers"] == {"0": {"density": 0.5}}  # the work is not lost
        assert not list((tmp_path / "out").iterdir())


def test_interrupting_leaves_nothing(command: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert "measuring layers" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert (out, err) == ("", "flexproxy: interrupted\n")
    assert not list((tmp_path / "out").iterdir())


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--text", "--density", "--quality", "--length", "--sequences", "--output", "--picture", "--force"):
        assert option in out
