"""What a model answers: one prefill of one sample, a cell of many samples, and the cells of a run in one file.

A result file is JSON: ``environment``, ``settings``, ``complete`` and ``rows``, one for each cell (length, task,
method): ``metric``, ``mean``, ``low`` and ``high`` (95 %: Wilson's for answers, bootstrap over sequences for bits),
``number`` (answers, or sequences), ``density`` (mean over layers, heads and sequences), ``density_by_layer`` (of every
head, mean over sequences), ``seconds`` (median of a prefill, the search for a threshold included: no measure of speed),
and ``cases`` with what each seed gave.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, attempt, release, write_json
from benchmarks.quality.attention import prefill_by
from benchmarks.quality.intervals import bootstrap, wilson
from benchmarks.quality.methods import Method
from benchmarks.quality.samples import Sample, Task, bits_per_token, exact_answers, scored_positions

IDENTITY = ("length", "task", "method", "setting")


@torch.no_grad()
def run_case(model: Any, method: Method, task: Task, sample: Sample) -> Row:
    """One prefill: ``exact``, which answers are right, or bits of text; the density of every head, by layer."""
    positions = scored_positions(sample, model.config.get_text_config().vocab_size)
    with prefill_by(model, method) as density:
        begin = time.perf_counter()
        logits = model(
            input_ids=sample.tokens[None].to(model.device),
            use_cache=False,
            logits_to_keep=positions.to(model.device),
        ).logits[0]
        if task.metric == "exact":
            result: Row = {"exact": exact_answers(logits, positions, sample)}
        else:
            bits = bits_per_token(logits, positions, sample)
            result = {"bits_per_token": round(bits, 5), "bits_per_byte": round(bits / sample.bytes_per_token, 5)}
        seconds = time.perf_counter() - begin  # reading the result has waited for the device
    return result | {"seconds": round(seconds, 3), "density": [density[layer] for layer in sorted(density)]}


def run_cell(model: Any, method: Method, task: Task, samples: Sequence[Sample]) -> Row:
    """All samples of one task and length under one method; a seed is a sample's place."""
    cases = [{"seed": seed} | run_case(model, method, task, sample) for seed, sample in enumerate(samples)]
    densities = torch.tensor([case.pop("density") for case in cases], dtype=torch.float64)  # [seeds, layers, Hq]
    row = summarize(task.metric, cases)
    dense = densities.numel() == 0
    row["density"] = 1.0 if dense else round(float(densities.mean()), 4)
    row["density_by_layer"] = None if dense else [[round(x, 4) for x in heads] for heads in densities.mean(0).tolist()]
    row["seconds"] = round(statistics.median(case.pop("seconds") for case in cases), 3)
    return row | {"cases": cases}


def summarize(metric: str, cases: Sequence[Row]) -> Row:
    """Mean, number and interval of a cell's cases."""
    if metric == "exact":
        answers = [right for case in cases for right in case["exact"]]
        mean, number = statistics.mean(answers), len(answers)
        interval: tuple[float, float] | None = wilson(sum(answers), number)
    else:
        values = [case["bits_per_byte"] for case in cases]
        mean, number, interval = statistics.mean(values), len(values), bootstrap(values)
    low, high = (None, None) if interval is None else (round(end, 5) for end in interval)
    return {"metric": metric, "mean": round(float(mean), 5), "low": low, "high": high, "number": number}


class ResultFile:
    """The rows of a run, on disk after each; what an interrupted run of the same settings left is kept.

    Raises:
        ValueError: the file holds something else, or was made elsewhere or with other versions.
    """

    def __init__(self, path: Path, environment: Row, settings: Row) -> None:
        self.path = path
        settings = json.loads(json.dumps(settings))  # as they are read back
        self.data: Row = {"environment": environment, "settings": settings, "complete": False, "rows": []}
        if path.exists():
            self.data["rows"] = self._rows_before()

    def _rows_before(self) -> list[Row]:
        try:
            found = json.loads(self.path.read_text())
            rows, before = found["rows"], found["settings"] | found["environment"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"out: expected a result of this benchmark, got {self.path}; choose another --out"
            ) from error
        now = self.data["settings"] | self.data["environment"]
        different = sorted(name for name in {*now, *before} - {"date"} if now.get(name) != before.get(name))
        if different:
            parts = [f"{name} {before.get(name)!r} instead of {now.get(name)!r}" for name in different]
            raise ValueError(
                f"out: expected a result of the same settings, got {self.path} with {'; '.join(parts)}; choose another "
                "--out or remove the file"
            )
        return [row for row in rows if row["error"] is None]  # what failed is tried again

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.data["rows"]
        return rows

    def has(self, identity: Row) -> bool:
        return any(all(row[name] == identity[name] for name in IDENTITY) for row in self.rows)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        write_json(self.path, self.data)

    def finish(self) -> None:
        self.data["complete"] = True
        write_json(self.path, self.data)


def run(
    model: Any,
    haystack: Any,
    tasks: Sequence[Task],
    methods: Sequence[Method],
    lengths: Sequence[int],
    num_sequences: int,
    results: ResultFile,
) -> Iterator[str]:
    """Measure every cell that the file does not have yet; yields the name of each before it is begun."""
    for length in lengths:
        for task in tasks:
            samples = [task.make(seed, length, haystack) for seed in range(num_sequences)]
            for method in methods:
                cell = {"length": length, "task": task.name, "method": method.name, "setting": method.setting}
                yield f"{length} tokens, {task.name}, {method}"
                if not results.has(cell):
                    release()
                    results.add(cell | attempt(lambda: run_cell(model, method, task, samples)))  # noqa: B023
    results.finish()
