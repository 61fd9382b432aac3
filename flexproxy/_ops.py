"""Custom operators: functions that a compiler sees as one node.

NOTE [Opaque operators]
Three things need an operator instead of plain traced code: loops over chunks, which a trace would unroll; the CPU
kernel of ``flex_attention``, which refuses a ``mask_mod`` that captures a tensor computed in its own graph unless an
extern kernel made it; and, later, implementations picked by device. In eager mode the function is called directly.
Autocast is off inside: it would round the scores to 16 bits, and change the selection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Args = ParamSpec("Args")
Result = TypeVar("Result")


def opaque(schema: str, fake: Callable[Args, Result]) -> Callable[[Callable[Args, Result]], Callable[Args, Result]]:
    """Make a function a custom operator ``flexproxy::name`` when compiling; ``fake`` gives its output shapes.

    The schema is written out because torch 2.5 infers it from fewer annotations than later versions.
    """

    def decorate(function: Callable[Args, Result]) -> Callable[Args, Result]:
        @wraps(function)
        def exact(*args: Args.args, **kwargs: Args.kwargs) -> Result:
            first: Any = args[0]
            with torch.autocast(first.device.type, enabled=False):
                return function(*args, **kwargs)

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


def _clone_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@opaque("(Tensor x) -> Tensor", _clone_fake)
def _clone(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def capturable(x: Tensor) -> Tensor:
    """``x`` in a form that a ``mask_mod`` may capture, see NOTE [Opaque operators]."""
    return _clone(x) if torch.compiler.is_compiling() else x
