"""Launching Triton kernels at little cost to the host.

An ordinary launch inspects every argument, which on a slow host takes longer than most of these kernels run. The layers
of a model repeat the same shapes. So the compiled kernel of a call is cached by its numbers and the layouts of its
tensors, and started directly the next time.

NOTE [Parameters of kernels]
A kernel's parameters are pointers, then strides of these, then numbers and constants (``tl.constexpr``). A stride is
called ``NAME_stride_DIM``: those of a pointer NAME are the strides of its first dimensions, in order, and ``launch``
takes them from the tensor. A dimension of size 1 is broadcast: its stride is 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from flexproxy.ops import compat

MAX_CACHED = 2**14
_cached: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}  # compiled kernels, and their strides and numbers
_layouts: dict[Any, _Layout] = {}
# CompiledKernel.run has taken the same arguments from 3.4 to 3.8; with others, launches stay ordinary ones.
_DIRECT = (3, 4) <= compat.triton_release() <= (3, 8)


class _Layout(NamedTuple):
    """The parameters of a kernel. See NOTE [Parameters of kernels]."""

    pointers: Callable[[dict[str, Any]], tuple[Any, ...]]
    rest: Callable[[dict[str, Any]], tuple[Any, ...]]
    strides: tuple[int, ...]  # of each pointer, how many the kernel takes


class Options(NamedTuple):
    """How a kernel is compiled.

    registers: the most that a thread may have, so that more programs fit on a multiprocessor; None for no bound.
    """

    warps: int = 4
    stages: int = 3
    registers: int | None = None


DEFAULT = Options()


class Launched:
    """A launch whose kernel is compiled, to be made again with other q and k: its first two pointers.

    They must have the shapes, strides and dtypes of those, and addresses that are multiples of 16 where theirs are.
    """

    def __init__(self, compiled: Any, grid: tuple[int, int, int], device: int, arguments: Sequence[Any]) -> None:
        self._compiled, self._grid, self._device = compiled, grid, device
        self._rest = arguments[2:]  # q and k themselves are not kept
        self._block, self._descriptor = getattr(arguments[1], "block_shape", None), type(arguments[1])

    def again(self, q: Tensor, k: Tensor) -> None:
        keys = k if self._block is None else self._descriptor(k, list(k.shape), list(k.stride()), self._block)
        compiled = self._compiled
        stream = triton.runtime.driver.active.get_current_stream(self._device)
        fixed = compiled.function, compiled.packed_metadata, None, None, None
        compiled.run(*self._grid, stream, *fixed, q, keys, *self._rest)


def launch(kernel: Any, grid: tuple[int, int, int], options: Options = DEFAULT, /, **arguments: Any) -> Launched | None:
    """Launch a kernel.

    arguments: of the kernel, by name, without the strides. Pointers are tensors, None, or tensor descriptors.

    Returns:
        What makes the same launch again at less cost; None the first time, and where launches are ordinary ones.

    Raises:
        TypeError: the arguments are not those of the kernel, at its first launch.
    """
    layout = _layouts.get(kernel.fn)  # a kernel's own hash is that of its source, and takes longer
    if layout is None:
        layout = _layouts[kernel.fn] = _layout_of(kernel, arguments)
    pointers, rest = layout.pointers(arguments), layout.rest(arguments)
    entry = key = None
    if _DIRECT and isinstance(kernel, JITFunction):  # the interpreter's are something else
        device = torch.cuda.current_device()
        key = kernel.fn, device, options, rest, *map(_kind, pointers, layout.strides)
        entry = _cached.get(key)
    if entry is None:
        numbers = (*_strides(pointers, layout.strides), *rest)
        given = {"num_warps": options.warps, "num_stages": options.stages, "maxnreg": options.registers}
        compiled = kernel[grid](
            *pointers, *numbers, **{name: value for name, value in given.items() if value is not None}
        )
        if key is not None:
            if len(_cached) >= MAX_CACHED:
                _cached.clear()
            _cached[key] = compiled, numbers
        return None
    compiled, numbers = entry
    stream = triton.runtime.driver.active.get_current_stream(device)
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *pointers, *numbers)
    return Launched(compiled, grid, device, (*pointers, *numbers))


def _kind(pointer: Any, strided: int) -> Any:
    """What a kernel is compiled for, and gets: element type, whether the address is a multiple of 16, strides."""
    if pointer is None:
        return None
    if not isinstance(pointer, Tensor):
        return pointer.base.dtype, pointer.base.shape, pointer.base.stride(), *pointer.block_shape
    if strided:
        return pointer.dtype, pointer.data_ptr() % 16 == 0, pointer.shape, pointer.stride()
    return pointer.dtype, pointer.data_ptr() % 16 == 0


def _strides(pointers: Sequence[Any], numbers: Sequence[int]) -> list[int]:
    found: list[int] = []
    for pointer, number in zip(pointers, numbers, strict=True):
        if pointer is None:
            found += [0] * number
        elif number:
            x = pointer if isinstance(pointer, Tensor) else pointer.base
            found += [0 if x.shape[dim] == 1 else x.stride(dim) for dim in range(number)]
    return found


def _layout_of(kernel: Any, arguments: dict[str, Any]) -> _Layout:
    stride_of = {name: name.rpartition("_stride_")[0] for name in kernel.arg_names if "_stride_" in name}
    names = [name for name in kernel.arg_names if name not in stride_of]
    if set(names) != arguments.keys():
        raise TypeError(f"{kernel.__name__}: expected the arguments {names}, got {list(arguments)}")
    pointers = [name for name in names if not isinstance(arguments[name], (int, float))]
    rest, number = names[len(pointers) :], Counter(stride_of.values())
    strides = [name for name in pointers for _ in range(number[name])]
    if list(kernel.arg_names) != [*pointers, *stride_of, *rest] or list(stride_of.values()) != strides:
        raise TypeError(f"{kernel.__name__}: expected pointers, their strides, then numbers, got {kernel.arg_names}")
    return _Layout(_getter(pointers), _getter(rest), tuple(number[name] for name in pointers))


def _getter(names: Sequence[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    return itemgetter(*names) if len(names) > 1 else lambda arguments: tuple([arguments[name] for name in names])


def power_of_2(number: int, low: int, high: int) -> int:
    """The least power of two that is not below ``number``, between two bounds."""
    return min(high, max(low, 1 << max(0, number - 1).bit_length()))
