"""The documentation says nothing that does not work: its code runs, its functions exist, its figures stand in files."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.accuracy import skip_unless_flex_compiles

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))


def code_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page) and page != "transformers.md"])
def test_code_runs_in_order(page: str) -> None:
    """Each page is one program. (That of transformers.md needs a model: tests/test_transformers.py has its calls.)"""
    if page == "index.md":
        skip_unless_flex_compiles("cuda" if torch.cuda.is_available() else "cpu")
        torch._dynamo.reset()
    names: dict[str, Any] = {}
    for block in code_of(page):
        exec(compile(block, page, "exec"), names)


def test_pages_are_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    assert sorted(re.findall(r"(\w+\.md)", navigation)) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page: str) -> None:
    """What a page calls ``flexproxy.module.name`` is there."""
    for path in set(re.findall(r"`(flexproxy(?:\.\w+)+)(?:\([^`]*\))?`", (DOCS / page).read_text())):
        parts = path.split(".")
        found: Any = importlib.import_module("flexproxy")
        for depth, part in enumerate(parts[1:], 2):
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:depth]))
            found = getattr(found, part)


def test_figures_of_the_stages() -> None:
    """The table of stages is the row of the committed result."""
    rows = json.loads((ROOT / "benchmarks/results/build.json").read_text())["rows"]
    (row,) = [row for row in rows if (row["length"], row["num_proxies"]) == (131072, 1)]
    stages = ("pool", "scores", "rank", "probe", "count", "lists")
    wanted = [f"{row[f'stage_{stage}_ms']:.2f}" for stage in stages] + [f"{row['median_ms']:.2f}"]
    table = re.findall(r"^\| [^|]+ \| (\d+\.\d+) \|", (DOCS / "performance.md").read_text(), re.MULTILINE)
    assert table == wanted
