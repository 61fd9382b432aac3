"""The documentation says nothing that does not work: its code runs, its functions exist, its figures stand in files."""

from __future__ import annotations

import ast
import hashlib
import heapq
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

import flexproxy
from benchmarks.quality.trials import TRIALS
from flexproxy.sparse import kernel as sparse_kernel
from tests.accuracy import skip_unless_flex_compiles
from tests.tiny_model import LAYERS, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
API = "".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))


def code_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def run(page: str, names: dict[str, Any]) -> None:
    """Each page is one program."""
    for block in code_of(page):
        exec(compile(block, page, "exec"), names)


NEED_TRANSFORMERS = ("transformers.md", "quickstart.md", "concepts.md", "choosing.md", "inspection.md")
DRAWN = ("concepts.md",)  # test_pictures runs it


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page) and page not in (*NEED_TRANSFORMERS, *DRAWN)])
def test_code_runs_in_order(page: str) -> None:
    run(page, {})


def test_code_of_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first program is a file, which tests/test_examples.py runs."""
    pytest.importorskip("transformers")
    from flexproxy.integrations.transformers import configuration

    assert '--8<-- "examples/quickstart.py"' in (DOCS / "quickstart.md").read_text()
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    run("quickstart.md", names)
    assert {config.min_budget for config in configuration(names["model"]).values()} == {1024}


def test_code_of_choosing() -> None:
    pytest.importorskip("transformers")
    run("choosing.md", {})


@pytest.mark.slow
def test_code_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page leaves the model and its input to the reader: here they are as small as they may be, and sparse."""
    pytest.importorskip("transformers")
    skip_unless_flex_compiles("cpu")
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    names: dict[str, Any] = {"name": str(save_tiny_model(tmp_path)), "input_ids": torch.randint(256, (1, 5000))}
    with torch.no_grad():
        run("transformers.md", names)
    assert json.loads((tmp_path / "settings.json").read_text())["layers"]["0"]["gamma"] == 0.99
    assert set(names["record"].layers) == set(range(LAYERS))
    assert 0 < min(names["density"][0]) <= max(names["density"][0]) <= 1


def test_code_of_inspection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that has the repository's examples, and with nothing compiled."""
    for package in ("transformers", "safetensors", "matplotlib"):
        pytest.importorskip(package)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sparse_kernel, "compiled_flex_attention", lambda *variant: sparse_kernel._flex_attention)
    names: dict[str, Any] = {}
    run("inspection.md", names)
    assert {x.dense for passes in names["record"].layers.values() for x in passes} == {None}
    written = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert written == set(re.findall(r'"([\w-]+\.(?:png|json))"', "".join(code_of("inspection.md"))))


def pictures_of(page: str) -> list[str]:
    return [f"docs/{path}" for path in re.findall(r"!\[[^]]+\]\(([^)]+)\)", (DOCS / page).read_text())]


def test_files_of_the_pictures() -> None:
    """Each is shown and small; those of docs/draw.py are as it drew them, from the committed results."""
    pytest.importorskip("scipy")
    from docs.draw import SOURCES, digest

    drawn = json.loads((DOCS / "images" / "drawn.json").read_text())
    files = {f"docs/images/{path.name}": path.read_bytes() for path in (DOCS / "images").glob("*.png")}
    readme = set(re.findall(r'(?:src|srcset)="([^"]+)"', (ROOT / "README.md").read_text()))
    assert readme | {path for page in PAGES for path in pictures_of(page)} == files.keys() >= drawn.keys()
    assert {path: len(picture) for path, picture in files.items() if len(picture) > 200_000} == {}
    for path, entry in drawn.items():
        assert hashlib.sha256(files[path]).hexdigest() == entry["sha256"], path
        if "source" in entry:
            sources = [ROOT / "benchmarks" / "results" / f"{name}.json" for name in SOURCES[Path(path).stem]]
            assert digest(*sources) == entry["source"], "run python -m docs.draw"


def numbers_of(text: str) -> tuple[str, list[float]]:
    """A text with # for every number, and the numbers."""
    number = r"\d+(?:\.\d+)?"
    return re.sub(number, "#", text), [float(x) for x in re.findall(number, text)]


@pytest.mark.slow
def test_pictures() -> None:
    """What a page draws and prints is what stands in it: each file is the one that was drawn, from the same data."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    from docs import draw

    drawn = {path: entry for path, entry in json.loads(draw.DRAWN.read_text()).items() if "panels" in entry}
    printed, figures = draw.run(draw.PAGE)
    assert list(figures) == list(drawn) == pictures_of("concepts.md")
    if hashlib.sha256(Path(heapq.__file__).read_bytes()[-4096:]).hexdigest() != HEAPQ:
        pytest.skip("this Python's heapq.py, the text of the page, differs from that of 3.10 to 3.13")
    words, numbers = numbers_of("".join(draw.blocks_of(draw.PAGE, "text")))
    now_words, now_numbers = numbers_of(printed)
    assert words == now_words
    assert numbers == pytest.approx(now_numbers, abs=0.01)
    for path, figure in figures.items():
        then, now = drawn[path]["panels"], draw.data_of(figure)
        assert [numbers_of(panel["title"])[0] for panel in then] == [numbers_of(panel["title"])[0] for panel in now]
        for old, new in zip(then, now, strict=True):
            assert share_of_equals(old["data"], new["data"]) > 0.98, (path, old["title"])


def share_of_equals(old: list[list[str]], new: list[list[str]]) -> float:
    """How many of a panel's numbers are the same but for rounding; another platform may swap two equal blocks."""
    assert [len(rows) for rows in old] == [len(rows) for rows in new]
    then, now = (torch.tensor([float(x) for rows in data for row in rows for x in row.split()]) for data in (old, new))
    assert then.shape == now.shape
    return float(torch.isclose(then, now, rtol=0.02, atol=1e-3, equal_nan=True).float().mean())


HEAPQ = "08a593fae3924bb710171eda664bf50ab984208706f3772ea3270aeb5e474651"  # its last 4096 bytes, 3.10 to 3.13


def test_pages_are_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    assert sorted(re.findall(r"([\w/]+\.md)", navigation)) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page: str) -> None:
    """What a page calls ``flexproxy.module.name`` is there."""
    for path in set(re.findall(r"`(flexproxy(?:\.\w+)+)(?:\([^`]*\))?`", (DOCS / page).read_text())):
        if path.startswith("flexproxy.integrations.transformers") and find_spec("transformers") is None:
            continue
        parts = path.split(".")
        found: Any = importlib.import_module("flexproxy")
        for depth, part in enumerate(parts[1:], 2):
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:depth]))
            found = getattr(found, part)


def test_figures_of_quality() -> None:
    """Words of the page are those of the committed result; tests/project/test_figures.py has its tables."""
    pytest.importorskip("scipy")
    from docs import figures

    rows = figures.results(figures.QUALITY)["rows"]
    assert (ROOT / "benchmarks/results/quality_smollm2.png").exists()
    words, share = " ".join((DOCS / "quality.md").read_text().split()), shares_lost(rows)
    assert f"{share('prose', '0.25')} % of the bits per byte on prose and {share('code', '0.25')} % on code" in words
    assert f"at 0.12, {share('prose', '0.12')} %, {share('code', '0.12')} %" in words
    needles = figures.results("quality_needle")["rows"]
    right = {row["method"]: f"{100 * row['mean']:.1f}" for row in needles if row["setting"] == "density 0.1"}
    ours, outliers = right["flexproxy P 2, stride 4"], right["flexproxy P 2, outlier 8:1"]
    assert f"flexproxy answers {ours} %, XAttention {right['XAttention']}, FlexPrefill {right['FlexPrefill']}," in words
    assert (
        f"every key it is {outliers} %, with a proxy for each head as well {right['flexproxy P 8, outlier 8:1']} %"
        in words
    )
    choosing = " ".join((DOCS / "choosing.md").read_text().split())
    assert f"{outliers} % of the answers are right at 32K tokens and 0.10 instead of {ours}" in choosing


def test_figures_of_the_notebook() -> None:
    """Every trial has its line; the triples of the other sections are of cells that were measured."""
    pytest.importorskip("scipy")
    from benchmarks.quality import report
    from docs import figures

    rows = figures.results(figures.QUALITY)["rows"]
    dense = {(row["length"], row["task"]): row for row in rows if row["method"] == "dense"}
    found = {}
    for row in rows:
        value = report.shown(row, dense[row["length"], row["task"]])
        assert value is not None
        place = row["method"], row["setting"], row["length"], row["task"]
        found[place] = f"{value.mean:.1f}" if row["metric"] == "exact" else f"{value.mean:+.4f}"

    def cell(method: str, density: str, length: int = 8192) -> str:
        return " / ".join(found[method, density, length, task] for task in ("prose", "code", "single"))

    notebook = (ROOT / "benchmarks/quality/NOTEBOOK.md").read_text()
    trials, _, others = notebook.partition("## Choices of blocks")[2].partition("\n## ")
    shown = set()
    for line in trials.splitlines():
        cells = [x.strip() for x in line.strip("|").split("|")]
        method = f"trial: {cells[0]}" if cells[0] in TRIALS else cells[0]
        if len(cells) == 4 and (method, "density 0.25", 8192, "prose") in found:
            assert cells[2:] == [cell(method, "density 0.25"), cell(method, "density 0.18")], method
            shown.add(method)
    assert {f"trial: {name}" for name in TRIALS} <= shown
    keys = {(method, setting, length) for method, setting, length, _ in found}
    measured = {cell(*key) for key in keys if all((*key, task) in found for task in ("prose", "code", "single"))}
    stated = set(re.findall(r"[+-]\d\.\d{4} / [+-]\d\.\d{4} / \d+\.\d", others))
    assert len(stated) > 20
    assert stated <= measured, stated - measured


def shares_lost(rows: list[Any]) -> Callable[[str, str], str]:
    """What flexproxy loses of the bits per byte at 8K tokens, in percent."""

    def share(task: str, density: str) -> str:
        found = {(r["method"], r["setting"]): r["mean"] for r in rows if (r["length"], r["task"]) == (8192, task)}
        return f"{100 * (found['flexproxy P 3, stride 4', f'density {density}'] / found['dense', ''] - 1):.1f}"

    return share


def documented() -> set[str]:
    """Full names that the API page shows, by its directives and their lists of members."""
    names = set()
    for name, options in re.findall(r"^::: ([\w.]+)\n((?: +.*\n)*)", API, re.MULTILINE):
        members = re.search(r"members: \[([^]]*)\]", options)
        names |= {name} | {f"{name}.{member.strip()}" for member in (members[1].split(",") if members else ())}
    return names


PUBLIC = "", ".masks", ".stats", ".plot", ".ops.implementations", ".integrations.transformers"


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_api(module: str) -> None:
    if module == ".integrations.transformers":
        pytest.importorskip("transformers")
    found, shown = importlib.import_module(f"flexproxy{module}"), documented()
    for name in found.__all__:  # flexproxy.record has two homes
        homes = {f"flexproxy{module}.{name}", *([f"flexproxy.{name}"] if hasattr(flexproxy, name) else [])}
        assert homes & shown, name


def test_every_method_is_in_the_api() -> None:
    """Of the classes that the page lists members of, all public ones."""
    for name, options in re.findall(r"^::: ([\w.]+[A-Z]\w+)\n((?: +.*\n)*)", API, re.MULTILINE):
        module, _, cls = name.rpartition(".")
        found = vars(getattr(importlib.import_module(module), cls))
        methods = {n for n, x in found.items() if isinstance(x, (FunctionType, classmethod)) and n[0] != "_"}
        assert methods <= set(re.findall(r"\w+", options.partition("members:")[2])), name


@pytest.mark.parametrize("path", ["README.md", *(f"docs/{page}" for page in PAGES)])
def test_code_fits_80_columns(path: str) -> None:
    """As do the examples, which ruff holds to it (examples/ruff.toml)."""
    for block in re.findall(r"^ *```.*\n((?:.*\n)*?) *```", (ROOT / path).read_text(), re.MULTILINE):
        assert [line for line in block.splitlines() if len(line) > 80] == []


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Those of the modules of the API, with the methods of their classes."""
    for module in PUBLIC:
        if module == ".integrations.transformers" and find_spec("transformers") is None:
            continue
        found = importlib.import_module(f"flexproxy{module}")
        for name in found.__all__:
            value = getattr(found, name)
            if isinstance(value, type):
                for method, x in vars(value).items():
                    if method[0] != "_" and isinstance(x, (FunctionType, classmethod)):
                        yield f"{name}.{method}", getattr(value, method)
            elif callable(value):
                yield name, value


def test_every_argument_is_described() -> None:
    """By name, in the docstring, which the API shows."""
    missing = [
        f"{name}: {argument}"
        for name, function in public_functions()
        for argument in inspect.signature(function).parameters
        if argument != "self" and not re.search(rf"\b{argument}\b", function.__doc__ or "")
    ]
    assert missing == []


def messages() -> Iterator[tuple[str, str]]:
    """Where the library raises, and the message, with an ellipsis for what is filled in."""
    outside = {"cli", "calibration", "reference.py", "operators.py", "launch.py"}  # the last two speak to developers
    files = sorted((ROOT / "flexproxy").rglob("*.py"))
    for path in (path for path in files if outside.isdisjoint(path.parts)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                message = node.exc.args[0]
                if ast.unparse(node.exc.func) in ("FileExistsError", "AttributeError"):  # as Python says it
                    continue
                parts = message.values if isinstance(message, ast.JoinedStr) else [message]
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "\u2026" for part in parts)
                if "expected \u2026, got" not in text:  # there the code fills in what is expected: a range of integers
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def test_every_error_is_in_the_tables() -> None:
    """The tables of limits.md hold a part of every message that the library raises, and nothing else."""
    section = (DOCS / "limits.md").read_text().partition("## Errors")[2]
    cells = [row.split("|")[2] for row in re.findall(r"^\|.*\|$", section, re.MULTILINE)]
    phrases = [phrase for cell in cells for phrase in re.findall(r"`([^`]+)`", cell)]
    assert len(phrases) > 60
    # It follows "expected", or the argument's name, or the name of a package.
    patterns = {phrase: "(expected |: |^\u2026 )" + re.escape(phrase).replace("\u2026", ".*?") for phrase in phrases}
    found = dict(messages())
    missing = {place: text for place, text in found.items() if not any(re.search(p, text) for p in patterns.values())}
    assert missing == {}, "not in docs/limits.md"
    unused = [phrase for phrase, p in patterns.items() if not any(re.search(p, text) for text in found.values())]
    assert unused == [], "not in the code"


def test_the_map_names_every_file() -> None:
    """CONTRIBUTING.md has a place for each module and folder of the package, and names none that is not there."""
    rows = re.findall(r"^\| (`[^|]+) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    named = {name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    modules = {path.name for path in (ROOT / "flexproxy").iterdir()} - {"__init__.py", "__pycache__", "py.typed"}
    assert named == modules | {"tests", "benchmarks", "examples", "docs"}
