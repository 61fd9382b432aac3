"""Which implementation carries out the operators, PyTorch or Triton: the one place that picks.

By itself the fastest that can run: Triton kernels on NVIDIA GPUs of compute capability 8.0 and later where triton is
installed, PyTorch anywhere else. ``use`` asks for one by name; it never falls back to another.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from flexproxy.ops import compat

__all__ = ["automatic", "use"]

Name = Literal["auto", "torch", "triton"]
_chosen: ContextVar[Name] = ContextVar("flexproxy_implementation", default="auto")
MIN_CAPABILITY = (8, 0)


@contextlib.contextmanager
def use(name: Name) -> Iterator[None]:
    """Use one implementation for the calls inside, in this thread (or task).

    Args:
        name: "torch", "triton", or "auto" for the fastest that can run. Triton runs on a CPU, very slowly, under its
            interpreter (``TRITON_INTERPRET=1``), and only if asked for.

    Raises:
        ValueError: there is no such implementation. At the call of an operator, RuntimeError: it cannot run here.
    """
    if name not in get_args(Name):
        raise ValueError(f"name: expected one of {list(get_args(Name))}, got {name!r}; 'auto' picks the fastest")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> Name:
    """What ``use`` asks for here; "auto" where it does not."""
    return _chosen.get()


def picked(device: torch.device) -> Literal["torch", "triton"]:
    """Which implementation carries out the operators on a device.

    Raises:
        RuntimeError: the one that was asked for cannot run there.
    """
    name = _chosen.get()
    if name == "torch":
        return "torch"
    missing = _why_torch(device) if name == "auto" else _missing(device)
    if missing is None:
        return "triton"
    if name == "triton":
        raise RuntimeError(f"implementation: 'triton' was asked for, but {missing}; use 'auto' or 'torch'")
    return "torch"


def automatic(device: torch.device) -> tuple[str, str]:
    """Which implementation "auto" is on a device, and why, for people to read."""
    why_torch = _why_torch(device)
    if why_torch is None:
        return "triton", "it is installed, and its kernels run on this GPU"
    return "torch", why_torch


def _why_torch(device: torch.device) -> str | None:
    """Why "auto" is PyTorch on a device; None where it is Triton."""
    return f"{device} is not a CUDA device" if device.type != "cuda" else _missing(device)


@functools.cache
def _missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device; None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "on"):  # as triton reads it
            return f"the tensors are on {device}, and TRITON_INTERPRET is not set"
        return None if interpreter_runs() else "the interpreter of triton before 3.4 cannot run the kernels"
    if compat.IS_ROCM:
        return "on AMD GPUs the kernels have not been tried"
    if compat.capability(device) < MIN_CAPABILITY:
        return f"{device} has a compute capability below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return None


def interpreter_runs() -> bool:
    """Whether triton's interpreter runs the kernels: before 3.4 it overlooks constants whose annotation is a string."""
    return compat.triton_release() >= (3, 4)
