"""The model under test, and what its tasks are made from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import byte_tasks, prompt_tasks
from benchmarks.quality.samples import Task
from benchmarks.quality.texts import Text
from flexproxy.cli.inputs import load_tokenizer, reads_bytes

NEEDLE = Path(__file__).with_name("needle13m")  # of train.py, seed 1; its weights are not in the repository


def default_model() -> str:
    """The folder of the needle model that quality is measured on where no other is named.

    Raises:
        ValueError: it is not here.
    """
    if not (NEEDLE / "model.safetensors").is_file():
        raise ValueError(
            f"--model: expected a folder or name, got none, and no model.safetensors is in {NEEDLE}; make one with "
            "python -m benchmarks.quality.train --out needle-models, and use --model needle-models/seed0"
        )
    return str(NEEDLE)


def tasks_for(model: Any, name: str, text: Text) -> tuple[dict[str, Task], Any]:
    """The tasks that a model can read, by name, and the haystack that they are made from."""
    if reads_bytes(model):
        return byte_tasks.TASKS, torch.frombuffer(bytearray(text.content), dtype=torch.uint8)
    return prompt_tasks.TASKS, prompt_tasks.PromptHaystack(text.content.decode(errors="replace"), load_tokenizer(name))


def fingerprint(model: Any) -> str:
    """Tells models apart: a hash of names, shapes and first values of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:1024].float().cpu()
        digest.update(f"{name} {list(parameter.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def name_of(model: str) -> str:
    """What a result calls the model: the last part of a folder's path, or the name on the hub."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def attention_shape(model: Any) -> tuple[int, int, int]:
    """Hq, Hkv and D."""
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return heads, kv_heads, int(getattr(config, "head_dim", None) or config.hidden_size // heads)
