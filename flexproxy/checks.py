"""Checks of what a caller passes. Each error names the argument, what was expected, what came, and the remedy."""

from __future__ import annotations

import math
from numbers import Real
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy.config import ProxyConfig
from flexproxy.masks.structure import check_mask_mod
from flexproxy.ops.compat import seq_lengths_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256


def check_queries_and_keys(q: Any, k: Any) -> None:
    _check_tensor("q", q, "[B, Hq, Sq, D]")
    _check_tensor("k", k, "[B, Hkv, Skv, D]")
    _check_like("k", k, q)
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected dtype float32, float16 or bfloat16, got {q.dtype}; convert it with .to(...)")
    if not MIN_HEAD_DIM <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(
            f"q: expected a head dimension D from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {q.shape[3]} in shape "
            f"{list(q.shape)}; is q laid out as [B, Hq, Sq, D]?"
        )
    if k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k: expected the head dimension D = {q.shape[3]} of q, got {k.shape[3]}; pass q and k of one layer"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q: expected a number of heads Hq that is a multiple of Hkv = {k.shape[1]}, got {q.shape[1]}; are q and k "
            "laid out as [B, H, S, D]?"
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"q: expected at most as many queries as keys, got Sq = {q.shape[2]} and Skv = {k.shape[2]}; pass the keys "
            "of all tokens, cached ones included"
        )


def check_values(v: Any, q: Tensor, k: Tensor) -> None:
    _check_tensor("v", v, "[B, Hkv, Skv, D]")
    _check_like("v", v, q)
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(
            f"v: expected Hkv, Skv = {list(k.shape[1:3])} as in k, got {list(v.shape[1:3])}; pass the values of the "
            "same heads and tokens"
        )


_DEFAULT_CONFIG = ProxyConfig()


def check_config(config: Any) -> ProxyConfig:
    if config is None:
        return _DEFAULT_CONFIG
    if not isinstance(config, ProxyConfig):
        raise TypeError(
            f"config: expected a flexproxy.ProxyConfig or None, got {type(config).__name__}; "
            "use for example ProxyConfig(gamma=0.9)"
        )
    return config


def check_scale(scale: Any, head_dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, (int, float, Real)):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}; pass a Python float")
    try:
        value = float(scale)
    except OverflowError:  # an int
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"scale: expected a finite number, got {scale}; None is 1 / sqrt(D)")
    return value


def check_masks(mask_mod: Any, block_mask: Any, q: Tensor, k: Tensor, block_size: int) -> None:
    if mask_mod is not None and block_mask is not None:
        raise ValueError(
            "mask_mod: expected None beside a block_mask, whose own mask_mod is the mask, got both; "
            "combine them with and_masks before create_block_mask, or with flexproxy.and_block_masks"
        )
    if mask_mod is not None:
        check_mask_function(mask_mod)
    if block_mask is not None:
        _check_block_mask(block_mask, q, k, block_size)


def check_mask_function(mask_mod: Any) -> None:
    check_mask_mod(
        "mask_mod",
        mask_mod,
        "pass it as block_mask=",
        "masks are in flexproxy.masks, those with parameters are made by a call, for example masks.padding(mask)",
    )


def check_kernel_options(kernel_options: Any) -> tuple[tuple[str, Any], ...] | None:
    """Returns their items."""
    if kernel_options is None:
        return None
    if not isinstance(kernel_options, dict):
        raise TypeError(
            f"kernel_options: expected a dict or None, got {type(kernel_options).__name__}; "
            "None takes flexproxy.kernel_options(q, k)"
        )
    return tuple(kernel_options.items())


def check_attention_options(q: Tensor, k: Tensor, v: Tensor, score_mod: type, return_lse: Any) -> None:
    """score_mod: its type."""
    if score_mod is not NoneType and not any("__call__" in vars(base) for base in score_mod.__mro__):
        raise TypeError(
            f"score_mod: expected a function of (score, b, h, q_idx, kv_idx) or None, got {score_mod.__name__}; "
            "a mask goes to mask_mod"
        )
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse: expected a bool, got {type(return_lse).__name__}; pass True or False")
    if q.device.type != "cpu":
        return
    if return_lse:
        raise ValueError(
            "return_lse: expected False on a CPU, whose kernel keeps no log-sum-exp, got True; use a GPU, or eager "
            "flex_attention with flexproxy.build(q, k)"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{name}: expected no gradients on a CPU, whose kernel has no backward pass, got a tensor that "
                "requires them; use torch.no_grad(), or a GPU"
            )


def check_when(when: Any) -> None:
    if when not in ("auto", "always"):
        raise ValueError(f'when: expected "auto" or "always", got {when!r}; "auto" is dense where sparse cannot pay')


def check_free_memory(q: Tensor, k: Tensor, config: ProxyConfig, gradients: bool) -> None:
    """Check that a BlockMask fits in the memory of its GPU that is free.

    A list has a place for every block pair of every head: with 32 heads and blocks of 128, 8 GiB at 1M tokens.
    """
    block_size, pooled = config.block_size, _pooled_bytes(q, k, config)
    needed = _mask_bytes(q, k, block_size, gradients) + pooled
    cached = torch.cuda.memory_reserved(q.device) - torch.cuda.memory_allocated(q.device)
    free = torch.cuda.mem_get_info(q.device)[0] + cached
    if needed <= free:
        return
    fitting = [
        size for size in (256, 512, 1024) if size > block_size and _mask_bytes(q, k, size, gradients) + pooled <= free
    ]
    remedy = f"use block_size={fitting[0]}" if fitting else f"use a larger block_size than {block_size}"
    raise torch.OutOfMemoryError(
        f"q, k: expected the BlockMask to fit in the memory that is free, {free / 2**30:.1f} GiB of {q.device}, got "
        f"Hq = {q.shape[1]}, Sq = {q.shape[2]}, Skv = {k.shape[2]}, which need {needed / 2**30:.1f} GiB with blocks of "
        f"{block_size}; {remedy}, or give fewer sequences or fewer queries a call (chunked prefill)"
    )


MEMORY_WORTH_ASKING = 2**30


def needs_much_memory(q: Tensor, k: Tensor, config: ProxyConfig, gradients: bool) -> bool:
    """Whether asking the driver for the memory that is free is worth its time."""
    if not q.is_cuda or torch.compiler.is_compiling():
        return False
    return _mask_bytes(q, k, config.block_size, gradients) + _pooled_bytes(q, k, config) >= MEMORY_WORTH_ASKING


def _mask_bytes(q: Tensor, k: Tensor, block_size: int, gradients: bool) -> int:
    """Two int32 lists (four for gradients) and the map of kept blocks."""
    pairs = q.shape[0] * q.shape[1] * -(-q.shape[2] // block_size) * -(-k.shape[2] // block_size)
    return pairs * (4 * (4 if gradients else 2) + 1)


def _pooled_bytes(q: Tensor, k: Tensor, config: ProxyConfig) -> int:
    """The proxy heads, which are there before it."""
    q_stride, k_stride = config.strides
    tokens = q.shape[2] // (1 if config.chooses_queries else q_stride) + k.shape[2] // k_stride
    return q.shape[0] * config.proxies(q.shape[1], k.shape[1]) * tokens * q.shape[3] * q.element_size()


def _check_tensor(name: str, x: Any, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(x).__name__}; use torch.as_tensor")
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(
            f"{name}: expected a dense tensor {shape}, got {kind}; pad it and pass mask_mod=masks.padding(...), or "
            "pack it into one sequence and pass masks.document(...)"
        )
    if x.dim() != 4:
        raise ValueError(
            f"{name}: expected a tensor {shape}, got shape {list(x.shape)}; add the missing dimensions, for example "
            "with unsqueeze(0) for one sequence"
        )
    if 0 in x.shape:
        raise ValueError(
            f"{name}: expected a tensor {shape} with no empty dimension, got shape {list(x.shape)}; leave the call out "
            "where there is nothing to attend to"
        )


def _check_like(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise TypeError(f"{name}: expected the dtype {q.dtype} of q, got {x.dtype}; convert one of them")
    if x.device != q.device:
        raise ValueError(f"{name}: expected the device {q.device} of q, got {x.device}; move one of them")
    if x.shape[0] != q.shape[0]:
        raise ValueError(
            f"{name}: expected the batch size {q.shape[0]} of q, got {x.shape[0]} in {list(x.shape)}; "
            "expand or repeat one of them"
        )


def check_rows(name: str, block_mask: BlockMask) -> None:
    """A BlockMask sliced along its queries keeps the lengths of the whole, and means something else."""
    shape = block_mask.kv_indices.shape
    if len(shape) != 4 or shape[2] < -(-block_mask.shape[-2] // block_mask.BLOCK_SIZE[0]):
        raise ValueError(
            f"{name}: expected lists [B, H, Nq, Nk] with a row for every query block, got {list(shape)}; slice only "
            "the batch and the heads of a mask"
        )


def _check_block_mask(block_mask: Any, q: Tensor, k: Tensor, block_size: int) -> None:
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"block_mask: expected a BlockMask, got {type(block_mask).__name__}; pass a function as mask_mod="
        )
    check_rows("block_mask", block_mask)
    if tuple(block_mask.BLOCK_SIZE) != (block_size, block_size):
        raise ValueError(
            f"block_mask: expected blocks of {block_size} x {block_size} as in config, got "
            f"{' x '.join(map(str, block_mask.BLOCK_SIZE))}; make it with BLOCK_SIZE={block_size}, or set "
            "ProxyConfig(block_size=...)"
        )
    check_fit("block_mask", block_mask, q, k)


def check_selection(made_for: tuple[int, ...], device: torch.device, q: Tensor, k: Tensor) -> None:
    """Check that a selection was made for tensors like q and k. made_for: B, Hq, Sq, Skv."""
    given = *q.shape[:3], k.shape[2]
    if made_for != given:
        raise ValueError(
            f"q, k: expected B, Hq, Sq, Skv = {made_for}, for which the selection was made, got {given}; select blocks "
            "for these lengths"
        )
    if q.device != device:
        raise ValueError(
            f"q: expected a tensor on {device}, where the selection is, got one on {q.device}; move one of them"
        )


def check_fit(name: str, block_mask: BlockMask, q: Tensor, k: Tensor) -> None:
    """Check that a mask, of any block size, is one for q and k."""
    lengths, wanted = seq_lengths_of(block_mask), (q.shape[2], k.shape[2])
    if lengths is None:  # this torch keeps only the numbers of blocks
        rows, columns = block_mask.kv_indices.shape[-2:]
        q_size, k_size = block_mask.BLOCK_SIZE
        lengths = rows * q_size, columns * k_size
        wanted = -(-wanted[0] // q_size) * q_size, -(-wanted[1] // k_size) * k_size
    if lengths != wanted:
        raise ValueError(
            f"{name}: expected a mask for Sq, Skv = {wanted}, got one for {lengths}; make it for these lengths"
        )
    for dim, (what, size) in enumerate((("batch", q.shape[0]), ("head", q.shape[1]))):
        if block_mask.kv_indices.shape[dim] not in (1, size):
            raise ValueError(
                f"{name}: expected a {what} dimension of 1 or {size}, got {block_mask.kv_indices.shape[dim]}; "
                "the kernels read any other wrongly"
            )
    if block_mask.kv_indices.device != q.device:
        raise ValueError(
            f"{name}: expected a mask on {q.device}, as q, got {block_mask.kv_indices.device}; move it with .to(device)"
        )
