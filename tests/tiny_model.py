"""A random model of the needle model's kind, small enough to prefill in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flexproxy.cli.needle import VOCAB_SIZE

LAYERS, HEADS = 2, 4


def save_tiny_model(folder: Path, **overrides: int) -> Path:
    """Write the model's config.json and model.safetensors to ``folder``, which is returned."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.3,  # large, so that heads attend to something
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(settings | overrides))).save_pretrained(folder)
    return folder
