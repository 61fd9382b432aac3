"""Which model a file of settings was made for.

NOTE [Same model]
A model is known by its shape and, where a file was calibrated, by the signs of some of the weights that make its
queries and keys. Signs survive a change of dtype, so a model is the same in bfloat16, float16 and float32; a fine-tuned
or a quantised one is another. Weights of which this process has a shard alone, or none, cannot be looked at: then the
shape decides, and a warning says so.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

_SHAPE = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
_SAMPLES = 1024  # signs of each weight


def shape_of(model: Any) -> dict[str, Any]:
    """What says whether settings fit a model."""
    config: Any = model.config.get_text_config()
    return {name: getattr(config, name, None) for name in _SHAPE}


def max_positions(model: Any) -> int | None:
    """Tokens that a model is made for; None if it does not say."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions


def identity_of(model: Any, attention: list[nn.Module]) -> dict[str, Any]:
    """The shape, and ``"weights"`` where they can be looked at. attention: the attention modules, in order."""
    weights = _weights_of(attention)
    return shape_of(model) | ({} if weights is None else {"weights": weights})


def check_identity(model: Any, made_for: Any, attention: list[nn.Module], path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless a model is the one that a file was made for; see NOTE [Same model]."""
    shape = shape_of(model)
    found = {name: made_for.get(name) for name in _SHAPE} if isinstance(made_for, dict) else made_for
    if found != shape:
        raise ValueError(
            f"settings: expected a file for {shape}, got {path} for {found}; calibrate this model, or configure it "
            "with a ProxyConfig"
        )
    wanted = made_for.get("weights")
    if wanted is None:
        return
    own = _weights_of(attention)
    if own is None:
        warnings.warn(
            f"flexproxy: {path} was compared with the model by shape alone, since its weights are not all here",
            stacklevel=3,
        )
    elif own != wanted:
        raise ValueError(
            f"settings: expected a file for these weights, got {path}, which was calibrated for others of the same "
            "shape; calibrate this model, or take the ProxyConfigs without this check from ProxyConfig.load(path)"
        )


def _weights_of(attention: list[nn.Module]) -> str | None:
    """A hash of signs of the weights; None where this process does not have them whole."""
    weights = [
        parameter.detach()
        for module in attention
        for _, parameter in sorted(module.named_parameters())
        if parameter.dim() >= 2
    ]
    if not weights or any(weight.is_meta or hasattr(weight, "to_local") or not weight.numel() for weight in weights):
        return None
    signs = torch.cat([_signs(weight).cpu() for weight in weights])
    return "sha256:" + hashlib.sha256(bytes(signs.to(torch.uint8).tolist())).hexdigest()


def _signs(weight: Tensor) -> Tensor:
    """Of up to 1024 values of a weight, evenly spaced: bool; of packed integers the last bit."""
    flat = weight.reshape(-1)
    number = min(_SAMPLES, flat.numel())
    values = flat[torch.arange(number, device=flat.device) * flat.numel() // number]
    return torch.signbit(values.float()) if values.is_floating_point() else values % 2 == 1
