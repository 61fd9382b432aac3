"""Custom operators: functions that a compiler sees as one node.

NOTE [Opaque operators]
Three things need an operator instead of plain traced code: loops over chunks, which a trace would unroll; the CPU
kernel of ``flex_attention``, which refuses a ``mask_mod`` that captures a tensor computed in its own graph unless an
extern kernel made it; and Triton kernels, which stand in for the PyTorch code where they can run. In eager mode the
function is called directly. Autocast is off inside: it would round the scores to 16 bits, and change the selection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from flexproxy.ops import implementations

Args = ParamSpec("Args")
Result = TypeVar("Result")


def opaque(
    schema: str, fake: Callable[Args, Result], has_kernel: bool = True
) -> Callable[[Callable[Args, Result]], Callable[Args, Result]]:
    """Make a function a custom operator ``flexproxy::name`` when compiling; ``fake`` gives its output shapes.

    The function is the PyTorch implementation; the kernel of its name is picked where ``implementations`` says so.

    The schema is written out because torch 2.5 infers it from fewer annotations than later versions.
    """

    def decorate(function: Callable[Args, Result]) -> Callable[Args, Result]:
        @wraps(function)
        def exact(*args: Args.args, **kwargs: Args.kwargs) -> Result:
            first: Any = args[0]
            kernel = implementations.kernel_of(function.__name__, first) if has_kernel else None
            if kernel is None:
                with torch.autocast(first.device.type, enabled=False):
                    return function(*args, **kwargs)
            with _on_device_of(first):
                result: Result = kernel(*args, **kwargs)
            return result

        operator: Any = torch.library.custom_op(
            f"flexproxy::{function.__name__}", exact, mutates_args=(), schema=schema
        )
        operator.register_fake(fake)

        @wraps(function)
        def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
            if torch.compiler.is_compiling():
                return operator(*args, **kwargs)  # type: ignore[no-any-return]
            return exact(*args, **kwargs)

        return call

    return decorate


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, not on that of its arguments."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def _clone_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@opaque("(Tensor x) -> Tensor", _clone_fake, has_kernel=False)
def _clone(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def capturable(x: Tensor) -> Tensor:
    """``x`` in a form that a ``mask_mod`` may capture, see NOTE [Opaque operators]."""
    return _clone(x) if torch.compiler.is_compiling() else x
