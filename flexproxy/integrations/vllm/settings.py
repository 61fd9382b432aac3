"""The settings of a server, from ``--additional-config '{"flexproxy": {...}}'``. Nothing here imports vLLM."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from flexproxy.config import ProxyConfig, read_settings
from flexproxy.sparse.plan import When

KEY = "flexproxy"
"""The key of the settings in vLLM's additional config."""
_PLACE = f'additional_config["{KEY}"]'
_EXAMPLE = '{"gamma": 0.9}'

_FIELDS = tuple(field.name for field in fields(ProxyConfig))
_NAMES = (*_FIELDS, "calibration", "layers", "when")
# Where a layer sets the former, it does not inherit the latter, which would take its place.
_REPLACES = {"gamma": "density", "num_proxies": "groups"}


@dataclass(frozen=True)
class Settings:
    """What a server asks for.

    Attributes:
        default: the settings of layers that have none of their own.
        layers: those of single layers, by index.
        when: "auto", or "always" for sparse attention whatever it costs, as in ``flexproxy.attention``.
        model: the model that the calibration was made for, as its file has it; None without one.
    """

    default: ProxyConfig = field(default_factory=ProxyConfig)
    layers: Mapping[int, ProxyConfig] = field(default_factory=dict)
    when: When = "auto"
    model: Mapping[str, Any] | None = None

    def of(self, layer: int) -> ProxyConfig:
        """The settings of a layer, those of the whole model."""
        return self.layers.get(layer, self.default)

    def check_model(self, shape: object, num_layers: int) -> None:
        """Check that the settings are for a model.

        Args:
            shape: has the model's sizes by the names of a Hugging Face configuration.

        Raises:
            ValueError: there is no such layer, or the calibration was made for another model.
        """
        if beyond := [layer for layer in self.layers if layer >= num_layers]:
            raise ValueError(f'{_PLACE}["layers"]: expected layers from 0 to {num_layers - 1}, got {beyond[0]}')
        wanted = {name: value for name, value in (self.model or {}).items() if name != "weights"}
        found = {name: getattr(shape, name, None) for name in wanted}
        if found != wanted:
            raise ValueError(f'{_PLACE}["calibration"]: expected a file for {found}, got {wanted}; calibrate anew')


def parse(additional_config: object) -> Settings:
    """The settings in vLLM's additional config.

    Under the key ``"flexproxy"``: fields of ``ProxyConfig`` for all layers; ``"layers"``, by index, with the fields in
    which a layer differs from those; ``"calibration"``, a file of ``flexproxy calibrate`` or ``save_configuration``,
    whose layers those fields do not change, but ``"layers"`` do; ``"when"``.

    Raises:
        ValueError: something is misspelt or out of range; a message of one line.
    """
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if given is None:
        return Settings()
    if not isinstance(given, Mapping):
        raise ValueError(f"{_PLACE}: expected settings by name, got {given!r}; use for example {_EXAMPLE}")
    _check_names(given, _NAMES, "")
    when = given.get("when", "auto")
    if when not in get_args(When):
        raise ValueError(f'{_PLACE}["when"]: expected "auto" or "always", got {when!r}; leave it out for "auto"')
    common = {name: given[name] for name in _FIELDS if name in given}
    default = _config(common, "")
    data, layers = _read_calibration(given.get("calibration"))
    own = given.get("layers", {})
    if not isinstance(own, Mapping):
        raise ValueError(
            f'{_PLACE}["layers"]: expected settings by layer, got {own!r}; use for example {{"0": {_EXAMPLE}}}'
        )
    for index, values in own.items():
        if not str(index).isdecimal():
            raise ValueError(f'{_PLACE}["layers"]: expected layers by number, got {index!r}; write "0", "1" and so on')
        where = f'["layers"]["{index}"]'
        if not isinstance(values, Mapping):
            raise ValueError(f"{_PLACE}{where}: expected settings by name, got {values!r}; use for example {_EXAMPLE}")
        _check_names(values, _FIELDS, where)
        base = layers.get(int(index))
        inherited = common if base is None else {name: getattr(base, name) for name in _FIELDS}
        replaced = {_REPLACES[name] for name in values if name in _REPLACES}
        kept = {name: value for name, value in inherited.items() if name not in replaced}
        layers[int(index)] = _config(kept | dict(values), where)
    return Settings(default, layers, when, data)


def _read_calibration(path: object) -> tuple[Mapping[str, Any] | None, dict[int, ProxyConfig]]:
    if path is None:
        return None, {}
    if not isinstance(path, str):
        raise ValueError(f'{_PLACE}["calibration"]: expected the path of a file, got {path!r}; pass a string')
    data, layers = read_settings(path, _PLACE + '["calibration"]')
    if data.get("share"):
        raise ValueError(
            f'{_PLACE}["calibration"]: expected no "share" in {path}, for here every layer selects its own'
        )
    model = data.get("model")
    return (model if isinstance(model, Mapping) else None), layers


def _config(values: Mapping[str, Any], where: str) -> ProxyConfig:
    try:
        return ProxyConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_PLACE}{where}: expected settings of ProxyConfig; {error}") from error


def _check_names(given: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for name in given:
        if name not in allowed:
            close = difflib.get_close_matches(str(name), allowed, 1)
            remedy = f"did you mean {close[0]!r}?" if close else f"use some of {', '.join(allowed)}"
            raise ValueError(f"{_PLACE}{where}: expected names of settings, got {name!r}; {remedy}")
