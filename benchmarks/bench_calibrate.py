"""How long a calibration takes, for the shape of Llama-3.1-8B, on one GPU.

    python -m benchmarks.bench_calibrate

Random weights made on the device, bf16, and random tokens: what is chosen means nothing, and takes as long as if it
did. Half of the sequences decide, the other half confirm. Columns of a row, one for each length and target: length
(tokens of a sequence), sequences, target, seconds (all of ``flexproxy.calibrate``, compilation included), peak_mib
(device memory at its peak beyond the weights), decided and confirmed (density, on either half), error.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
import typer

import flexproxy
from benchmarks.bench_prefill import make_model, model_config
from benchmarks.harness import (
    Lengths,
    Out,
    Quick,
    Row,
    attempt,
    command,
    require_gpu,
    result_path,
    run_cases,
    settings_of,
)

TARGETS = ({"density": 0.2}, {"quality": 0.9})


class Case(NamedTuple):
    length: int
    sequences: int
    target: dict[str, float]

    def __str__(self) -> str:
        return f"{self.sequences} x {self.length} tokens, {self.target}"


def measure(model: Any, case: Case) -> Row:
    texts = torch.randint(model.config.vocab_size, (case.sequences, case.length)).unbind()
    before = 0
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    calibration = flexproxy.calibrate(model, texts, sequences=case.sequences, **case.target)  # type: ignore[arg-type]
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() - before if model.device.type == "cuda" else 0
    mean = calibration.evidence["mean"]
    return {
        "seconds": round(seconds, 1),
        "peak_mib": round(peak / 2**20, 1),
        "decided": mean["decided_on"]["density"],
        "confirmed": mean["confirmed_on"]["density"],
    }


def bench(
    *,
    lengths: Lengths = "32768",
    sequences: Annotated[int, typer.Option(min=2, help="Sequences in all.")] = 4,
    out: Out = None,
    quick: Quick = False,
) -> None:
    settings = settings_of(locals())
    require_gpu()
    model = make_model(model_config(max(lengths)))
    cases = [Case(length, sequences, target) for length in lengths for target in TARGETS]

    def rows_of(case: Case) -> list[Row]:
        return [case._asdict() | attempt(lambda: measure(model, case))]

    run_cases(cases, rows_of, result_path("calibrate", out, quick), settings)


def main(argv: Sequence[str] | None = None) -> None:
    command(bench, argv, lengths="8192", sequences=2)


if __name__ == "__main__":
    main()
