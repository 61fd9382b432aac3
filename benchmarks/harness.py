"""Timing, environment and result files, shared by the benchmarks."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import flexproxy

RESULTS = Path(__file__).parent / "results"


def require_gpu() -> None:
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; on a CPU only correctness is tested (make test)")


def time_ms(run: Callable[[], Any], repeats: int = 10, warmup: int = 3) -> dict[str, float]:
    """Milliseconds of one call by CUDA events: median and quantiles over ``repeats`` calls."""
    for _ in range(warmup):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in events)
    return {
        "median": round(statistics.median(times), 4),
        "p10": round(times[len(times) // 10], 4),
        "p90": round(times[-1 - len(times) // 10], 4),
        "repeats": repeats,
    }


def peak_extra_mib(run: Callable[[], Any]) -> float:
    """Device memory that a call takes at its peak beyond what was allocated before, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def environment() -> dict[str, str]:
    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "absent"

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": version("triton"),
        "python": platform.python_version(),
        "flexproxy": flexproxy.__version__,
    }


def write_json(path: Path, data: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(data, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)
