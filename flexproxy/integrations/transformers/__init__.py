"""flexproxy in transformers: ``attn_implementation="flexproxy"`` for any decoder of 4.53 and later.

    import flexproxy.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flexproxy")

Importing this module registers the name with ``AttentionInterface`` and ``AttentionMaskInterface``, and changes nothing
else. Long prompts are then prefilled sparsely (docs/transformers.md says what stays dense); ``configure`` sets how, for
the model or for single layers.
"""

from __future__ import annotations

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        'transformers: expected to be installed, got nothing; use pip install "flexproxy[transformers]"',
        name="transformers",
    ) from error
except ImportError as error:
    import transformers

    raise ImportError(
        "transformers: expected 4.53 or later, which lets others register an attention and its mask, got "
        f'{transformers.__version__}; use pip install --upgrade "transformers>=4.53"',
        name="transformers",
    ) from error

from flexproxy.integrations.transformers.attention import attention_forward
from flexproxy.integrations.transformers.masks import forward_mask
from flexproxy.integrations.transformers.observing import record_selections
from flexproxy.integrations.transformers.settings import configuration, configure, save_configuration

__all__ = ["NAME", "configuration", "configure", "record_selections", "save_configuration"]

NAME = "flexproxy"
"""What the attention is called inside transformers."""

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, forward_mask)
