"""The settings of a model's layers: set, kept on its attention modules, read back, written to a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from flexproxy import ProxyConfig
from flexproxy.checks import check_when
from flexproxy.config import changed_fields, read_settings
from flexproxy.files import replacing
from flexproxy.integrations.common import ranges, share_of_rank
from flexproxy.sparse.plan import When
from flexproxy.stages.proxy import head_groups

Settings: TypeAlias = "ProxyConfig | Mapping[int, ProxyConfig] | str | os.PathLike[str]"

_ATTRIBUTE, _WHEN = "flexproxy_config", "flexproxy_when"
_DEFAULT = ProxyConfig()
_SHAPE = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")


def configure(model: PreTrainedModel, settings: Settings, *, when: When = "auto") -> None:
    """Set how the layers of a model select their blocks. Layers that are not set have ``ProxyConfig()``.

    The settings are kept on the model's attention modules: they are copied with it, and another model of the same
    class has its own. ``save_pretrained`` does not write them; ``save_configuration`` does. They can be changed at any
    time, before or after ``set_attn_implementation("flexproxy")``. With tensor parallelism they are those of the whole
    model; every rank takes its share.

    Args:
        model: a model whose attention goes through transformers' ``AttentionInterface``.
        settings: one ProxyConfig for all layers; or a ProxyConfig for each of some layers, by index, where the others
            keep theirs; or a file that ``save_configuration`` or ``flexproxy calibrate`` wrote.
        when: "auto", or "always" for sparse prefills in the layers that are set whatever they cost, as in
            ``flexproxy.attention``; for measuring what is too short to gain. It is not saved.

    Raises:
        TypeError: ``model``, ``settings``, or the index of a layer has another type.
        ValueError: the model has no such attention, there is no such layer, the settings do not fit the heads, or the
            file is damaged or was made for a model of another shape, or ``when`` is something else. Nothing is set
            then.
    """
    check_when(when)
    layers = attention_layers(model)
    if isinstance(settings, (str, os.PathLike)):
        data, by_layer = read_settings(settings, "settings")
        _check_shape(model, data.get("model"), settings)
        settings = by_layer
    if isinstance(settings, ProxyConfig):
        settings = dict.fromkeys(layers, settings)
    if not isinstance(settings, Mapping):
        raise TypeError(
            f"settings: expected a ProxyConfig, a dict of them by layer, or the path of a file, got "
            f"{type(settings).__name__}; use for example configure(model, ProxyConfig(gamma=0.9))"
        )
    for index, config in settings.items():
        if not isinstance(index, int):
            raise TypeError(
                f"settings: expected layers by number, got {index!r} of type {type(index).__name__}; use for example "
                "{0: ProxyConfig(gamma=0.9)}"
            )
        if index not in layers:
            raise ValueError(
                f"settings: expected layers among {ranges(layers)}, got {index!r}; the others have no causal "
                "self-attention"
            )
        if not isinstance(config, ProxyConfig):
            raise TypeError(
                f"settings: expected a ProxyConfig for layer {index}, got {type(config).__name__}; use for example "
                f"{{{index}: ProxyConfig(gamma=0.9)}}"
            )
        for module in layers[index]:
            _check_heads(module, config)
    for index, config in settings.items():
        for module in layers[index]:
            setattr(module, _ATTRIBUTE, config)
            setattr(module, _WHEN, when)


def configuration(model: PreTrainedModel) -> dict[int, ProxyConfig]:
    """The settings of every layer with causal self-attention, by its index.

    Raises:
        TypeError, ValueError: as ``configure``.
    """
    return {index: config_of(modules[0]) for index, modules in attention_layers(model).items()}


def save_configuration(model: PreTrainedModel, path: str | os.PathLike[str]) -> None:
    """Write the settings of a model as JSON, for ``configure(model, path)`` on a model of the same shape.

    A file that exists is replaced.

    Raises:
        TypeError, ValueError: as ``configure``; or nothing can be written to ``path``.
        OSError: writing failed; the old file, if any, is unchanged.
    """
    layers = {str(index): changed_fields(config) for index, config in configuration(model).items()}
    text = json.dumps({"flexproxy": 1, "model": shape_of(model), "layers": layers}, indent=1) + "\n"
    with replacing(path) as unfinished:
        unfinished.write_text(text)


def shape_of(model: PreTrainedModel) -> dict[str, Any]:
    """What decides whether a file of settings fits a model."""
    config: Any = model.config.get_text_config()
    return {name: getattr(config, name, None) for name in _SHAPE}


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that a model is made for; None if it does not say."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions


def config_of(module: nn.Module) -> ProxyConfig:
    """The settings of one attention module, those of the whole model."""
    config: ProxyConfig = getattr(module, _ATTRIBUTE, _DEFAULT)
    return config


def when_of(module: nn.Module) -> When:
    """When one attention module is sparse."""
    when: When = getattr(module, _WHEN, "auto")
    return when


def local_config(module: nn.Module, num_heads: int) -> ProxyConfig:
    """The settings for the query heads that this process has of a layer.

    Raises:
        ValueError: the proxies do not divide over the ranks.
    """
    config = config_of(module)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return config
    return _share(module, config, num_heads)


def is_decoder_attention(module: nn.Module) -> bool:
    """Whether a module is the causal self-attention of a layer, and calls transformers' ``AttentionInterface``."""
    if not isinstance(getattr(module, "layer_idx", None), int) or not getattr(module, "is_causal", False):
        return False
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    return any(hasattr(file, "ALL_ATTENTION_FUNCTIONS") for file in files)


def attention_layers(model: Any) -> dict[int, list[nn.Module]]:
    """The attention modules by layer; several for an index where a model has several decoders."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a model of transformers, got {type(model).__name__}; pass what from_pretrained returned, "
            "not a wrapper of it"
        )
    layers: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if is_decoder_attention(module):
            layers.setdefault(int(module.layer_idx), []).append(module)  # type: ignore[arg-type]
    if not layers:
        raise ValueError(
            f"model: expected one with causal self-attention through transformers' AttentionInterface, got "
            f"{type(model).__name__}, which has none; it can only use the attention that it was written with"
        )
    return dict(sorted(layers.items()))


def all_modules(layers: Mapping[int, list[nn.Module]]) -> list[nn.Module]:
    """The attention modules of all layers, in order."""
    return [module for modules in layers.values() for module in modules]


def _check_shape(model: PreTrainedModel, made_for: Any, path: str | os.PathLike[str]) -> None:
    shape = shape_of(model)
    found = {name: made_for.get(name) for name in _SHAPE} if isinstance(made_for, dict) else made_for
    if found != shape:
        raise ValueError(
            f"settings: expected a file for {shape}, got {path} for {found}; calibrate this model, or configure it "
            "with a ProxyConfig"
        )


def _check_heads(module: nn.Module, config: ProxyConfig) -> None:
    shape: Any = getattr(module, "config", None)
    q_heads, kv_heads = (getattr(shape, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(q_heads, int):
        head_groups(config.num_proxies, config.groups, q_heads, kv_heads if isinstance(kv_heads, int) else q_heads)


def _share(module: nn.Module, config: ProxyConfig, num_heads: int) -> ProxyConfig:
    """The part of a configuration that belongs to this tensor-parallel rank, which has ``num_heads`` query heads."""
    from torch.distributed.tensor import DTensor

    shape = getattr(module, "config", None)
    total = getattr(shape, "num_attention_heads", num_heads)
    sharded = next((p for p in module.parameters() if isinstance(p, DTensor)), None)
    if sharded is None or total == num_heads:
        return config
    mesh = sharded.device_mesh
    kv_heads = getattr(shape, "num_key_value_heads", None) or total
    return share_of_rank(config, mesh.get_local_rank(mesh.ndim - 1), total // num_heads, total, kv_heads)
