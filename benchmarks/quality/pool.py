"""Join the results of several models into one, so that a figure hangs on no single training.

    python -m benchmarks.quality.pool quality_seed0.json quality_seed1.json --out quality.json

The results must be complete and of the same settings, but for the model. Answers and sequences are put together, and
means and intervals are formed anew; the interval by bootstrap is over the sequences of all models.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness import Row, command, write_json
from benchmarks.quality import report
from benchmarks.quality.evaluate import IDENTITY, summarize


def pool(results: Sequence[Row]) -> Row:
    """One result of several.

    Raises:
        ValueError: they are not of the same kind, or one is not complete.
    """
    kinds = [_kind(result) for result in results]
    if len(results) < 2 or any(kind != kinds[0] for kind in kinds):
        raise ValueError("FILE: expected two results or more of the same settings but for the model; choose others")
    if not all(result["complete"] and all(row["error"] is None for row in result["rows"]) for result in results):
        raise ValueError("FILE: expected complete results without failed cells; run the same command for them again")
    models = [result["settings"]["model"] for result in results]
    joined = {name: ", ".join(model[name] for model in models) for name in ("name", "fingerprint")}
    rows = [_join(rows) for rows in zip(*(result["rows"] for result in results), strict=True)]
    settings = results[0]["settings"] | {"model": models[0] | joined}
    return {"environment": results[0]["environment"], "settings": settings, "complete": True, "rows": rows}


def _kind(result: Row) -> Any:
    """What results that are joined have in common."""
    rows = [[row[name] for name in IDENTITY] for row in result["rows"]]
    settings = {name: value for name, value in result["settings"].items() if name != "model"}
    return rows, settings, result["environment"] | {"date": None}, result["settings"]["model"]["dtype"]


def _join(rows: Sequence[Row]) -> Row:
    cases = [case for row in rows for case in row["cases"]]
    joined = rows[0] | summarize(rows[0]["metric"], cases)
    joined["density"] = round(statistics.mean(row["density"] for row in rows), 4)
    joined["seconds"] = round(statistics.mean(row["seconds"] for row in rows), 3)
    return joined | {"cases": cases}


def join(
    files: Annotated[list[Path], typer.Argument(help="Results of python -m benchmarks.quality.")],
    *,
    out: Annotated[Path, typer.Option(help="The joined result; the plot goes beside it.")],
) -> None:
    from rich.console import Console

    try:
        data = pool([json.loads(path.read_text()) for path in files])
    except (OSError, ValueError, KeyError) as error:
        sys.exit(str(error))
    write_json(out, data)
    report.draw(data, out.with_suffix(".png"))
    for table in report.tables(data["rows"]):
        Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    command(join, argv)


if __name__ == "__main__":
    main()
