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


def fit_to_blocks(options: dict[str, Any], block_size: int, device_type: str) -> dict[str, Any]:
    """Options with tiles that divide a mask's blocks; torch's own are made for blocks of 128.

    The caller's options stand first. A CPU kernel has no such tiles.
    """
    if device_type == "cpu" or block_size >= 128:
        return options
    tiles = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")  # the last four: gradients
    return dict.fromkeys(tiles, block_size) | options
