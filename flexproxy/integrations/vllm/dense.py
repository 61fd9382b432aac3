"""The backend CUSTOM where flexproxy is not for this version of vLLM: FlashAttention, and a warning."""

from __future__ import annotations

from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

from flexproxy.integrations.vllm.versions import why_unsupported

logger = init_logger(f"vllm.{__name__}")


class Backend(FlashAttentionBackend):
    """FlashAttention, as it is."""

    @staticmethod
    def get_impl_cls() -> Any:
        logger.warning_once("flexproxy: all attention stays dense: %s", why_unsupported(vllm.__version__))
        return FlashAttentionImpl
