"""Device time of one call by stage, from the names of the kernels that torch.profiler saw."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Stage: what the name of its kernels contains (a regular expression). The first that fits counts; the rest is "other".
STAGES = {
    "pool": r"_pool_|_outlying_",
    "classify": r"_intervals_|_labels_|_summary_|_last_valid_",
    "scores": r"_scores_",
    "rank": r"_keys_|_rank_",
    "probe": r"_masses_",
    "count": r"_forced_|_cumulative_|_kept_|_candidates_|_counts_|_threshold_",
    "lists": r"_lists_",
}
SHARED = r"_block_logits_"  # the pass over all keys, of the stage whose kernel follows it


def stage_of(kernel: str) -> str:
    return next((stage for stage, pattern in STAGES.items() if re.search(pattern, kernel)), "other")


def stage_times(events: Iterable[dict[str, Any]], calls: int) -> dict[str, float]:
    """Milliseconds of one call in each stage, and the number of kernels, from the events of a trace of some calls.

    Returns:
        ``stage_NAME_ms`` for each of ``STAGES`` and for ``other``, ``kernels`` (launches a call).
    """
    times = dict.fromkeys([*STAGES, "other"], 0.0)
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    shared = 0.0
    for event in sorted(on_device, key=lambda event: float(event["ts"])):
        if re.search(SHARED, event["name"]):
            shared += event["dur"]
            continue
        times[stage_of(event["name"])] += (event["dur"] + shared) / 1e3 / calls
        shared = 0.0
    times["other"] += shared / 1e3 / calls
    kernels = round(len(on_device) / calls, 1)
    return {f"stage_{name}_ms": round(time, 4) for name, time in times.items()} | {"kernels": kernels}


def profile_stages(run: Callable[[], Any], calls: int = 5) -> dict[str, float]:
    """``stage_times`` of a call that is compiled already; raises RuntimeError where the profiler saw no kernel."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    times = stage_times(events, calls)
    if not times["kernels"]:
        raise RuntimeError("torch.profiler recorded no kernel; are its counters taken by another process?")
    return times
