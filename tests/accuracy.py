"""The measure of a result: dense attention in double precision, and PyTorch's own error in the same dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexproxy import Selection, reference
from flexproxy.masks.structure import MaskMod


def assert_accurate(out: Tensor, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None = None) -> None:
    """``out [B, Hq, Sq, D]`` is dense attention under ``allowed [B, Hq, Sq, Skv]``.

    Its error is at most twice that of SDPA in the same dtype, plus one rounding of the largest value.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact = reference.attention(q, k, v, allowed, scale)
    sdpa = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    sdpa = torch.where(allowed.any(-1, keepdim=True), sdpa, 0.0)
    assert out.shape == exact.shape
    error, own_error = ((x.double() - exact).abs().max().item() for x in (out, sdpa))
    rounding = torch.finfo(q.dtype).eps * exact.abs().max().item()
    assert error <= 2 * own_error + rounding, f"error {error:.3g}, that of SDPA {own_error:.3g}"


def allowed_pairs(selection: Selection, mask_mod: MaskMod, num_queries: int, num_keys: int, block_size: int) -> Tensor:
    """The token pairs of a selection, bool ``[B, Hq, Sq, Skv]``: its blocks spread over tokens, and the mask."""
    blocks = selection.block_map()
    tokens = blocks.repeat_interleave(block_size, 2)[:, :, :num_queries]
    tokens = tokens.repeat_interleave(block_size, 3)[..., :num_keys]
    batch, heads = blocks.shape[:2]
    mask = reference.token_mask(mask_mod, batch, heads, num_queries, num_keys, str(blocks.device))
    return tokens & mask


def cpu_kernel_exists() -> bool:
    """Whether this torch compiles ``flex_attention`` for a CPU (2.6 and later)."""
    return find_spec("torch._inductor.codegen.cpp_flex_attention_template") is not None


def eagerly() -> AbstractContextManager[None]:
    """Compiled functions run as they are written, as with ``set_stance``; skips where this torch has no such switch."""
    if not hasattr(torch.compiler, "set_stance"):  # before 2.6
        pytest.skip("this torch cannot switch compilation off for a while")
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def skip_unless_flex_compiles(device: str) -> None:
    """Skip where this torch has no compiled ``flex_attention`` for the device: a CPU before torch 2.6."""
    if device == "cpu" and not cpu_kernel_exists():
        pytest.skip("this torch compiles no flex_attention for a CPU")
