"""The options of ``flex_attention`` that run fastest here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexproxy.checks import check_queries_and_keys
from flexproxy.masks.structure import Structure
from flexproxy.ops import compat
from flexproxy.sparse.kernel import flash_lse_factor

# `python -m benchmarks.bench_tiles` measures these beside others.
_COPY_ENGINE = {"USE_TMA": True, "BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}


def kernel_options(q: Tensor, k: Tensor) -> dict[str, Any]:
    """The fastest options that this device, dtype and installed packages can run, for ``flex_attention``.

    ``BACKEND="FLASH"`` where the package flash-attn-4 is importable and the shapes fit it; else Triton's kernel with
    the copy engine, and the largest tiles whose shared memory has room for a mask with a table, on Hopper GPUs; else
    what torch itself chooses. They are made for blocks of 128, and for inference: where gradients are needed, torch
    chooses. FLASH does not compile with a ``mask_mod`` that captures a tensor of shape [] (torch 2.11); give such
    numbers the shape [B].

    Args:
        q: queries ``[B, Hq, Sq, D]``.
        k: keys ``[B, Hkv, Skv, D]``.

    Returns:
        Options for ``flex_attention(kernel_options=...)``; empty where torch's own choice is the best there is.
    """
    check_queries_and_keys(q, k)
    return fastest(q, torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))[0]


def fastest(q: Tensor, gradients: bool) -> tuple[dict[str, Any], str]:
    """``kernel_options``, and why it is these, for people to read. Fixed texts, for ``attention`` may be traced."""
    problem = _why_torchs_own(q, gradients)
    if problem is not None:
        return {}, problem
    if q.shape[3] not in (64, 96, 128):
        return dict(_COPY_ENGINE), "the copy engine, for FLASH is for head dimensions 64, 96 and 128"
    if not compat.flash_backend_exists():
        return dict(_COPY_ENGINE), (
            "the copy engine, for flash-attn-4, or this torch's backend for it, is not installed "
            '(pip install --pre "flexproxy[flash]")'
        )
    return {"BACKEND": "FLASH"}, "flash-attn-4 is installed, and dtype and shape fit it"


def _why_torchs_own(q: Tensor, gradients: bool) -> str | None:
    """Why torch's own options are the best there are; None where others are. Only Hopper GPUs have been measured: what
    fits one of them may fail to compile on another."""
    if not q.is_cuda:
        return "not a CUDA device"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return "others are for float16 and bfloat16"
    if not compat.is_hopper(q.device):
        return "others are for Hopper GPUs (compute capability 9.0)"
    if q.shape[2] < 128:
        return "there are fewer than 128 queries"
    if gradients:
        return "where gradients are needed, torch chooses"
    return "others are for head dimensions up to 128" if q.shape[3] > 128 else None


def options_for(
    q: Tensor,
    num_keys: int,
    mask: Structure | None,
    block_size: int,
    gradients: bool,
    *,
    membership: bool,
    has_score_mod: bool,
    lse: bool,
) -> dict[str, Any]:
    """``kernel_options`` for a certain mask of certain blocks, as ``attention`` runs it.

    Args:
        mask: what is known of the caller's mask; None is the default mask.
        block_size: tiles must divide the blocks.
        gradients: they are needed.
        membership: the ``mask_mod`` looks up which blocks are kept.
        has_score_mod: there is a ``score_mod``; what it captures is not known.
        lse: the log-sum-exp is wanted.
    """
    options, _ = fastest(q, gradients)
    if block_size != 128 or not options:
        return tiles_of(block_size, q.device.type)
    tables = () if mask is None else mask.tables
    known = mask is None or mask.clauses is not None
    if "BACKEND" in options:
        # Its compiler (torch 2.11) fails on numbers in tensors without a dimension, which unknown functions may hold.
        compiles = known and not has_score_mod and all(table.value.dim() for table in tables)
        if compiles and not (lse and flash_lse_factor(q.device) is None):
            return options
        options = dict(_COPY_ENGINE)
    by_token = any(table.value.dim() > table.per_sequence for table in tables) or membership
    if known and not has_score_mod and not by_token:
        options["num_stages"] = 3  # without tables to look up, shared memory has room for one more
    if q.shape[2] % 128 == 0 and num_keys % 128 == 0:
        # Said because torch does not see it where lengths are dynamic, and then has every index checked.
        options["IS_DIVISIBLE"] = True
    return options


def tiles_of(block_size: int, device_type: str) -> dict[str, Any]:
    """Tiles for blocks of less than 128, for which torch's own choice is too large; the last four: for gradients."""
    if block_size >= 128 or device_type == "cpu":  # the CPU kernel has no such tiles
        return {}
    return dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), block_size)
