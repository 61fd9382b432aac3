"""Two results side by side: which rows belong together, and what is said of a missing number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from benchmarks import compare
from benchmarks.harness import RESULTS, Row


@pytest.mark.parametrize("path", [p for p in RESULTS.glob("*.json") if "quality" not in p.name], ids=lambda p: p.stem)
def test_no_two_committed_rows_are_the_same_case(path: Path) -> None:
    rows = json.loads(path.read_text())["rows"]
    assert len({json.dumps(compare.case_of(row)) for row in rows}) == len(rows)
    same = list(compare.compare(rows, rows[::-1]))
    assert len(same) >= len(rows) / 2
    assert all(new == old for _, _, new, old in same)


def test_rows_are_matched_whatever_their_order_and_their_density(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A density that was reached is not part of the case where one was wanted."""

    def row(kernel: str, ms: float | None, density: float) -> Row:
        return {"length": 8, "target_density": 0.1, "kernel": kernel, "density": density, "median_ms": ms}

    new, old = [row("triton", 2.0, 0.1), row("default", 3.0, 0.2)], [row("default", 6.0, 0.1), row("triton", None, 0.1)]
    found = [(case["kernel"], *numbers) for case, _, *numbers in compare.compare(new, old)]
    assert found == [("triton", 2.0, None), ("default", 3.0, 6.0)]
    files = [tmp_path / "new.json", tmp_path / "old.json"]
    for file, rows in zip(files, (new, old), strict=True):
        file.write_text(json.dumps({"environment": {"gpu": "A GPU", "date": "2026-01-02"}, "rows": rows}))
    compare.main(*files)
    assert "0.5" in capsys.readouterr().out


def test_what_tells_new_cases_apart() -> None:
    """How rows and layers share, and chunks; what is usual is what older results do not say."""
    usual: Row = {"length": 8, "contender": "flexproxy"}
    assert compare.case_of(usual | {"sharing": "heads", "share": 1, "chunk": None}) == usual
    for other in ({"sharing": "rows"}, {"share": 2}, {"chunk": 4}):
        assert compare.case_of(usual | other) == usual | other
