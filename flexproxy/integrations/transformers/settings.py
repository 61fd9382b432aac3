"""The settings of a model's layers: set, kept on its attention modules, read back, written to a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from flexproxy import ProxyConfig
from flexproxy.checks import check_when
from flexproxy.config import changed_fields, read_settings
from flexproxy.files import write_json
from flexproxy.integrations.common import ranges, share_of_rank
from flexproxy.sparse.plan import When
from flexproxy.stages.proxy import head_groups

Settings: TypeAlias = "ProxyConfig | Mapping[int, ProxyConfig] | str | os.PathLike[str]"

_ATTRIBUTE, _WHEN, _SHARING = "flexproxy_config", "flexproxy_when", "flexproxy_sharing"
_DEFAULT = ProxyConfig()
_SHAPE = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")


class Sharing(NamedTuple):
    """Of a layer whose selection others use, and of these.

    source: the layer that selects. last: no layer after this one uses the selection.
    """

    source: int
    last: bool


def configure(
    model: PreTrainedModel, settings: Settings, *, when: When = "auto", share: Mapping[int, int] | None = None
) -> None:
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
        share: layers that select nothing, each with the earlier layer whose blocks it attends to, head by head, and
            whose settings it gets: ``{1: 0, 3: 2}`` saves every second estimate. The other layers that are set select
            their own. None is what the file says, and without one, none.

    Raises:
        TypeError: ``model``, ``settings``, ``share``, or the index of a layer has another type.
        ValueError: the model has no such attention, there is no such layer, the settings do not fit the heads, or the
            file is damaged or was made for a model of another shape, or ``when`` is something else, or layers cannot
            share. Nothing is set then.
    """
    check_when(when)
    layers = attention_layers(model)
    if isinstance(settings, (str, os.PathLike)):
        data, by_layer = read_settings(settings, "settings")
        _check_shape(model, data.get("model"), settings)
        share = _share_of_file(data, settings) if share is None else share
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
    configs = {index: config_of(modules[0]) for index, modules in layers.items()} | dict(settings)
    sources = _check_share({} if share is None else share, settings, configs, layers)
    for index, modules in layers.items():
        source = sources.get(index, index)
        last = max((layer for layer, other in sources.items() if other == source), default=None)
        for module in modules:
            setattr(module, _ATTRIBUTE, configs[source])
            setattr(module, _WHEN, when if source in settings else when_of(layers[source][0]))
            setattr(module, _SHARING, None if last is None else Sharing(source, index == last))


def configuration(model: PreTrainedModel) -> dict[int, ProxyConfig]:
    """The settings of every layer of ``model`` with causal self-attention, by its index.

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
    data: dict[str, Any] = {"flexproxy": 1, "model": shape_of(model), "layers": layers}
    if sources := _sources(attention_layers(model)):
        data["share"] = sources
    write_json(path, data)


@contextmanager
def settings_kept(model: PreTrainedModel) -> Iterator[None]:
    """Whatever is set inside of a ``with`` statement, the model has its own settings afterwards."""
    names = _ATTRIBUTE, _WHEN, _SHARING
    modules = all_modules(attention_layers(model))
    before = [{name: vars(module)[name] for name in names if name in vars(module)} for module in modules]
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(own)


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


def sharing_of(module: nn.Module) -> Sharing | None:
    """Whose selection one attention module uses, and whether others use it."""
    sharing: Sharing | None = getattr(module, _SHARING, None)
    return sharing


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


def _sources(layers: Mapping[int, list[nn.Module]]) -> dict[int, int]:
    """The layers that use the selection of another, which is the value."""
    sharing = {index: sharing_of(modules[0]) for index, modules in layers.items()}
    return {index: x.source for index, x in sharing.items() if x is not None and x.source != index}


def _share_of_file(data: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[int, int]:
    share = data.get("share", {})
    if not isinstance(share, dict) or not all(key.isdecimal() for key in share):
        raise ValueError(f'settings: expected layers by number as "share" in {path}, got {share!r}; use {{"1": 0}}')
    return {int(key): source for key, source in share.items()}


def _check_share(
    share: Any,
    settings: Mapping[int, ProxyConfig],
    configs: Mapping[int, ProxyConfig],
    layers: Mapping[int, list[nn.Module]],
) -> dict[int, int]:
    """The layers that will use the selection of another, which is the value. configs: of all layers."""
    if not isinstance(share, Mapping) or not all(type(index) is int for pair in share.items() for index in pair):
        raise TypeError(f"share: expected layers by number, each with an earlier one, got {share!r}; use {{1: 0}}")
    others = {layer: x for layer, x in _sources(layers).items() if layer not in settings and layer not in share}
    sources = dict(share) | others
    for layer, source in sources.items():
        pair = f"{{{layer}: {source}}}"
        if source not in layers or (layer in share and layer not in settings):
            raise ValueError(
                f"share: expected layers among those that are set, {ranges(settings)}, with some of {ranges(layers)}, "
                f"got {pair}; give layer {layer} settings, or leave it out"
            )
        if source >= layer or source in sources:
            raise ValueError(
                f"share: expected an earlier layer that selects its own blocks, got {pair}; let layers share with "
                "the first of them"
            )
        kinds: Any = getattr(getattr(layers[layer][0], "config", None), "layer_types", None)
        if kinds and kinds[layer] != kinds[source]:
            raise ValueError(
                f"share: expected layers with the same kind of mask, got {pair}, {kinds[layer]} and {kinds[source]}; "
                "share between layers of one kind"
            )
        if configs[layer].keeps_all or configs[source].keeps_all:
            raise ValueError(
                f"share: expected layers that are sparse, got {pair} with settings that keep every block; leave it "
                "out, or set a density"
            )
    return sources


def _check_heads(module: nn.Module, config: ProxyConfig) -> None:
    shape: Any = getattr(module, "config", None)
    q_heads, kv_heads = (getattr(shape, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(q_heads, int):
        head_groups(config, q_heads, kv_heads if isinstance(kv_heads, int) else q_heads)


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
