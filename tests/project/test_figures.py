"""Figures of README and of the pages are those of the committed files, and the files are of this version."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import flexproxy

pytest.importorskip("typer", reason="the benchmarks need it")
pytest.importorskip("scipy")

from benchmarks import harness
from docs import figures

PLACES = {page: re.findall(r"<!-- figures: (\w+) -->", page.read_text()) for page in figures.PAGES}


@pytest.fixture
def fresh() -> Iterator[None]:
    figures.results.cache_clear()
    yield
    figures.results.cache_clear()


@pytest.mark.parametrize("page", [page for page, places in PLACES.items() if places], ids=lambda page: page.name)
def test_pages_have_the_figures_of_the_files(page: Path) -> None:
    text = page.read_text()
    assert figures.with_figures(text) == text, "run python -m docs.figures"


def test_every_block_has_a_place() -> None:
    assert {name for places in PLACES.values() for name in places} == figures.BLOCKS.keys()


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_are_of_this_version(path: Path) -> None:
    assert json.loads(path.read_text())["environment"]["flexproxy"] == flexproxy.__version__, "measure again"


def test_results_of_another_version_are_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flexproxy, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=r"expected results of flexproxy 9\.9\.9, got"):
        figures.speed()


def test_a_changed_figure_is_found(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A planted mistake: one time of the files is another."""
    for path in harness.RESULTS.glob("*.json"):
        data = json.loads(path.read_text())
        for row in data["rows"]:
            if row.get("part") == "prefill" and row["length"] == figures.LONG:
                row["median_ms"] *= 2
        (tmp_path / path.name).write_text(json.dumps(data))
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    text = (figures.ROOT / "README.md").read_text()
    assert figures.with_figures(text) != text
