"""flexproxy: ProxyAttn masks for FlexAttention.

flex_attention(q, k, v, block_mask=flexproxy.build(q, k), enable_gqa=True)
"""

from flexproxy import masks
from flexproxy.attention import attention
from flexproxy.block_mask import and_block_masks
from flexproxy.config import ProxyConfig
from flexproxy.kernel_options import kernel_options
from flexproxy.pipeline import build, select
from flexproxy.selection import Selection

__version__ = "0.1.0"

__all__ = [
    "ProxyConfig",
    "Selection",
    "and_block_masks",
    "attention",
    "build",
    "kernel_options",
    "masks",
    "select",
]
