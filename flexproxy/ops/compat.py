"""The differences between versions of torch and triton. Nothing else in flexproxy looks at versions."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

_FROM_KV_BLOCKS = frozenset(inspect.signature(BlockMask.from_kv_blocks).parameters)
_FLEX_ATTENTION = frozenset(inspect.signature(flex.flex_attention).parameters)
_SDPA_KERNEL = frozenset(inspect.signature(sdpa_kernel).parameters)
_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
IS_ROCM = torch.version.hip is not None
MAX_COMPILED_LENGTHS = 256  # dynamo's own limit is 8


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


def triton_version() -> str | None:
    """The version of the module triton, which several distributions bring; None if it is not installed."""
    return str(importlib.import_module("triton").__version__) if importlib.util.find_spec("triton") else None


def triton_release() -> tuple[int, int]:
    """The first two numbers of ``triton_version``; zeros if it is not installed."""
    major, minor = (triton_version() or "0.0").split(".")[:2]
    return int(major), int(minor)


def flash_backend_exists() -> bool:
    """Whether this torch has ``BACKEND="FLASH"``, and the package that it needs (flash-attn-4) is there."""
    return _flash_backend_exists()


@functools.cache
def _flash_backend_exists() -> bool:
    folders = [f"{folder}/_inductor/kernel/flex" for folder in torch.__path__]
    if PathFinder.find_spec("flex_flash_attention", folders) is None:  # by its place, or all of inductor is imported
        return False
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def flash_takes_lists() -> bool:
    """Whether the function of flash-attn-4 takes the lists of a BlockMask."""
    if not flash_backend_exists():
        return False
    function = importlib.import_module("flash_attn.cute").flash_attn_func
    needed = {"softmax_scale", "causal", "mask_mod", "block_size"}
    needed |= {f"{kind}_block_{what}" for kind in ("mask", "full") for what in ("cnt", "idx")}
    return needed <= inspect.signature(function).parameters.keys()


def constant_to_dynamo(function: Callable[..., Any]) -> None:
    """Let traces take what a function returns for a constant, and not look into it.

    This is torch.compiler.assume_constant_result, which would import the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


constant_to_dynamo(flash_backend_exists)


def seq_lengths_of(block_mask: BlockMask) -> tuple[int, int] | None:
    """Sq and Skv that a BlockMask was made for; None where this torch does not keep them."""
    return getattr(block_mask, "seq_lengths", None)


def lse_arguments() -> dict[str, Any]:
    """What ``flex_attention`` takes to return the log-sum-exp."""
    if "return_aux" in _FLEX_ATTENTION:
        return {"return_aux": flex.AuxRequest(lse=True)}
    return {"return_lse": True}


def in_backward() -> bool:
    """Whether this runs inside of a backward pass, as what gradient checkpointing computes again does."""
    return bool(torch._C._current_graph_task_id() != -1)


def in_a_mode() -> bool:
    """Whether a mode of torch or a transform of torch.func sees every operator, and may give other tensors back."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None)


def has_address(x: Tensor) -> bool:
    """Whether what is here is what a kernel gets: no trace, no transform of torch.func, no subclass is between."""
    is_real = type(x) is Tensor or type(x) is torch.nn.Parameter
    return is_real and not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def loadable(x: Tensor, expanded: bool = True) -> Tensor:
    """``x``, or a copy where a row of it does not begin at a multiple of 16 bytes.

    There FlashAttention's kernels fail, after which the process can use the GPU no more, and cuDNN's return wrong
    numbers without an error, by ``scaled_dot_product_attention`` too (H200, torch 2.11, cuDNN 9.19).

    Args:
        expanded: leave what is expanded as it is.
    """
    size = x.element_size()
    *others, last = strides = x.stride()
    begins = x.data_ptr() % 16 == 0 and last == 1 and not any(stride * size % 16 for stride in others)
    as_it_is = begins and (expanded or 0 not in strides)
    # Rows of an odd length are not cuDNN's, and torch pads them for FlashAttention.
    return x if as_it_is or x.shape[-1] * size % 16 else x.clone(memory_format=torch.contiguous_format)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; (0, 0) of what is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU of the generation that kernels and options were measured on."""
    return capability(device) == (9, 0)


def must_ask_for_cudnn(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether ``scaled_dot_product_attention`` takes cuDNN's kernel, the fastest there is, only if asked for it.

    That is so for inference on Hopper GPUs, by the version of torch. Asking is not free: ``cudnn_first`` takes as long
    as the rest of a call on the host.
    """
    is_inference = not (q.requires_grad or torch.compiler.is_compiling())
    if not (is_inference and is_hopper(q.device) and "set_priority" in _SDPA_KERNEL):
        return False
    if in_a_mode() or type(q) is not Tensor:  # they do not know the question
        return True
    q, k, v = loadable(q), loadable(k), loadable(v)

    def is_taken() -> bool:
        choice = torch._fused_sdp_choice(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1])
        return bool(choice == SDPBackend.CUDNN_ATTENTION.value)

    with sdpa_kernel(_BACKENDS):
        by_itself = is_taken()
    with cudnn_first():
        return is_taken() and not by_itself


def cudnn_first() -> contextlib.AbstractContextManager[None]:
    """Prefer cuDNN's kernel for dense attention inside."""
    context: contextlib.AbstractContextManager[None] = sdpa_kernel(_BACKENDS, set_priority=True)
    return context


def recompile_limit_hit() -> type[Exception]:
    """What a compiled function raises where dynamo has compiled as many variants of it as it may."""
    exceptions: Any = torch._dynamo.exc  # here, not above: it is slow to import
    return getattr(exceptions, "FailOnRecompileLimitHit", exceptions.Unsupported)  # type: ignore[no-any-return]


@contextlib.contextmanager
def many_lengths() -> Iterator[None]:
    """Let dynamo compile up to MAX_COMPILED_LENGTHS of a function, for the calls inside."""
    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({name: max(MAX_COMPILED_LENGTHS, getattr(config, name))}):
        yield


def forget_compiled(code: CodeType) -> None:
    """Let go of what dynamo has compiled from a code object."""
    torch._dynamo.eval_frame.reset_code(code)  # type: ignore[attr-defined]
