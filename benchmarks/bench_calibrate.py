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
from typing import Any, NamedTuple

import torch

import flexproxy
from benchmarks.bench_prefill import make_model, model_config
from benchmarks.harness import (
    Row,
    attempt,
    parse,
    parser,
    positive_int,
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


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--lengths", type=positive_int, nargs="+", default=[32768], help="tokens of a sequence")
    options.add_argument("--sequences", type=positive_int, default=4, help="sequences in all")
    args = parse(options, argv, lengths=[8192], sequences=2)
    require_gpu()
    model = make_model(model_config(max(args.lengths)))
    cases = [Case(length, args.sequences, target) for length in args.lengths for target in TARGETS]

    def rows_of(case: Case) -> list[Row]:
        return [case._asdict() | attempt(lambda: measure(model, case))]

    run_cases(cases, rows_of, result_path(args, "calibrate"), settings_of(args))


if __name__ == "__main__":
    main()
