"""Timing, memory, environment, progress and result files, shared by the benchmarks.

A result file is JSON: ``environment``, ``settings`` (the options of the run), ``complete`` (false while the run goes
on) and ``rows``, flat, one for each thing that was measured. What could not run is a row too, whose ``error`` says why.
Times are milliseconds by CUDA events: ``median_ms``, ``p10_ms``, ``p90_ms`` over ``repeats`` calls.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from torch import Tensor

import flexproxy
from flexproxy.environment import version_of
from flexproxy.files import replacing

RESULTS = Path(__file__).parent / "results"
MIN_REPEATS, MAX_REPEATS = 3, 30
Row = dict[str, Any]
Case = TypeVar("Case")
Number = TypeVar("Number", int, float)


def require_gpu() -> None:
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; on a CPU only correctness is tested (make test)")


# Times


def quantiles(times: Sequence[float]) -> Row:
    """Median, first and last decile of at least one time, linearly interpolated, to 0.1 microseconds."""
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    return {
        "median_ms": round(statistics.median(times), 4),
        "p10_ms": round(tenths[0], 4),
        "p90_ms": round(tenths[-1], 4),
        "repeats": len(times),
    }


def repeats_within(budget_ms: float, once_ms: float) -> int:
    """How often to repeat a call: what the budget allows, within ``MIN_REPEATS`` and ``MAX_REPEATS``."""
    return max(MIN_REPEATS, min(MAX_REPEATS, math.floor(budget_ms / max(once_ms, 1e-3))))


def time_ms(run: Callable[[], Any], budget_ms: float = 300.0, cold_l2: bool = True) -> Row:
    """Times of one call by CUDA events, as ``quantiles``.

    The first call compiles, the second may capture a graph (NOTE [Replays]), the third decides the repeats.

    Repeats are queued without waiting in between, as layers are in a prefill, where the CPU runs ahead of the GPU.
    (``triton.testing.do_bench`` runs a call at least eight times and may time it once; some calls take seconds.)

    Args:
        budget_ms: time to spend on the repeats, roughly.
        cold_l2: overwrite the L2 cache before each repeat, outside of what is timed: in a model, other layers have.
    """
    cache = _l2_sized_buffer() if cold_l2 else None
    for _ in range(2):
        run()
    once = _event_times(run, 1, cache)[0]
    return quantiles(_event_times(run, repeats_within(budget_ms, once), cache))


def call_ms(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Milliseconds until a call returns, and until its result is there, the device being idle before; medians."""
    returned, waited = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        returned.append(1e3 * (time.perf_counter() - begin))
        torch.cuda.synchronize()
        waited.append(1e3 * (time.perf_counter() - begin))
    return round(statistics.median(returned), 4), round(statistics.median(waited), 4)


def _event_times(run: Callable[[], Any], repeats: int, cache: Tensor | None) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for begin, end in events:
        if cache is not None:
            cache.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def _l2_sized_buffer() -> Tensor:
    """Twice the L2 cache."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(2 * size, dtype=torch.int8, device="cuda")


def attempt(measure: Callable[[], Row]) -> Row:
    """What was measured, with ``error`` None; what cannot run is recorded, and is not the end of the run."""
    try:
        return measure() | {"error": None}
    except Exception as error:
        message = " ".join(str(error).split())
        failure = {"error": f"{type(error).__name__}: {message}"[:300]}
    gc.collect()  # what the failed call held
    release()
    return failure


# Memory


def release() -> None:
    """Give cached device memory back, so that the next case starts from the same state."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(run: Callable[[], Any]) -> Row:
    """Device memory of one call in MiB: ``kept_mib`` by its result, ``extra_mib`` at the peak beyond that."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    after, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    del result
    return {"kept_mib": round((after - before) / 2**20, 1), "extra_mib": round((peak - after) / 2**20, 1)}


# Environment


def environment() -> dict[str, Any]:
    """The GPU, or without one the CPU, the versions, and the day."""
    if not torch.cuda.is_available():
        capability = torch.backends.cpu.get_cpu_capability()
        return {"cpu": capability, "threads": torch.get_num_threads(), **versions()}
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": device.name,
        "capability": f"{device.major}.{device.minor}",
        "memory_gib": round(device.total_memory / 2**30, 1),
        "multiprocessors": device.multi_processor_count,
        "l2_cache_mib": round(device.L2_cache_size / 2**20, 1),
        **versions(),
    }


def versions() -> dict[str, Any]:
    """Versions that results depend on, and the day."""
    return {
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        **{name: version_of(name) or "absent" for name in ("triton", "flash-attn-4", "transformers")},
        "python": platform.python_version(),
        "flexproxy": flexproxy.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


# Files and the command line


def device_of(result: Row) -> str:
    """Where a result was measured."""
    environment = result["environment"]
    return str(environment.get("gpu") or environment["device"])


def write_json(path: Path, data: Row) -> None:
    """Write a file whole or not at all; each of the ``rows`` of a result on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in data.get("rows", ()))
    frame = {name: [] if name == "rows" else value for name, value in data.items()}
    text = json.dumps(frame, indent=1, allow_nan=False).replace('\n "rows": []', f'\n "rows": [\n{rows}\n]')
    with replacing(path) as unfinished:
        unfinished.write_text(text + "\n")


def integers(text: str) -> list[int]:
    """``8192,131072`` as numbers, each at least 1; nothing of an empty text."""
    return [_within(int(part), 1, math.inf) for part in text.split(",") if part]


def fractions(text: str) -> list[float]:
    """``0.1,0.25`` as numbers in (0, 1]."""
    return [_within(float(part), 1e-9, 1.0) for part in text.split(",") if part]


def _within(value: Number, low: float, high: float) -> Number:
    if not low <= value <= high:
        raise ValueError(f"expected a number from {low:g} to {high:g}, got {value}")
    return value


def listed(parse: Callable[[str], list[Any]], text: str) -> Any:
    """An option that is a list, with commas."""
    return typer.Option(parser=parse, metavar="A,B,...", help=text)


Lengths = Annotated[Any, listed(integers, "Tokens.")]
Density = Annotated[float, typer.Option(min=1e-9, max=1.0, help="Kept / admissible blocks.")]
Budget = Annotated[float, typer.Option(min=1.0, max=1e6, help="Milliseconds for the repeats of one measurement.")]
Out = Annotated[
    Path | None, typer.Option(help="Result file; by default in benchmarks/results, of a quick run in quick/.")
]
Quick = Annotated[bool, typer.Option("--quick", help="Few, short cases, to see that everything runs.")]


def command(run: Callable[..., None], argv: Sequence[str] | None = None, **quick: Any) -> None:
    """Run a function as a command: its keyword-only parameters are the options, the doc of its module the help.

    With ``--quick``, options that were not given have the values of ``quick``.

    Raises:
        SystemExit: 2, an option is wrong; stderr says which.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    about = (sys.modules[run.__module__].__doc__ or "").split("\n\n")[0]
    defaults = run.__kwdefaults__
    if "--quick" in words:
        run.__kwdefaults__ = (defaults or {}) | quick
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    try:
        app.command(help=about)(run)
        app(words, standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer calls a usage error
            raise
        print(error.format_message(), file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        run.__kwdefaults__ = defaults


def result_path(name: str, out: Path | None, quick: bool) -> Path:
    """Where the result goes: a quick run must not replace the result of a full one."""
    return out or (RESULTS / "quick" if quick else RESULTS) / f"{name}.json"


def settings_of(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a run as data, without the place of the result."""
    return {name: value for name, value in options.items() if name != "out"}


def run_cases(cases: Sequence[Case], measure: Callable[[Case], list[Row]], out: Path, settings: dict[str, Any]) -> None:
    """Measure case by case under a progress bar; after each, the file holds all rows until then, whole."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # an extra

    data: dict[str, Any] = {"environment": environment(), "settings": settings, "complete": False, "rows": []}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            data["rows"] += measure(case)
            write_json(out, data)
            release()
            progress.advance(task)
    write_json(out, data | {"complete": True})
    print(f"wrote {out}")
