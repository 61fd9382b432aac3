"""Installed versions, devices, and what flexproxy picks on each."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from typing import Any

import torch

import flexproxy
from flexproxy.ops import compat, implementations
from flexproxy.sparse.kernel_options import fastest

# Package: what needs it, and what pip installs it with.
_PACKAGES = {
    "torch": ("everything", "flexproxy"),
    "einops": ("everything", "flexproxy"),
    "triton": ("compiled attention on a GPU, and the fast estimate there (PyTorch's is slower)", "triton"),
    "flash-attn-4": (
        'BACKEND="FLASH", the fastest attention on Hopper GPUs (else Triton\'s kernel)',
        "flexproxy[flash]",
    ),
    "transformers": (
        "flexproxy.integrations.transformers; recording and calibrating models; demo, inspect, compare, calibrate",
        "flexproxy[hf]",
    ),
    "safetensors": ("models: demo, inspect, compare, calibrate", "flexproxy[hf]"),
    "matplotlib": ("flexproxy.plot; the pictures of demo, inspect and calibrate", "flexproxy[hf]"),
    "typer": ("this command line", "flexproxy[hf]"),
    "rich": ("this command line", "flexproxy[hf]"),
}
_ONLY_PRE_RELEASES = {"flash-attn-4"}
_SHAPE = {"Hq": 32, "Hkv": 8, "S": 4096, "D": 128}


def cpp_compiler() -> tuple[str, str | None]:
    """The C++ compiler that torch.compile looks for, and its path if there is one."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    name = (os.environ.get("CXX") or default).split()[0]
    return name, shutil.which(name)


def version_of(package: str) -> str | None:
    """The installed version; None if it is missing."""
    if package == "triton":
        return compat.triton_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions that a result of a model depends on."""
    installed = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"flexproxy": flexproxy.__version__, "python": platform.python_version(), **installed}


def processor(device: torch.device) -> str:
    """The name of a device in results."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _package(name: str) -> dict[str, str | None]:
    needed_for, extra = _PACKAGES[name]
    pre = "--pre " if name in _ONLY_PRE_RELEASES else ""
    return {"version": version_of(name), "needed_for": needed_for, "install": f'pip install {pre}"{extra}"'}


def _device(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    q = torch.empty(1, _SHAPE["Hq"], _SHAPE["S"], _SHAPE["D"], device=device, dtype=dtype)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, capability {properties.major}.{properties.minor}"
        memory: float | None = round(properties.total_memory / 2**30, 1)
    else:
        name, memory = f"{platform.machine()}, {torch.get_num_threads()} threads", None
    estimate, why_estimate = implementations.automatic(device)
    options, why_options = fastest(q, gradients=False)
    return {
        "device": str(device),
        "name": name,
        "memory_gib": memory,
        "dtype": str(dtype).removeprefix("torch."),
        "estimate": estimate,
        "kernel_options": options,
        "why": {"estimate": why_estimate, "kernel_options": why_options},
    }


def collect() -> dict[str, Any]:
    """Versions, devices and kernel options, as plain data.

    ``packages`` maps each to its ``version`` (None if missing), what it is ``needed_for``, and the line that installs
    it; ``devices`` has one entry for the CPU and one for each GPU, with the implementation of the estimate and the
    kernel options that flexproxy picks there for the shape in ``shape``, and ``why`` it picks these.
    """
    devices = [_device(torch.device("cpu"), torch.float32)]
    if torch.cuda.is_available():
        devices += [_device(torch.device("cuda", i), torch.bfloat16) for i in range(torch.cuda.device_count())]
    return {
        "flexproxy": flexproxy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _package(name) for name in _PACKAGES},
        "cpp_compiler": dict(zip(("name", "path"), cpp_compiler(), strict=True)),
        "devices": devices,
        "shape": _SHAPE,
    }
