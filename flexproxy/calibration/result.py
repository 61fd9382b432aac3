"""The result of a calibration, and its file."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from typing import Any

from flexproxy.config import ProxyConfig, changed_fields, read_settings
from flexproxy.files import replacing


@dataclass(frozen=True)
class Calibration:
    """Settings for the layers of one model, and what they were chosen from.

    Attributes:
        layers: the settings of each layer, for ``configure(model, calibration.layers)``.
        model: the shape of the model.
        evidence: the target and the measurements, as plain data. ``layers[str(index)]`` has the ``divergence`` that a
            layer causes by itself at every ``density`` tried, and the density that was ``shared`` out to it;
            ``mean`` what all layers together cause: on the sequences that decided, on those that were kept aside, and
            on the latter with the same density in all layers (``uniform``). ``chosen`` is "uniform" where that was
            no worse. *Divergence* is in bits per token, from the predictions of dense attention.
        versions: of what it was made with.
    """

    layers: dict[int, ProxyConfig]
    model: dict[str, Any]
    evidence: dict[str, Any] = field(repr=False)
    versions: dict[str, str] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The content of the file, as plain data."""
        return {
            "flexproxy": 1,
            "model": self.model,
            "layers": {str(index): changed_fields(config) for index, config in self.layers.items()},
            "versions": self.versions,
            "evidence": self.evidence,
        }

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Write a file for ``configure(model, path)`` and ``ProxyConfig.load_layers(path)``, whole or not at all.

        Args:
            force: replace the file if it exists.

        Raises:
            ValueError: nothing can be written there; the message says why.
            OSError: writing failed; the old file, if any, is unchanged.
        """
        text = json.dumps(self.to_json(), indent=1)
        text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)  # a list of numbers on a line
        with replacing(path, force) as unfinished:
            unfinished.write_text(text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read back what ``save`` wrote.

        Raises:
            ValueError: there is no such file, or it is not of a calibration.
        """
        data, layers = read_settings(path, "path")
        model: Any = data.get("model")
        if "evidence" not in data:
            raise ValueError(f"path: expected a file of flexproxy calibrate, got {path}, which has settings alone")
        return cls(layers, model, data["evidence"], data.get("versions", {}))
