"""The command line: what it prints where, its exit codes, and what it says to a mistake."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import flexproxy
from flexproxy import cli, environment
from flexproxy.cli import demo
from flexproxy.ops import compat, implementations
from tests.conftest import COMMAND
from tests.tiny_model import HEADS, LAYERS, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("typer", "rich", "transformers", "safetensors", "matplotlib"):
        pytest.importorskip(package)
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def small(model_folder: Path, tmp_path: Path) -> Iterator[list[str]]:
    """A demo that takes a second, with nothing compiled."""
    options = {
        "--model": model_folder,
        "--picture": tmp_path / "map.png",
        "--length": 512,
        "--needles": 8,
        "--min-budget": 64,
        "--gamma": 0.5,
        "--device": "cpu",
    }
    with torch.compiler.set_stance("force_eager"):
        yield ["demo", *(str(word) for pair in options.items() for word in pair)]


def test_demo_prints_tables_and_writes_the_picture(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(small) == 0
    out, err = capsys.readouterr()
    for line in ("needles answered exactly", "bits per byte of the text", "blocks kept / admissible", "time"):
        assert line in out
    assert str(tmp_path / "map.png") in out
    assert "Runs on the CPU" in err
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_demo_json_is_all_of_stdout(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*small, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["picture"] == str(tmp_path / "map.png")
    assert Path(data["picture"]).is_file()
    assert (data["tokens"], data["queries"]) == (512, 8)
    assert [len(heads) for heads in data["density"]] == [HEADS] * LAYERS
    assert data["dense"].keys() == data["sparse"].keys() == {"exact_answers", "bits_per_byte", "seconds"}
    assert data["versions"]["torch"] == torch.__version__


def test_demo_replaces_a_picture_only_when_told_to(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "map.png").write_bytes(b"precious")
    assert cli.main(small) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "map.png").read_bytes() == b"precious"
    assert cli.main([*small, "--force"]) == 0
    assert (tmp_path / "map.png").read_bytes() != b"precious"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gamma 2", "gamma: expected"),
        ("--gamma nan", "gamma: expected"),
        ("--gamma much", "--gamma"),
        ("--length 5", "--length"),
        ("--length 1000000000", "use a longer text or a lower --length"),
        ("--needles 17", "num_needles: expected 1 to 16"),
        ("--num-proxies 3", "num_proxies: expected"),
        ("--min-budget -1", "min_budget: expected"),
        ("--layer 2", "--layer: the model has layers 0 to 1"),
        ("--text nowhere.txt", "cannot read the text nowhere.txt"),
        ("--text .", "cannot read the text ."),
        ("--model nowhere", "no config.json in nowhere"),
        ("--picture map.txt", "no picture format ends in '.txt'"),
        ("--picture nowhere/map.png", "does not exist"),
        ("--device tpu", "tpu"),
        ("--no-such-option", "--no-such-option"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    small: list[str], capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert cli.main([*small, *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("flexproxy: ")
    assert message in last
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2  # the note about text and device may come before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["info"], ["info", "--json"]])
def test_stdout_on_a_full_disk(model_folder: Path, command: list[str], unbuffered: str) -> None:
    """It shows when something is printed, or when the command ends."""
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *command],
            cwd=ROOT,
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert (done.returncode, done.stderr) == (1, "flexproxy: cannot write to stdout: No space left on device\n")


def test_a_pipe_that_nobody_reads(model_folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "info", "--json"],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_unknown_command(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmark"]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "benchmark" in err


def test_help_and_version(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert "demo" in out
    assert "info" in out
    assert cli.main(["demo", "--help"]) == 0
    assert "2048" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{flexproxy.__version__}\n"


def test_the_module_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer")
    monkeypatch.setattr(sys, "argv", ["python -m flexproxy", "--version"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("flexproxy", run_name="__main__")
    assert exit_.value.code == 0
    assert flexproxy.__version__ in capsys.readouterr().out


def test_info_as_json(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["flexproxy"] == flexproxy.__version__
    assert data["python"] == platform.python_version()
    assert {"torch", "triton", "transformers", "einops"} <= data["packages"].keys()
    assert all(package["needed_for"] for package in data["packages"].values())
    assert data["packages"]["einops"]["version"]
    assert data["packages"]["safetensors"]["install"] == 'pip install "flexproxy[hf]"'
    assert data["devices"][0]["device"] == "cpu"
    assert data["devices"][0]["estimate"] == "torch"
    assert data["devices"][0]["why"] == {"estimate": "cpu is not a CUDA device", "kernel_options": "not a CUDA device"}
    assert len(data["devices"]) == 1 + (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_info_says_what_is_missing(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "version_of", lambda name: None if name == "triton" else "1.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "250")
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert out.count("missing") == 1
    assert 'pip install "triton"' in out
    assert out.count("not a CUDA device") == 2
    assert "No CUDA device" in out


@pytest.mark.parametrize("name", environment._PACKAGES)
def test_info_names_the_extra_that_brings_a_package(name: str) -> None:
    found = re.fullmatch(
        r'pip install (?:--pre )?"(?:triton|flexproxy(?:\[(\w+)\])?)"', str(environment._package(name)["install"])
    )
    assert found is not None
    if name == "triton":  # which torch's CUDA builds bring
        return
    entry = found[1] or "dependencies"
    assert re.search(rf'^{entry} = \[.*"{name}\b', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_info_without_triton_and_flash(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reasons are those of the places that choose."""
    options = importlib.import_module("flexproxy.sparse.kernel_options")
    reason = "triton is not installed (pip install triton)"
    monkeypatch.setattr(implementations, "_why_torch", lambda device: reason)
    monkeypatch.setattr(options, "_why_torchs_own", lambda q, gradients: None)
    monkeypatch.setattr(compat, "flash_backend_exists", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["info", "--json"]) == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    assert device["why"]["estimate"] == reason
    assert device["kernel_options"]["USE_TMA"]
    assert 'pip install --pre "flexproxy[flash]"' in device["why"]["kernel_options"]
    monkeypatch.setenv("COLUMNS", "250")
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert reason in out
    assert device["why"]["kernel_options"] in out


@pytest.mark.parametrize("module", ["transformers", "safetensors", "matplotlib"])
def test_demo_names_the_extra_that_is_missing(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    assert cli.main(small) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f'flexproxy: {module} is not installed: pip install "flexproxy[hf]"\n')


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_without_the_cli_extra(module: str) -> None:
    """Help and version need nothing; a command says in one line what to install."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        blocked = f"import sys; sys.modules[{module!r}] = None; {COMMAND}"
        command = [sys.executable, "-c", blocked, *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    install = f'{module} is not installed: pip install "flexproxy[hf]"\n'
    helped = run("--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert helped.stdout.endswith(f"To run them: {install}")
    assert all(f"\n  {command} " in helped.stdout for command in ("calibrate", "compare", "demo", "info", "inspect"))
    demo = run("demo")
    assert (demo.returncode, demo.stdout, demo.stderr) == (1, "", f"flexproxy: {install}")


def test_interrupting_leaves_no_picture(small: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *small, "--length", "8192"],  # a second and more for a prefill
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines: list[str] = []
    while not (lines and "dense, warming up" in lines[-1]):
        lines.append(process.stderr.readline())
        assert lines[-1], f"ended early: {lines}"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err == "flexproxy: interrupted\n"
    assert not list(tmp_path.glob("*map.png*"))


def test_a_bug_is_not_hidden_as_a_mistake(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(demo, "_measure", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(small)
