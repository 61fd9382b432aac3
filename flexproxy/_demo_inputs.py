"""What the demo runs on: a text, a device, a compiler, and the trained needle model.

Whatever cannot be used is said in one line, as a ``DemoError``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexproxy._info import cpp_compiler
from flexproxy.needle import VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_CHECKPOINT = Path("examples", "needle")  # in the repository


class DemoError(ValueError):
    """The demo cannot be run as asked; the message is one line that says why, and what would help."""


def default_text() -> Path:
    """A real text that every Python installation has: the source of argparse."""
    return Path(argparse.__file__)


def default_model() -> Path:
    """The folder of the trained needle model, in the repository that this package is part of."""
    folder = Path(__file__).resolve().parent.parent / _CHECKPOINT
    if not (folder / "model.safetensors").is_file():
        raise DemoError(
            f"no model.safetensors in {folder}; the checkpoint is part of the repository ({_CHECKPOINT.as_posix()}), "
            "not of the installed package: pass --model DIR to point to it"
        )
    return folder


def read_text(path: Path, length: int) -> Tensor:
    """The first ``length`` bytes of a file: uint8 ``[1, length]``."""
    try:
        with path.open("rb") as file:
            text = file.read(length)
    except OSError as error:
        raise DemoError(f"cannot read the text {path}: {error.strerror}") from error
    if len(text) < length:
        raise DemoError(
            f"the text {path} has {len(text)} bytes, and --length asks for {length}; "
            "use a longer text or a lower --length"
        )
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)[None]


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one; an explicit ``cuda`` never falls back."""
    if name == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: torch finds no CUDA device; use --device cpu, or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_compiler(device: torch.device) -> None:
    """A CPU's attention kernel is built by the C++ compiler that torch.compile looks for."""
    name, path = cpp_compiler()
    if device.type == "cpu" and path is None:
        raise DemoError(
            f"no C++ compiler: torch.compile builds the CPU kernel with it, and {name} is not to be found; "
            "install it, or set CXX to another"
        )


def load_model(folder: Path, device: torch.device) -> LlamaForCausalLM:
    """Load the needle model, from local safetensors only: bfloat16 on a GPU, float32 on a CPU."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise DemoError(f"no {name} in {folder}; a model is a folder as examples/needle/train.py writes it")
    logging: Any = transformers_logging
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = LlamaForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # a damaged file shows as any of a dozen types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DemoError(f"cannot load the model in {folder}: {reason}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    model, loading = loaded
    if loading["missing_keys"]:
        raise DemoError(f"the model in {folder} lacks weights: {', '.join(sorted(loading['missing_keys'])[:3])}")
    vocabulary = int(model.config.vocab_size or 0)
    if vocabulary < VOCAB_SIZE:
        raise DemoError(
            f"the model in {folder} has {vocabulary} tokens; the needle task has {VOCAB_SIZE} (bytes and four specials)"
        )
    placed: LlamaForCausalLM = model.to(device).eval()
    return placed
