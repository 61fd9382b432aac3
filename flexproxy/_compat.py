"""The differences between versions of torch, by capability. Nothing else in flexproxy looks at versions."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

_FROM_KV_BLOCKS = frozenset(inspect.signature(BlockMask.from_kv_blocks).parameters)
_FLEX_ATTENTION = frozenset(inspect.signature(flex.flex_attention).parameters)
IS_ROCM = torch.version.hip is not None
# A CPU kernel is compiled for its lengths alone, so a process that meets many lengths needs more than dynamo's 8.
MAX_COMPILED_LENGTHS = 256


def from_kv_blocks(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    full_kv_num_blocks: Tensor,
    full_kv_indices: Tensor,
    *,
    block_size: tuple[int, int],
    mask_mod: Callable[..., Tensor],
    seq_lengths: tuple[int, int],
    compute_q_blocks: bool,
) -> BlockMask:
    """``BlockMask.from_kv_blocks`` with the true lengths, and without the lists for gradients where not needed.

    torch 2.5 knows neither argument: it rounds the lengths up to whole blocks, and always makes the lists.
    """
    wanted: dict[str, Any] = {"seq_lengths": seq_lengths, "compute_q_blocks": compute_q_blocks}
    known = {name: value for name, value in wanted.items() if name in _FROM_KV_BLOCKS}
    return BlockMask.from_kv_blocks(
        kv_num_blocks,
        kv_indices,
        full_kv_num_blocks,
        full_kv_indices,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        **known,
    )


def seq_lengths_of(block_mask: BlockMask) -> tuple[int, int] | None:
    """Sq and Skv that a BlockMask was made for; None where this torch does not keep them."""
    return getattr(block_mask, "seq_lengths", None)


def lse_arguments() -> dict[str, Any]:
    """What ``flex_attention`` takes to return the log-sum-exp."""
    if "return_aux" in _FLEX_ATTENTION:
        return {"return_aux": flex.AuxRequest(lse=True)}
    return {"return_lse": True}


def lse_of(second_result: Any) -> Tensor:
    """The log-sum-exp in the second result of ``flex_attention``."""
    lse: Tensor = second_result if isinstance(second_result, Tensor) else second_result.lse
    return lse


def _flex_attention(*args: Any, **kwargs: Any) -> Any:
    # A function of our own: dynamo counts variants by function, and the caller may compile torch's.
    return flex.flex_attention(*args, **kwargs)


@functools.cache
def compiled_flex_attention(device_type: str) -> Callable[..., Any]:
    """``flex_attention``, compiled once a process; on a CPU for one set of lengths at a time.

    With dynamic shapes the CPU kernel reads a captured table wrongly, or does not compile (torch 2.13).
    """
    return torch.compile(_flex_attention, fullgraph=True, dynamic=False if device_type == "cpu" else None)


@contextlib.contextmanager
def many_lengths() -> Iterator[None]:
    """Let dynamo compile as many variants as there are lengths, for the calls inside."""
    config: Any = torch._dynamo.config  # here, not above: it is slow to import
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({name: max(MAX_COMPILED_LENGTHS, getattr(config, name))}):
        yield
