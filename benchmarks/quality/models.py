"""The model under test, and what its tasks are made from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import byte_tasks, prompt_tasks
from benchmarks.quality.corpus import DOMAINS, corpus
from benchmarks.quality.samples import Task
from benchmarks.quality.texts import Text, default_folder, read_text
from flexproxy.cli.inputs import load_tokenizer, reads_bytes

DEFAULT_MODEL = "smollm2"
NEEDLE = Path(__file__).with_name("needle13m")  # of train.py, seed 1; its weights are not in the repository


def tasks_for(model: Any, folder: str, path: Path | None) -> tuple[dict[str, Task], dict[str, Text]]:
    """The tasks that a model can read, by name, and the texts that they are made from, by what they are for.

    Args:
        folder: the model's, or its name on the hub.
        path: a text of the user's; None is the fixed prose and code, and Python packages for a model of bytes.

    Raises:
        ValueError: there is no text.
    """
    if reads_bytes(model):
        text = read_text(path or default_folder(), "evaluation", trained_on=path is None or path.is_dir())
        return byte_tasks.tasks(torch.frombuffer(bytearray(text.content), dtype=torch.uint8)), {"text": text}
    tokenizer = load_tokenizer(folder)

    def haystack(text: Text) -> prompt_tasks.PromptHaystack:
        return prompt_tasks.PromptHaystack(text.content.decode(errors="replace"), tokenizer)

    if path is not None:
        text = read_text(path, "evaluation")
        return prompt_tasks.tasks(haystack(text)), {"text": text}
    texts = {domain: corpus(domain, "evaluation") for domain in DOMAINS}
    haystacks = {domain: haystack(text) for domain, text in texts.items()}
    found = prompt_tasks.tasks(haystacks[DOMAINS[0]], haystacks)
    del found["text"]  # which is prose
    return found, texts


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
