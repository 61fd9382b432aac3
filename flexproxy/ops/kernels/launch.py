"""Launching Triton kernels at little cost to the host.

An ordinary launch inspects every argument anew, which on a slow host takes longer than most of these kernels. The
layers of a model repeat the same shapes, so the compiled kernel of a call is kept under the values of its numbers and
the kinds of its tensors, and started directly.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

MAX_KEPT = 2**14
_kept: dict[tuple[Any, ...], Any] = {}
# CompiledKernel.run has taken the same arguments from 3.4 to 3.8; with others, launches stay ordinary ones.
_DIRECT = (3, 4) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 8)


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    pointers: tuple[Any, ...],
    numbers: tuple[float, ...],
    constants: tuple[Any, ...],
    warps: int = 4,
    stages: int = 3,
    registers: int | None = None,
) -> None:
    """Launch a kernel whose parameters are pointers, then numbers, then constants (``tl.constexpr``).

    Args:
        pointers: tensors, None, or tensor descriptors.
        registers: the most that a thread may have, so that more programs fit on a multiprocessor.
    """
    compiled = key = None
    if _DIRECT and isinstance(kernel, JITFunction):  # the interpreter's are something else
        device = torch.cuda.current_device()
        kinds = tuple([_kind(pointer) for pointer in pointers])
        # A kernel's own hash is that of its source, and takes longer.
        key = kernel.fn, device, numbers, constants, warps, stages, registers, kinds
        compiled = _kept.get(key)
    if compiled is None:
        options = {"num_warps": warps, "num_stages": stages} | ({} if registers is None else {"maxnreg": registers})
        compiled = kernel[grid](*pointers, *numbers, *constants, **options)
        if key is not None:
            if len(_kept) >= MAX_KEPT:
                _kept.clear()
            _kept[key] = compiled
        return
    stream = triton.runtime.driver.active.get_current_stream(device)
    compiled.run(
        *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *pointers, *numbers, *constants
    )


def _kind(pointer: Any) -> Any:
    """What a kernel is compiled for: the element type, and whether the address is a multiple of 16."""
    if isinstance(pointer, Tensor):
        return pointer.dtype, pointer.data_ptr() % 16 == 0
    return None if pointer is None else (pointer.base.dtype, *pointer.block_shape)


def strides(x: Tensor | None, number: int) -> tuple[int, ...]:
    """The first strides of a tensor, 0 along what is broadcast; zeros for None."""
    if x is None:
        return (0,) * number
    return tuple([0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)][:number])


def power_of_2(number: int, low: int, high: int) -> int:
    """The least power of two that is not below ``number``, between two bounds."""
    return min(high, max(low, 1 << max(0, number - 1).bit_length()))
