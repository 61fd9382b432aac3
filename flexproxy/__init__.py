"""flexproxy: ProxyAttn masks for FlexAttention.

flex_attention(q, k, v, block_mask=flexproxy.build(q, k), enable_gqa=True)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flexproxy import masks
from flexproxy.attention import attention
from flexproxy.block_mask import and_block_masks
from flexproxy.config import ProxyConfig
from flexproxy.kernel_options import kernel_options
from flexproxy.pipeline import build, select
from flexproxy.selection import Selection

if TYPE_CHECKING:
    from flexproxy.recording import record

__version__ = "0.1.0"

__all__ = [
    "ProxyConfig",
    "Selection",
    "and_block_masks",
    "attention",
    "build",
    "kernel_options",
    "masks",
    "record",
    "select",
]

_LAZY = {"record": "flexproxy.recording"}  # imported when they are first used: they need more than torch and einops


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
