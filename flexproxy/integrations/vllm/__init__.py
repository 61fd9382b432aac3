"""flexproxy in vLLM: an attention backend that prefills long prompts sparsely.

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"flexproxy": {"density": 0.15}}'

vLLM calls ``register`` by itself in each of its processes, by the entry point ``vllm.general_plugins``. See
docs/serving.md.
"""

from __future__ import annotations

import logging

from flexproxy.integrations.vllm.versions import why_unsupported

__all__ = ["register"]

SPARSE = "flexproxy.integrations.vllm.flash_attention.Backend"
DENSE = "flexproxy.integrations.vllm.dense.Backend"
"""The class that vLLM loads where the backend CUSTOM is selected; the latter for versions that are not supported."""


def register() -> None:
    """Register the backend CUSTOM with vLLM. May be called again; imports nothing that vLLM has not imported."""
    import vllm

    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError:  # an exception would end vLLM, also for those who do not ask for the backend
        logging.getLogger("vllm").warning("flexproxy: no backend in vLLM %s, which has no registry", vllm.__version__)
        return
    unsupported = why_unsupported(vllm.__version__) is not None
    register_backend(AttentionBackendEnum.CUSTOM, DENSE if unsupported else SPARSE)
