"""Every command fed bad input: one clear line, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")

import huggingface_hub
import transformers

import flexproxy.environment as environment
from flexproxy import calibration, cli, files
from flexproxy.cli import comparison, inputs
from flexproxy.cli import demo as demo_module
from flexproxy.cli.commands import inspect
from flexproxy.cli.needle import VOCAB_SIZE
from tests.tiny_model import save_tiny_model
from tests.transformers_models import interpreted

FULL = OSError(28, "No space left on device")
DENIED = PermissionError(13, "Permission denied")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, and nothing compiled."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with interpreted("cpu"):
        yield


@pytest.fixture
def commands(model_folder: Path, tmp_path: Path) -> dict[str, list[str]]:
    """Each works as it is."""
    common = ["--device", "cpu", "--length", "512", "--min-budget", "64", "--gamma", "0.5"]
    picture = str(tmp_path / "map.png")
    return {
        "info": ["info"],
        "demo": ["demo", "--model", str(model_folder), "--needles", "8", "--picture", picture, *common],
        "inspect": ["inspect", str(model_folder), *common],
    }


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str, printed: str = "") -> None:
    """The last line of stderr says it; the lines before tell which text it was, and how far the command came."""
    out, err = capsys.readouterr()
    assert out.partition(":")[0] == printed
    lines = err.splitlines()
    assert lines[-1].startswith("flexproxy: ")
    assert message in lines[-1]
    assert "Traceback" not in err
    assert sum(line.startswith("flexproxy: ") for line in lines) == 1


@pytest.mark.parametrize("command", ["demo", "inspect"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the text {}: No such file or directory"),
        ("a folder", "cannot read the text {}: Is a directory"),
        (b"", "the text {} is empty; pass a text file"),
        (b"short", "the text {} has 5 bytes, and --length asks for 512; use a longer text or a lower --length"),
    ],
)
def test_a_text_that_cannot_be_used(
    commands: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    content: bytes | str | None,
    message: str,
) -> None:
    text = tmp_path / "text"
    if isinstance(content, bytes):
        text.write_bytes(content)
    elif content is not None:
        text.mkdir()
    assert cli.main([*commands[command], "--text", str(text)]) == 2
    assert_one_line(capsys, message.format(text))
    assert {path.name for path in tmp_path.iterdir()} <= {"text"}


def test_a_binary_file_is_no_text_for_a_model_with_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For the needle model it is one: it reads bytes."""
    model = save_tiny_model(tmp_path / "model", vocab_size=300)
    (tmp_path / "text").write_bytes(b"text\xff\x00\xfe")
    command = ["inspect", str(model), "--device", "cpu", "--text", str(tmp_path / "text")]
    assert cli.main(command) == 2
    assert_one_line(capsys, "is not UTF-8, at byte 4; pass a text file")
    (tmp_path / "text").write_bytes(b"text")
    assert cli.main(command) == 2
    assert_one_line(capsys, f"cannot load the tokenizer of {model}: ")


def test_a_binary_file_is_a_text_for_the_needle_model(
    commands: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_bytes(bytes(range(256)) * 2)
    assert cli.main([*commands["inspect"], "--text", str(tmp_path / "text")]) == 0
    assert "512 queries" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["unknown", "empty folder", "damaged config", "damaged weights", "a file"])
@pytest.mark.parametrize("command", ["demo", "inspect"])
def test_a_model_that_cannot_be_used(
    commands: dict[str, list[str]],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    kind: str,
) -> None:
    folder = tmp_path / "other"
    if kind == "empty folder":
        folder.mkdir()
    elif kind == "a file":
        folder.write_text("{")
    elif kind != "unknown":
        shutil.copytree(model_folder, folder)
        name = "config.json" if kind == "damaged config" else "model.safetensors"
        (folder / name).write_bytes(b"\x00\xff" * 50)
    before = sorted(path for path in tmp_path.rglob("*"))
    words = [word.replace(str(model_folder), str(folder)) for word in commands[command]]
    assert cli.main(words) == 2
    assert_one_line(capsys, str(folder))
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.fixture
def any_model(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Commands that take any decoder, whose folder MODEL stands for."""
    output = tmp_path_factory.mktemp("calibration") / "calibration.json"
    text = ["--text", str(inputs.default_text()), "--length", "512", "--device", "cpu"]
    settings = ["--density", "1.0", "--min-budget", "64", "--output", str(output)]
    return {
        "compare": ["compare", "MODEL", "--length", "512", "--device", "cpu"],
        "inspect": ["inspect", "MODEL", *commands["inspect"][2:]],
        "calibrate": ["calibrate", "MODEL", *text, *settings],
    }


def words_for(command: list[str], model: Path) -> list[str]:
    return [str(model) if word == "MODEL" else word for word in command]


@pytest.mark.parametrize("command", ["inspect", "calibrate"])
def test_a_length_beyond_what_the_model_is_made_for(
    any_model: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    """GPT-2 has learned positions, of which there are no more."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=512, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    words = words_for(any_model[command], tmp_path / "model")
    assert cli.main([*words, "--length", "700"]) == 2
    message = "--length: expected at most the 512 tokens that the model is made for, got 700; use a lower --length"
    assert_one_line(capsys, message)
    assert cli.main(words) == 0  # all of its positions


@pytest.mark.parametrize("command", ["inspect", "calibrate"])
def test_heads_that_are_too_narrow(
    any_model: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    save_tiny_model(tmp_path / "model", head_dim=8)
    assert cli.main(words_for(any_model[command], tmp_path / "model")) == 2
    message = "model: expected heads of dimension 16 to 256, got 8 in a LlamaForCausalLM; use another model"
    assert_one_line(capsys, message)


@pytest.mark.parametrize("command", ["demo", "compare", "inspect", "calibrate"])
def test_out_of_memory(
    commands: dict[str, list[str]],
    any_model: dict[str, list[str]],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more")

    monkeypatch.setattr(demo_module, "run", full)
    monkeypatch.setattr(inspect, "prefill", full)
    monkeypatch.setattr(comparison, "compare", full)
    monkeypatch.setattr(calibration, "calibrate", full)
    assert cli.main(commands["demo"] if command == "demo" else words_for(any_model[command], model_folder)) == 1
    assert_one_line(capsys, "out of memory; use a lower --length, or another --device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["demo", "compare", "inspect", "calibrate"])
def test_a_machine_without_a_gpu(
    commands: dict[str, list[str]],
    any_model: dict[str, list[str]],
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    """It is not the user's mistake: exit code 1."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = commands["demo"] if command == "demo" else words_for(any_model[command], model_folder)
    assert cli.main([*words, "--device", "cuda"]) == 1
    assert_one_line(capsys, "--device cuda: torch finds no CUDA device; use --device cpu, or auto")


@pytest.mark.parametrize("command", ["demo", "inspect"])
def test_a_machine_without_a_compiler(
    commands: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cli.main(commands[command]) == 1
    assert_one_line(capsys, "no C++ compiler: ")


def test_a_name_that_is_neither_here_nor_on_the_hub(
    commands: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """(No network, which the fixture above sees to. What would be logged of it, huggingface_hub does not log then.)"""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub.utils._http", "urllib3.connectionpool")]
    load = transformers.AutoConfig.from_pretrained

    def retrying(*words: Any, **options: Any) -> Any:
        assert not any(logger.isEnabledFor(logging.WARNING) for logger in loggers)
        return load(*words, **options)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", retrying)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", "nobody/nothing", *commands["inspect"][2:]]) == 2
    assert_one_line(capsys, "no folder nobody/nothing here, and not on the Hugging Face hub: ")


def outputs(commands: dict[str, list[str]], folder: Path) -> list[tuple[list[str], Path]]:
    """The commands that write, and a file of each."""
    return [
        (commands["demo"], folder / "map.png"),
        ([*commands["inspect"], "--output", str(folder / "record.json")], folder / "record.json"),
        ([*commands["inspect"], "--pictures", str(folder / "pictures")], folder / "pictures" / "blocks.png"),
    ]


@pytest.mark.parametrize("which", range(3))
def test_what_exists_is_not_replaced(
    commands: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], which: int
) -> None:
    """It is found out before the work."""
    command, file = outputs(commands, tmp_path)[which]
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    assert cli.main(command) == 2
    assert_one_line(capsys, f"{file}: exists already; name another file, or replace it with force=True (--force)")
    assert file.read_text() == "precious"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "folder", "link to a folder", "link to itself"])
def test_what_is_no_file_is_never_replaced(
    commands: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    which: int,
    kind: str,
) -> None:
    command, file = outputs(commands, tmp_path)[which]
    file.parent.mkdir(exist_ok=True)
    target = tmp_path / "target" if kind.startswith("link") else file
    if target != file:
        file.symlink_to(file if kind == "link to itself" else target)
    if kind.endswith("pipe"):
        os.mkfifo(target)
    elif kind.endswith("folder"):
        target.mkdir()
    for force in ([], ["--force"]):
        assert cli.main([*command, *force]) == 2
        assert_one_line(capsys, f"{file}: is not a regular file; name a file")
    with pytest.raises(ValueError, match="is not a regular file"), files.replacing(file):
        pytest.fail("it was written to")
    assert file.is_symlink() == kind.startswith("link")
    assert file.is_fifo() == kind.endswith("pipe")
    assert file.is_dir() == kind.endswith("folder")


def test_a_link_stays_and_its_target_is_replaced(
    commands: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, link = tmp_path / "deep" / "record.json", tmp_path / "link.json"
    target.parent.mkdir()
    target.write_text("precious")
    link.symlink_to(target)
    command = [*commands["inspect"], "--output", str(link)]
    assert cli.main(command) == 2
    assert_one_line(capsys, f"{link}: exists already")
    assert target.read_text() == "precious"
    assert cli.main([*command, "--force", "--json"]) == 0
    assert json.loads(link.read_text()) == json.loads(capsys.readouterr().out)
    assert link.readlink() == target
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("which", range(3))
def test_a_folder_that_cannot_be_written_to(
    commands: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    which: int,
) -> None:
    """Those who run this as root may write everywhere, so the answer of the system is made up."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    command, _ = outputs(commands, tmp_path)[which]
    assert cli.main(command) == 2
    assert_one_line(capsys, f"the folder {tmp_path} cannot be written to")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("which", "error"), [(0, FULL), (1, FULL), (2, FULL), (1, DENIED)])
def test_a_disk_that_is_full_or_denied_in_the_end(
    commands: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: OSError,
    which: int,
) -> None:
    """Half of the file is written, and is gone again; the old one stays."""
    from matplotlib.figure import Figure

    def half(target: Any, path: Any, **_: Any) -> None:
        (target if isinstance(target, Path) else path).open("wb").write(b"half")
        raise error

    monkeypatch.setattr(Figure, "savefig", half)
    monkeypatch.setattr(Path, "write_text", half)
    command, file = outputs(commands, tmp_path)[which]
    if command[0] == "demo" and not hasattr(transformers.PreTrainedModel, "set_attn_implementation"):
        pytest.skip("this transformers cannot switch the attention of a model, which the demo does")
    file.parent.mkdir(exist_ok=True)
    file.touch()
    assert cli.main([*command, "--force"]) == 1
    drawn_last = "--pictures" in command  # what was measured is shown before
    assert_one_line(capsys, f": {error.strerror}", printed="LlamaForCausalLM, CPU" if drawn_last else "")
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [b""]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
def test_a_folder_where_the_system_makes_no_files(
    commands: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even for root."""
    code = cli.main([*commands["inspect"], "--output", "/proc/record.json"])
    assert code in (1, 2)
    assert_one_line(capsys, "/proc")


@pytest.mark.parametrize("command", ["info", "demo", "inspect"])
def test_interrupted(
    commands: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    """(A real signal is sent to the demo in tests/test_cli.py.)"""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "collect", interrupted)
    monkeypatch.setattr(demo_module, "run", interrupted)
    monkeypatch.setattr(inspect, "prefill", interrupted)
    extra = ["--pictures", str(tmp_path / "pictures"), "--output", str(tmp_path / "record.json")]
    assert cli.main([*commands[command], *(extra if command == "inspect" else [])]) == 130
    assert_one_line(capsys, "interrupted")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["info", "demo", "inspect"])
def test_every_option_says_what_it_is(commands: dict[str, list[str]], command: str) -> None:
    """In help; and an option that there is none of is one line."""
    import typer.main

    (found,) = [c for c in typer.main.get_group(cli._app()).commands.values() if c.name == command]
    for parameter in found.params:
        assert getattr(parameter, "help", None), parameter.name
    assert cli.main([*commands[command], "--no-such-option"]) == 2
