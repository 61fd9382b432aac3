"""What is compared: inputs of one shape, dense attention of PyTorch, and flex_attention with each kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from benchmarks.baselines.blocks import BLOCK_SIZE, causal_blocks
from flexproxy import ProxyConfig, masks
from flexproxy.ops import compat
from flexproxy.sparse.kernel import run_compiled
from flexproxy.sparse.plan import plan_attention
from flexproxy.stages.lists import compile_block_mask

BATCH, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 1, 32, 8, 128
SHAPE = f"bf16, B {BATCH}, Hq {NUM_Q_HEADS}, Hkv {NUM_KV_HEADS}, D {HEAD_DIM}, causal"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normal random q ``[1, 32, S, 128]``, k and v ``[1, 8, S, 128]``, bf16, on the GPU.

    Times depend on the number of blocks that are kept, which is set, and hardly on which blocks these are.
    """
    torch.manual_seed(length)

    def tensor(heads: int) -> Tensor:
        return torch.randn(BATCH, heads, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    return tensor(NUM_Q_HEADS), tensor(NUM_KV_HEADS), tensor(NUM_KV_HEADS)


def sdpa(backend: SDPBackend) -> Attention:
    """Dense causal attention of one backend, and of no other."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


cudnn, flash_attention_2 = sdpa(SDPBackend.CUDNN_ATTENTION), sdpa(SDPBackend.FLASH_ATTENTION)


def flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, options: dict[str, Any]) -> Tensor:
    """Compiled ``flex_attention``, as ``flexproxy.attention`` calls it where it does."""
    out: Tensor = run_compiled(q, k, v, block_mask=block_mask, enable_gqa=True, kernel_options=options)
    return out


def causal_block_mask(length: int, device: torch.device) -> BlockMask:
    """Dense causal attention for ``flex_attention``: one map of blocks for all heads."""
    every = causal_blocks(-(-length // BLOCK_SIZE), device)
    below = every.tril(-1)
    return compile_block_mask(every[None, None], below[None, None], masks.causal, BLOCK_SIZE, (length, length), False)


@contextmanager
def without_flash() -> Iterator[None]:
    """As if flash-attn-4 were not installed; without the plans that were made while it was."""
    plans = mock.patch.dict(plan_attention.plans, clear=True)
    with mock.patch.object(compat, "flash_backend_exists", return_value=False), plans:
        yield


def kernel_variants() -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Ways to run ``flex_attention``, each the context that brings ``flexproxy.attention`` to it.

    "default" is flexproxy's choice, "triton" its choice without flash-attn-4.
    """
    variants: dict[str, Callable[[], AbstractContextManager[Any]]] = {"default": nullcontext}
    if compat.flash_backend_exists():
        variants["triton"] = without_flash
    return variants


def budget_for(density: float, length: int, block_size: int = BLOCK_SIZE) -> int:
    """``min_budget`` in tokens that does not stand in the way of a density: at most 2048, the paper's.

    c blocks in every causal row of N are a density of about ``1 - (1 - c / N)^2``.
    """
    blocks = math.floor(-(-length // block_size) * (1 - math.sqrt(1 - density)))
    return min(2048, max(1, blocks) * block_size)


def config_for(density: float, length: int, num_proxies: int | None = None) -> ProxyConfig:
    """The defaults but for the density, and a ``min_budget`` that allows it."""
    return ProxyConfig(density=density, num_proxies=num_proxies, min_budget=budget_for(density, length))
