"""flexproxy in vLLM: an attention backend that prefills long prompts sparsely.

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"flexproxy": {"density": 0.15}}'

vLLM calls ``register`` by itself in each of its processes, by the entry point ``vllm.general_plugins``. See
docs/serving.md.
"""

from __future__ import annotations

__all__ = ["register"]

BACKEND = "flexproxy.integrations.vllm.flash_attention.Backend"
"""The class that vLLM loads where the backend CUSTOM is selected."""


def register() -> None:
    """Register the backend CUSTOM with vLLM. May be called again; loads nothing that vLLM has not loaded."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
