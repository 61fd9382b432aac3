"""The backend CUSTOM: vLLM's FlashAttention, with sparse prefills of long prompts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.selector import AttentionSelectorConfig

from flexproxy.integrations.vllm.sparse import SparseBuilder, SparseLayer
from flexproxy.sparse.ragged import Keys, Paged

logger = init_logger(f"vllm.{__name__}")


class Builder(SparseBuilder, FlashAttentionMetadataBuilder):
    """Metadata of FlashAttention, with the sparse requests of a step."""


class Layer(SparseLayer, FlashAttentionImpl):
    """FlashAttention, but for long prefills."""

    def keys_of(self, layer: Any, kv_cache: Tensor, table: Tensor) -> Keys:
        """The cache is ``[pages, Hkv, page_size, 2 * D]``, of whatever strides."""
        return Paged(kv_cache.transpose(1, 2), table)


class Backend(FlashAttentionBackend):
    """FlashAttention's layouts and abilities, and its name, which vLLM looks up among those that it knows."""

    # The backend that vLLM chooses by itself for the layers that were last asked about, if these are not for ours.
    _instead: tuple[str, str] | None = None

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return FlashAttentionImpl if _stays_dense() else Layer

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return FlashAttentionMetadataBuilder if _stays_dense() else Builder

    @classmethod
    def validate_configuration(cls, **configuration: Any) -> list[str]:
        """Why FlashAttention cannot serve some layers: never, as another backend then takes its place.

        vLLM asks this about a backend that was asked for, and then, if there is no reason against it, for its full
        name: there the other is named.
        """
        reasons: list[str] = super().validate_configuration(**configuration)
        cls._instead = None
        if reasons:
            asked = {name: value for name, value in configuration.items() if name != "device_capability"}
            path = current_platform.get_attn_backend_cls(None, attn_selector_config=AttentionSelectorConfig(**asked))
            module, _, name = path.rpartition(".")
            cls._instead = module, name
            logger.warning_once(
                "flexproxy: some layers stay dense, by %s of vLLM, for FlashAttention cannot serve them: %s",
                name,
                ", ".join(reasons),
            )
        return []

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        instead, cls._instead = cls._instead, None
        return instead or super().full_cls_name()


def _stays_dense() -> bool:
    """Whether nothing is sparse on this platform, which the log then says."""
    if current_platform.is_cuda():
        return False
    name = current_platform.device_name
    logger.warning_once("flexproxy: all attention stays dense: it is for NVIDIA GPUs, and this is %s", name)
    return True
