"""flexproxy: ProxyAttn masks for FlexAttention.

flex_attention(q, k, v, block_mask=flexproxy.build(q, k), enable_gqa=True)
"""

import importlib
from typing import TYPE_CHECKING, Any

from flexproxy import masks
from flexproxy.building import build
from flexproxy.config import ProxyConfig
from flexproxy.pipeline import select
from flexproxy.selection import Selection
from flexproxy.sparse.attention import attention
from flexproxy.sparse.kernel_options import kernel_options
from flexproxy.sparse.plan import why_dense
from flexproxy.stages.lists import and_block_masks

__version__ = "0.2.0"

__all__ = [
    "ProxyConfig",
    "Selection",
    "and_block_masks",
    "attention",
    "build",
    "calibrate",
    "kernel_options",
    "masks",
    "plot",
    "record",
    "reference",
    "select",
    "stats",
    "why_dense",
]

# Imported when it is first asked for: what is not on the way to a mask, and may need more than torch and einops.
_MODULES = ("plot", "reference", "stats")
_FUNCTIONS = {"calibrate": "flexproxy.calibration", "record": "flexproxy.inspect.recording"}

if TYPE_CHECKING:
    from flexproxy import plot, reference, stats
    from flexproxy.calibration import calibrate
    from flexproxy.inspect.recording import record
else:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"flexproxy.{name}")
        if name in _FUNCTIONS:
            return getattr(importlib.import_module(_FUNCTIONS[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
