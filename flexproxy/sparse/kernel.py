"""``flex_attention`` itself: compiled, by the trace around it or else here; eager where compilation is switched off.

NOTE [Compiled for a length]
On a CPU the kernel is compiled for its lengths alone: with dynamic shapes it reads a captured table wrongly, or does
not compile (torch 2.13). Dynamo counts the variants of a code object, warns of the ninth and refuses the 257th. So
every set of lengths has a function with a code object of its own. The least recently used is forgotten, with its
kernels.

NOTE [Strides that are inferred]
A GPU's kernel is compiled for any length, and its strides are products of sizes where dynamo can infer them so: of
``[B, H, S, D]``, and of ``[B, S, H, D]`` transposed. Any other stride, as of a part of a fused projection or of keys
that lie beside their values, is a number of its own to the kernel. With such keys and values attention takes up to
twice as long (H100, torch 2.11), and they are copied; queries are read once, and a copy takes longer than it saves.
"""

from __future__ import annotations

import functools
import math
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flexproxy.ops import compat
from flexproxy.stages.lists import Lists

Result: TypeAlias = Tensor | tuple[Tensor, Tensor]  # the latter: output and log-sum-exp, a natural logarithm

MAX_COMPILED = 256  # a kernel of a CPU takes about 1 MiB
_flash_factors: dict[torch.device, float] = {}


class NotCompiledError(Exception):
    """torch.compile ran the function as it is: compilation is switched off."""


def run_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask | None,
    arguments: dict[str, Any],
    eager_mask: Callable[[], BlockMask] | None = None,
) -> Result:
    """``flex_attention`` of q ``[B, Hq, Sq, D]``, k and v ``[B, Hkv, Skv, D]``.

    Args:
        arguments: for ``flex_attention``, ``kernel_options`` among them.
        eager_mask: makes the mask for eager ``flex_attention``, which sees the function of a mask alone and not its
            lists; None if it is ``block_mask``.

    Returns:
        The output; output and log-sum-exp where the arguments have ``compat.lse_arguments``.
    """
    if torch.compiler.is_compiling():
        result: Any = flex_attention(q, k, v, block_mask=block_mask, **arguments)
    else:
        q, k, v = prepared(q, k, v, arguments["kernel_options"])
        try:
            result = run_compiled(q, k, v, block_mask=block_mask, **arguments)
        except NotCompiledError:
            block_mask = block_mask if eager_mask is None else eager_mask()
            # Options are for kernels, and say in which unit these return the log-sum-exp.
            arguments = arguments | {"kernel_options": {}}
            result = flex_attention(q, k, v, block_mask=block_mask, **arguments)
    if isinstance(result, Tensor):
        return result
    out, others = result
    lse = others if isinstance(others, Tensor) else others.lse
    return out, _natural(lse, arguments["kernel_options"])


def run_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: Tensor,
    lists: Lists,
    block_size: int,
    scale: float,
    kernel_options: dict[str, Any],
) -> Tensor:
    """``run_flex`` of listed blocks under a causal mask: a function of tensors alone, whose call is quickly checked.

    Args:
        offset: int32 ``[B]``, the position of query 0 among the keys.

    Raises:
        NotCompiledError: compilation is switched off.
    """
    compiled = _compiled_causal(block_size, scale, q.shape[1] != k.shape[1], tuple(kernel_options.items()))
    out: Tensor = _call(compiled, q, with_inferred_strides(k), with_inferred_strides(v), offset, *lists)
    return out


def prepared(
    q: Tensor, k: Tensor, v: Tensor, kernel_options: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Each, or a copy where a kernel cannot load it.

    kernel_options: of ``flex_attention``; None where another kernel runs.
    """
    if not (q.is_cuda and compat.has_address(q)):
        return q, k, v
    # flash-attn-4 keys a compiled kernel on no stride: one made for strides of 0 fails for others, and those for it.
    expanded = kernel_options is None or kernel_options.get("BACKEND") != "FLASH"
    return compat.loadable(q, expanded), compat.loadable(k, expanded), compat.loadable(v, expanded)


def with_inferred_strides(x: Tensor) -> Tensor:
    """Keys or values ``[B, Hkv, Skv, D]``, or a copy of them. See NOTE [Strides that are inferred]."""
    inferred = x.is_contiguous() or x.transpose(1, 2).is_contiguous()
    # What is expanded stays: its copy would be larger than it is.
    return x if inferred or 0 in x.stride() else x.contiguous()


@functools.lru_cache(MAX_COMPILED)
def _compiled_causal(
    block_size: int, scale: float, gqa: bool, kernel_options: tuple[tuple[str, Any], ...]
) -> Callable[..., Tensor]:
    arguments: dict[str, Any] = {"scale": scale, "enable_gqa": gqa, "kernel_options": dict(kernel_options)}

    def causal(q: Tensor, k: Tensor, v: Tensor, offset: Tensor, *lists: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            raise NotCompiledError

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return q_idx + offset[b] >= kv_idx

        sizes, lengths = (block_size, block_size), (q.shape[2], k.shape[2])
        block_mask = compat.from_kv_blocks(
            *lists, block_size=sizes, mask_mod=mask_mod, seq_lengths=lengths, compute_q_blocks=False
        )
        out: Tensor = flex_attention(q, k, v, block_mask=block_mask, **arguments)
        return out

    return _compiled(causal, "cuda")


def _natural(lse: Tensor, kernel_options: dict[str, Any]) -> Tensor:
    """A log-sum-exp of ``flex_attention`` as a natural logarithm."""
    if kernel_options.get("BACKEND") != "FLASH":
        return lse
    factor = flash_lse_factor(lse.device)
    if factor is None:
        raise ValueError(
            "return_lse: expected a call of flexproxy.attention with it before torch.compile or a CUDA graph sees one, "
            'for the unit of BACKEND="FLASH" is found by trying, got none; call it once, or leave out the BACKEND'
        )
    return lse if factor == 1.0 else lse * factor


def flash_lse_factor(device: torch.device) -> float | None:
    """What makes the log-sum-exp of ``BACKEND="FLASH"`` a natural logarithm: 1, or 1 / ln 2 in some versions of torch.

    torch took what this backend returns for a logarithm to the base 2 (pytorch issue 181645). Found by trying when it
    is first asked for on a device; None where that is impossible now: in a trace, a CUDA graph, or a mode of torch.
    """
    if torch.compiler.is_compiling():
        return _known_flash_factor(device)
    if device not in _flash_factors and not compat.in_a_mode() and not torch.cuda.is_current_stream_capturing():
        _flash_factors[device] = _try_flash(device)
    return _known_flash_factor(device)


def _known_flash_factor(device: torch.device) -> float | None:
    return _flash_factors.get(device)


compat.constant_to_dynamo(_known_flash_factor)


@torch.no_grad()
def _try_flash(device: torch.device) -> float:
    """The factor, by the log-sum-exp of equal scores, which is the logarithm of their number."""
    number = 256
    x = torch.zeros(1, 1, number, 128, dtype=torch.bfloat16, device=device)
    arguments: dict[str, Any] = {"kernel_options": {"BACKEND": "FLASH"}, **compat.lse_arguments()}
    # A function of its own, or the shapes of calls to come would be dynamic.
    _, others = compiled_flex_attention("flash")(x, x, x, **arguments)
    lse = float((others if isinstance(others, Tensor) else others.lse)[0, 0, 0])
    for factor in (1.0, 1 / math.log(2)):
        if math.isclose(lse * factor, math.log(number), rel_tol=1e-2):
            return factor
    raise RuntimeError(
        f'return_lse: expected the log-sum-exp of BACKEND="FLASH" to be {math.log(number):.3f} for {number} equal '
        f"scores, or that times ln 2, got {lse:.3f}; pass kernel_options without the BACKEND, and report this"
    )


def run_compiled(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Any:
    """Compiled ``flex_attention``. Raises NotCompiledError where compilation is switched off."""
    lengths: tuple[Any, ...] = ()
    if q.device.type == "cpu":
        lengths = q.shape, k.shape, v.shape, q.dtype
    else:
        k, v = with_inferred_strides(k), with_inferred_strides(v)
    return _call(compiled_flex_attention(q.device.type, *lengths), q, k, v, **arguments)


def _call(compiled: Callable[..., Any], *tensors: Tensor, **arguments: Any) -> Any:
    try:
        return compiled(*tensors, **arguments)
    except compat.recompile_limit_hit():  # by masks and options: lifted where it is met, for that takes a millisecond
        with compat.many_lengths():
            return compiled(*tensors, **arguments)


@functools.lru_cache(MAX_COMPILED)
def compiled_flex_attention(device_type: str, *lengths: Any) -> Callable[..., Any]:
    """``flex_attention``, compiled for a type of device, and on a CPU for lengths: NOTE [Compiled for a length]."""
    return _compiled(_flex_attention, device_type)


def _compiled(function: Any, device_type: str) -> Callable[..., Any]:
    """A copy of a function, with a code object of its own, compiled."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{device_type}")
    copy = types.FunctionType(code, function.__globals__, closure=function.__closure__)
    # Dynamo's notes of a code object hold one another.
    weakref.finalize(copy, compat.forget_compiled, code).atexit = False
    return torch.compile(copy, fullgraph=True, dynamic=False if device_type == "cpu" else None)


def _flex_attention(*args: Any, **kwargs: Any) -> Any:
    # A function of our own: dynamo counts variants by function, and the caller may compile torch's.
    if not torch.compiler.is_compiling():
        raise NotCompiledError
    return flex_attention(*args, **kwargs)
