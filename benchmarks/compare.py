"""The numbers of a result beside those of another, case by case, with their ratio.

python -m benchmarks.compare NEW.json             # beside benchmarks/results/NEW.json
python -m benchmarks.compare NEW.json OLD.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS, Row, device_of

# What tells the rows of a result apart, and the numbers that are compared.
KEYS = [
    "length", "num_proxies", "query_stride", "contender", "part",
    "kernel", "target_density", "min_budget", "choice", "mask", "caches",
    "sequences", "target", "tokens", "what", "stride", "requests",
    "sharing", "share", "chunk", "round",
]  # fmt: skip
USUAL = {"sharing": "heads", "share": 1}  # not said by results that are older than these
VALUES = [
    "median_ms", "queued_ms", "waited_ms", "host_ms", "dense_ms", "kept_mib", "extra_mib", "peak_mib", "layer_ms",
    "flexproxy_ms", "step_ms", "total_s", "again_ms", "seconds", "equal_tokens", "decode_tokens_per_s", "bits_per_byte",
]  # fmt: skip


def case_of(row: Row) -> dict[str, Any]:
    keys = KEYS if "target_density" in row else [*KEYS, "density"]  # wanted, not reached
    return {key: row[key] for key in keys if row.get(key) not in (None, USUAL.get(key))}


def compare(new: Sequence[Row], old: Sequence[Row]) -> Iterator[tuple[dict[str, Any], str, float | None, float | None]]:
    """Case, name of the number, and the number in both, None where it is missing; for every case of ``new``."""
    known = {json.dumps(case_of(row)): row for row in old}
    for row in new:
        other = known.get(json.dumps(case_of(row)), {})
        for name in VALUES:
            if row.get(name) is not None or other.get(name) is not None:
                yield case_of(row), name, row.get(name), other.get(name)


def main(new: Path, old: Annotated[Path | None, typer.Argument()] = None) -> None:
    results = [json.loads(path.read_text()) for path in (new, old or RESULTS / new.name)]
    where = [f"{device_of(x)}, {x['environment']['date']}" for x in results]
    table = Table("case", "number", "new", "old", "new / old", title=f"new: {where[0]}; old: {where[1]}")
    for case, name, ours, theirs in compare(*(x["rows"] for x in results)):
        numbers = [ours, theirs, ours / theirs if ours is not None and theirs else None]
        shown = ", ".join(f"{key} {value}" for key, value in case.items())
        table.add_row(shown, name, *("" if x is None else f"{x:.4g}" for x in numbers))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    typer.run(main)
