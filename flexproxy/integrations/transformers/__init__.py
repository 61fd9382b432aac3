"""flexproxy in transformers: ``attn_implementation="flexproxy"`` for any decoder of 4.53 and later.

    import flexproxy.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flexproxy")

Importing this module registers the name with ``AttentionInterface`` and ``AttentionMaskInterface``, and changes nothing
else. Long prompts are then prefilled sparsely (docs/transformers.md says what stays dense); ``configure`` sets how, for
the model or for single layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        'transformers: expected to be installed, got nothing; use pip install "flexproxy[hf]"',
        name="transformers",
    ) from error
except ImportError as error:
    import transformers

    raise ImportError(
        "transformers: expected 4.53 or later, which lets others register an attention and its mask, got "
        f'{transformers.__version__}; use pip install --upgrade "transformers>=4.53"',
        name="transformers",
    ) from error

import flexproxy
from flexproxy.integrations.transformers.attention import attention_forward
from flexproxy.integrations.transformers.masks import forward_mask
from flexproxy.integrations.transformers.settings import configuration, configure, save_configuration

if TYPE_CHECKING:
    from flexproxy.calibration import calibrate
    from flexproxy.inspect.recording import record
else:  # these are built on this module, so they are imported when they are first asked for

    def __getattr__(name: str) -> Any:
        if name in ("calibrate", "record"):
            return getattr(flexproxy, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["NAME", "calibrate", "configuration", "configure", "record", "save_configuration"]

NAME = "flexproxy"
"""What the attention is called inside transformers."""

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, forward_mask)
