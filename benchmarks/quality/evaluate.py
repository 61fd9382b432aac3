"""What a model answers: a prefill of some samples, a cell of many, and the cells of a run in one file.

A result file is JSON: ``environment``, ``settings``, ``complete`` and ``rows``, one for each cell (length, task,
method): ``metric``, ``mean``, ``low`` and ``high`` (95 %: Wilson's for answers, bootstrap over sequences for bits),
``number`` (answers, or sequences), ``density`` (mean over layers, heads and sequences; of a hybrid, over the layers
that attend to everything), ``seconds`` (median of a sequence, with all that is looked at: no measure of speed), and
``cases`` with what each seed gave.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.baselines.blocks import untimed
from benchmarks.harness import Row, attempt, release, write_json
from benchmarks.quality.attention import prefill_by
from benchmarks.quality.intervals import bootstrap, wilson
from benchmarks.quality.methods import Method
from benchmarks.quality.samples import Sample, Task, bits_per_token, exact_answers, scored_positions

IDENTITY = ("length", "task", "method", "setting")
TOKENS_AT_ONCE = 65536  # of the sequences that one forward pass takes on a GPU; on a CPU it takes one


@torch.no_grad()
def run_batch(model: Any, method: Method, task: Task, samples: Sequence[Sample]) -> list[Row]:
    """One prefill of sequences of one length, each: ``exact``, which answers are right, or bits of text; ``density``
    of every layer and head."""
    vocabulary = model.config.get_text_config().vocab_size
    scored = [scored_positions(sample, vocabulary) for sample in samples]
    union = torch.cat(scored).unique()
    tokens = torch.stack([sample.tokens for sample in samples])
    with untimed(), prefill_by(model, method) as density:
        begin = time.perf_counter()
        logits = model(input_ids=tokens.to(model.device), use_cache=False, logits_to_keep=union.to(model.device)).logits
        rows: list[Row] = []
        for sample, positions, found in zip(samples, scored, logits, strict=True):
            own = (
                found if len(positions) == len(union) else found[torch.searchsorted(union, positions).to(found.device)]
            )
            if task.metric == "exact":
                rows.append({"exact": exact_answers(own, positions, sample)})
            else:
                bits = bits_per_token(own, positions, sample)
                per_byte = bits / sample.bytes_per_token
                rows.append({"bits_per_token": round(bits, 5), "bits_per_byte": round(per_byte, 5)})
        seconds = time.perf_counter() - begin  # reading the results has waited for the device
    for n, row in enumerate(rows):
        row["seconds"] = round(seconds / len(samples), 3)
        row["density"] = [density[layer][n] for layer in sorted(density)]
    return rows


def run_cell(model: Any, method: Method, task: Task, samples: Sequence[Sample]) -> Row:
    """All samples of one task and length under one method; a seed is a sample's place."""
    at_once = max(1, TOKENS_AT_ONCE // len(samples[0].tokens)) if model.device.type == "cuda" else 1
    batches = [samples[start : start + at_once] for start in range(0, len(samples), at_once)]
    found = [case for batch in batches for case in run_batch(model, method, task, batch)]
    cases = [{"seed": seed} | case for seed, case in enumerate(found)]
    densities = torch.tensor([case.pop("density") for case in cases], dtype=torch.float64)  # [seeds, layers, Hq]
    row = summarize(task.metric, cases)
    row["density"] = 1.0 if densities.numel() == 0 else round(float(densities.mean()), 4)
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


class Cell(NamedTuple):
    """One row of a result: a task of a length under a method.

    number: at least so many answers, or sequences whose text is predicted.
    """

    length: int
    task: Task
    method: Method
    number: int

    @property
    def identity(self) -> Row:
        values = self.length, self.task.name, self.method.name, self.method.setting
        return dict(zip(IDENTITY, values, strict=True))

    def __str__(self) -> str:
        return f"{self.length} tokens, {self.task.name}, {self.method}"


class Samples:
    """The samples of a task, made when they are first needed."""

    def __init__(self, task: Task, length: int) -> None:
        self.task, self.length = task, length
        self.made: list[Sample] = []

    def first(self, number: int) -> list[Sample]:
        """As many as have so many answers, or so many texts."""
        taken, found = 0, 0
        while found < number:
            if taken == len(self.made):
                self.made.append(self.task.make(taken, self.length))
            found += len(self.made[taken].answers) or 1
            taken += 1
        return self.made[:taken]


def run(
    model: Any,
    cells: Iterable[Cell],
    results: ResultFile,
    context: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    until: float = math.inf,
) -> Iterator[Cell]:
    """Measure every cell that the file does not have yet; yields each before it is begun.

    Args:
        context: what a model needs to read a length.
        until: of ``time.monotonic``; what is not begun by then is left out, and the file stays incomplete.
    """
    made: dict[tuple[int, str], Samples] = {}
    for cell in cells:
        yield cell
        if results.has(cell.identity):
            continue
        if time.monotonic() >= until:
            return
        place = cell.length, cell.task.name
        samples = made.setdefault(place, Samples(cell.task, cell.length)).first(cell.number)
        release()
        with context(cell.length):
            measured = attempt(lambda: run_cell(model, cell.method, cell.task, samples))  # noqa: B023
        results.add(cell.identity | measured)
    results.finish()
