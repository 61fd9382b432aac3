"""Inputs of the commands: a device, a compiler, a model of transformers, and a text; errors are ``InputError``."""

from __future__ import annotations

import argparse
import codecs
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexproxy.checks import MAX_HEAD_DIM, MIN_HEAD_DIM
from flexproxy.cli.needle import VOCAB_SIZE
from flexproxy.environment import cpp_compiler

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel


# Tokens that are taken of a longer text unless --length says more: seconds on a CPU, a long prompt on a GPU.
_DEFAULT_LENGTH = {"cpu": 8192, "cuda": 131072}


class InputError(ValueError):
    """A command cannot be run as asked; the message is one line that says why, and what would help."""


class ImpossibleError(InputError):
    """It cannot be done on this machine, however it is asked for."""


def default_text() -> Path:
    """A real text that every Python installation has: the source of argparse."""
    return Path(argparse.__file__)


def read_text(path: Path, length: int | None, most: int | None = None) -> Tensor:
    """The first ``length`` bytes of a file; where that is None all of them, up to ``most``: uint8 ``[1, bytes]``."""
    text = _read_bytes(path, length or most)
    _check_length(path, len(text), "bytes", length)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)[None]


def _read_bytes(path: Path, number: int | None) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(number)
    except OSError as error:
        raise InputError(f"cannot read the text {path}: {error.strerror}") from error


def _check_length(path: Path, found: int, unit: str, length: int | None) -> None:
    if found == 0:
        raise InputError(f"the text {path} is empty; pass a text file")
    if length is not None and found < length:
        raise InputError(
            f"the text {path} has {found} {unit}, and --length asks for {length}; use a longer text or a lower --length"
        )


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one; an explicit ``cuda`` never falls back."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ImpossibleError("--device cuda: torch finds no CUDA device; use --device cpu, or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_compiler(device: torch.device) -> None:
    """Raise unless there is the C++ compiler with which torch.compile builds the CPU kernel."""
    name, path = cpp_compiler()
    if device.type == "cpu" and path is None:
        raise ImpossibleError(
            f"no C++ compiler: torch.compile builds the CPU kernel with it, and {name} is not to be found; "
            "install it, or set CXX to another"
        )


def load_model(folder: Path, device: torch.device) -> LlamaForCausalLM:
    """Load a needle model from a folder, with transformers' own attention; otherwise as ``load_decoder``."""
    from transformers import LlamaForCausalLM

    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(
                f"no {name} in {folder}; the demo's model is the folder examples/needle of flexproxy's repository: run "
                "the demo where that is, or pass --model DIR"
            )
    model = load_decoder(str(folder), device, "sdpa")
    vocabulary = int(model.config.vocab_size or 0)
    if not isinstance(model, LlamaForCausalLM) or vocabulary < VOCAB_SIZE:
        raise InputError(
            f"the model in {folder} is a {type(model).__name__} with {vocabulary} tokens; the needle task is for a "
            f"LlamaForCausalLM with {VOCAB_SIZE} (bytes and four specials)"
        )
    return model


def load_decoder(name: str, device: torch.device, attention: str) -> PreTrainedModel:
    """Load a causal model of transformers from safetensors, without running any code that comes with it.

    Args:
        name: a folder, or else a name on the Hugging Face hub.
        device: where to; float32 on a CPU, on a GPU the model's own 16 bits, or bfloat16.
        attention: the ``attn_implementation``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    local = Path(name).exists()
    loading: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    where = f"the model in {name}" if local else f"the model {name}"
    _quiet_transformers()
    try:
        config: Any = AutoConfig.from_pretrained(name, **loading)
    except Exception as error:
        missing = isinstance(error, OSError) and not local
        begin = f"no folder {name} here, and not on the Hugging Face hub" if missing else f"cannot load {where}"
        raise InputError(f"{begin}: {_reason(error)}") from error
    try:
        # What transformers before 4.56 calls torch_dtype.
        argument = "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"
        own = getattr(config, argument)
        half = own if own in (torch.float16, torch.bfloat16) else torch.bfloat16
        loading |= {argument: half if device.type == "cuda" else torch.float32}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, attn_implementation=attention, use_safetensors=True, output_loading_info=True, **loading
        )
    except Exception as error:  # a damaged file shows as any of a dozen types
        raise InputError(f"cannot load {where}: {_reason(error)}") from error
    model, found = loaded
    if found["missing_keys"]:
        raise InputError(f"{where} lacks weights: {', '.join(sorted(found['missing_keys'])[:3])}")
    placed: PreTrainedModel = model.to(device).eval()
    return placed


def check_decoder(model: PreTrainedModel, length: int | None) -> None:
    """Validate a model before it runs.

    Raises:
        InputError: it has no causal attention, heads that are too narrow or too wide, or fewer positions than
            ``length``, if that is given.
    """
    from flexproxy.integrations.transformers.settings import all_modules, attention_layers, max_positions

    try:
        modules = all_modules(attention_layers(model))
    except ValueError as error:
        raise InputError(str(error)) from error
    for head_dim in {getattr(module, "head_dim", None) for module in modules}:
        if isinstance(head_dim, int) and not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
            raise InputError(
                f"model: expected heads of dimension {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim} in a "
                f"{type(model).__name__}; use another model"
            )
    positions = max_positions(model)
    if length is not None and positions is not None and length > positions:
        raise InputError(
            f"--length: expected at most the {positions} tokens that the model is made for, got {length}; "
            "use a lower --length"
        )


def read_tokens(path: Path, model: PreTrainedModel, name: str, length: int | None, most: int | None = None) -> Tensor:
    """The first ``length`` tokens of a text; where that is None all of them, up to ``most``: int64 ``[1, tokens]``.

    A model with the needle model's vocabulary reads bytes; any other has its tokenizer beside it, under ``name``. Of a
    long text no more is read and tokenized than is needed.
    """
    if reads_bytes(model):
        return read_text(path, length, most).long()
    wanted = length or most
    number = None if wanted is None else 6 * wanted + 1024
    while True:
        data = _read_bytes(path, number)
        whole = number is None or len(data) < number
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
        except UnicodeDecodeError as error:
            raise InputError(f"the text {path} is not UTF-8, at byte {error.start}; pass a text file") from error
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        tokens: Tensor = load_tokenizer(name)(text, return_tensors="pt").input_ids.long()
        # Where the text is cut, its last tokens are not those of the whole text.
        if number is None or wanted is None or whole or tokens.shape[1] >= wanted + 64:
            _check_length(path, tokens.shape[1], "tokens", length)
            return tokens[:, :wanted]
        number *= 2


def prompt(path: Path, model: PreTrainedModel, name: str, length: int | None) -> Tensor:
    """The tokens that a command prefills: ``length``, or by default as many as take seconds and the model is made for.

    Returns:
        int64 ``[1, tokens]``, on the CPU.
    """
    from flexproxy.integrations.transformers.settings import max_positions

    usual = _DEFAULT_LENGTH[model.device.type]
    return read_tokens(path, model, name, length, min(usual, max_positions(model) or usual))


def reads_bytes(model: PreTrainedModel) -> bool:
    """Whether a model has the needle models' vocabulary: bytes and four marks."""
    return bool(model.config.get_text_config().vocab_size == VOCAB_SIZE)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, as ``load_decoder`` loads the model."""
    from transformers import AutoTokenizer

    _quiet_transformers()
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=Path(name).exists(), trust_remote_code=False)
    except Exception as error:
        raise InputError(f"cannot load the tokenizer of {name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of a message."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def _quiet_transformers() -> None:
    """Switch off the progress bars and warnings of transformers and of the libraries that it downloads with."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for library in ("huggingface_hub", "urllib3"):
        getLogger(library).setLevel(ERROR)
