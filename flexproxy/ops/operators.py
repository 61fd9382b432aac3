"""Custom operators: functions that a compiler sees as one node.

NOTE [Opaque operators]
Three things need an operator instead of plain traced code: loops over chunks, which a trace would unroll; the CPU
kernel of ``flex_attention``, which refuses a ``mask_mod`` that captures a tensor computed in its own graph unless an
extern kernel made it; and Triton kernels, which stand in for the PyTorch code where they can run. In eager mode the
function is called directly. Autocast is off inside: it would round the scores to 16 bits, and change the selection.

NOTE [One signature]
An operator is written once, as an annotated PyTorch function. Its annotations give the schema that torch needs; a
NamedTuple counts as its fields, as a parameter and as the result. torch does not infer the schema, because 2.5 knows
fewer annotations than later versions. The shapes and dtypes of the results are stated beside the function.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Annotated, Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from flexproxy.ops import implementations

Args = ParamSpec("Args")
Result = TypeVar("Result")
Output = tuple[Sequence[int], torch.dtype]

Size = Annotated[int, "SymInt"]
"""An int that follows from a length: a compiler may leave it open. Any other int is a constant to it."""

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Size: "SymInt",
    int: "int",
    float: "float",
    bool: "bool",
    Sequence[int]: "int[]",
}


def operator(
    outputs: Callable[[Any], Output | list[Output]], *, has_kernel: bool = True
) -> Callable[[Callable[Args, Result]], Callable[Args, Result]]:
    """Make a function a custom operator ``flexproxy::name`` when compiling. See NOTE [One signature].

    The function is the PyTorch implementation; the kernel of its name is picked where ``implementations`` says so.

    Args:
        outputs: from the arguments, by name (``lambda x: (x.q.shape, torch.float32)``), to the shape and dtype of the
            result, or a list of them. Results are contiguous, and on the device of the first tensor.
        has_kernel: whether there is a Triton kernel. Its launcher has the same parameters; a NamedTuple as the result
            may be any tuple.

    Raises:
        TypeError: a schema has no such type as one of the annotations.
    """

    def decorate(function: Callable[Args, Result]) -> Callable[Args, Result]:
        form = _Form(function)

        def run(arguments: Sequence[Any]) -> Any:
            first = form.first_tensor(arguments)
            if not has_kernel or implementations.picked(first.device) == "torch":
                with torch.autocast(first.device.type, enabled=False):
                    return function(*arguments)  # type: ignore[call-arg]
            with on_device_of(first):
                return form.named(kernels().OPERATORS[form.name](*arguments))

        def run_flat(*flat: Any) -> Any:
            result = run(form.rebuilt(flat))
            return tuple(result) if isinstance(result, tuple) else result  # not a NamedTuple

        def fake(*flat: Any) -> Any:
            arguments = form.rebuilt(flat)
            made = outputs(types.SimpleNamespace(**dict(zip(form.names, arguments, strict=True))))
            first = form.first_tensor(arguments)
            if isinstance(made, list):
                return tuple(first.new_empty(shape, dtype=dtype) for shape, dtype in made)
            return first.new_empty(made[0], dtype=made[1])

        custom: Any = torch.library.custom_op(
            f"flexproxy::{form.name}", run_flat, mutates_args=(), schema=form.schema()
        )
        custom.register_fake(fake)

        @functools.wraps(function)
        def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
            arguments = form.in_order(args, kwargs)
            if not torch.compiler.is_compiling():
                return run(arguments)  # type: ignore[no-any-return]
            return form.named(custom(*form.flat(arguments)))  # type: ignore[no-any-return]

        return call

    return decorate


class _Form:
    """What the annotations of an operator say.

    names: of the parameters. tuples: their NamedTuple classes, None for others. result: the same for the result.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__
        self.signature = inspect.signature(function)
        hints = get_type_hints(function, include_extras=True)
        self.names = tuple(self.signature.parameters)
        self.defaults = {
            name: parameter.default
            for name, parameter in self.signature.parameters.items()
            if parameter.default is not parameter.empty
        }
        self.tuples = tuple(_named_tuple(hints[name]) for name in self.names)
        self.is_tuple = tuple(fields is not None for fields in self.tuples)
        self.result = _named_tuple(hints["return"])
        self._hints = hints
        self._place, self._field = self._first_tensor()

    def schema(self) -> str:
        """Parameters and results as torch writes them."""
        entries = []
        for name, fields in zip(self.names, self.tuples, strict=True):
            if fields is None:
                entries.append(f"{self._type(name, self._hints[name])} {name}")
            else:
                entries += [f"{self._type(name, hint)} {name}_{field}" for field, hint in _fields(fields).items()]
        hint = self._hints["return"]
        if self.result is not None:
            parts: Sequence[Any] = tuple(_fields(self.result).values())
        else:
            parts = get_args(hint) if get_origin(hint) is tuple else [hint]
        types_ = [self._type("return", part) for part in parts]
        results = f"({', '.join(types_)})" if len(types_) > 1 else types_[0]
        return f"({', '.join(entries)}) -> {results}"

    def in_order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments of a call, as the parameters stand."""
        if len(args) == len(self.names) and not kwargs:
            return args
        known, left = {**self.defaults, **kwargs}, self.names[len(args) :]
        values = [*args, *[known[name] for name in left if name in known]]
        if len(values) != len(self.names) or [name for name in kwargs if name not in left]:
            self.signature.bind(*args, **kwargs)  # raises what Python raises
        return tuple(values)

    def flat(self, arguments: Sequence[Any]) -> list[Any]:
        """Arguments as the schema has them."""
        values: list[Any] = []
        for value, is_tuple in zip(arguments, self.is_tuple, strict=True):
            if is_tuple:
                values.extend(value)
            else:
                values.append(value)
        return values

    def rebuilt(self, flat: Sequence[Any]) -> list[Any]:
        """The arguments that ``flat`` took apart."""
        rest: Iterator[Any] = iter(flat)
        return [next(rest) if fields is None else fields(*islice(rest, len(fields._fields))) for fields in self.tuples]

    def named(self, result: Any) -> Any:
        """The result, as the NamedTuple that it is annotated with."""
        return result if self.result is None else self.result(*result)

    def first_tensor(self, arguments: Sequence[Any]) -> Tensor:
        """The first argument that is always a tensor."""
        value = arguments[self._place]
        tensor: Tensor = value if self._field is None else value[self._field]
        return tensor

    def _first_tensor(self) -> tuple[int, int | None]:
        for place, (name, fields) in enumerate(zip(self.names, self.tuples, strict=True)):
            hints = [self._hints[name]] if fields is None else list(_fields(fields).values())
            if Tensor in hints:
                return place, None if fields is None else hints.index(Tensor)
        raise TypeError(f"{self.name}: expected a parameter that is a Tensor, got none; its device is where it runs")

    def _type(self, name: str, hint: Any) -> str:
        inner, suffix = hint, ""
        if get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
            (inner,) = (part for part in get_args(hint) if part is not type(None))
            suffix = "?"
        if inner not in _SCHEMA_TYPES:
            raise TypeError(
                f"{self.name}: {name}: expected the annotation Tensor, Size, int, float, bool, one of these or None, "
                f"Sequence[int], or a NamedTuple of these, got {hint}"
            )
        return _SCHEMA_TYPES[inner] + suffix


def _named_tuple(hint: Any) -> Any:
    """The class, if it is a NamedTuple."""
    return hint if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields") else None


def _fields(named_tuple: Any) -> dict[str, Any]:
    hints = get_type_hints(named_tuple, include_extras=True)
    return {name: hints[name] for name in named_tuple._fields}


@functools.cache
def kernels() -> Any:
    """The module of the Triton kernels, which needs triton."""
    return importlib.import_module("flexproxy.ops.kernels")


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, not on that of its arguments."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


@operator(lambda a: (a.x.shape, a.x.dtype), has_kernel=False)
def _clone(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def capturable(x: Tensor) -> Tensor:
    """``x`` in a form that a ``mask_mod`` may capture, see NOTE [Opaque operators]."""
    return _clone(x) if torch.compiler.is_compiling() else x
