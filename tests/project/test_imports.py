"""What is imported by what: dependencies, the order of the rooms, and no look at values on the way to a mask.

The rules read the text of the package, so what is imported inside of a function counts. Imports for a type checker
alone do not.
"""

from __future__ import annotations

import ast
import graphlib
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flexproxy

PACKAGE = Path(flexproxy.__file__).parent
STAGES = ("proxy", "scores", "ranking", "budget", "documents", "sharing", "lists")

# A module imports from its own line and from those above. The longest name that fits decides; "" is the package itself.
ROOMS = (
    ("config", "files"),
    ("ops",),
    ("masks",),
    ("checks", "reference"),
    ("stages",),
    ("plan", "sparse.kernel", "sparse.kernel_options", "sparse.plan"),
    ("selection", "pipeline", "replay", "building", "inspect.summary"),
    ("sparse",),
    ("",),
    ("environment", "stats", "inspect"),
    ("plot",),
    ("integrations",),
    ("inspect.recording", "calibration"),
    ("cli", "__main__"),
)

# These wait for the device, or give a tensor whose shape depends on values.
WAITING = """allclose argwhere as_tensor bincount cpu equal is_nonzero item masked_select nonzero nonzero_static numpy
    repeat_interleave synchronize tensor tolist unique unique_consecutive""".split()  # noqa: SIM905


def name_of(path: Path) -> str:
    """``stages.scores``; ``masks`` of masks/__init__.py; "" of the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


TREES = {name_of(path): ast.parse(path.read_text(), str(path)) for path in sorted(PACKAGE.rglob("*.py"))}


def folder_of(module: str) -> str:
    is_package = (PACKAGE / module.replace(".", "/") / "__init__.py").exists()
    return module if is_package else module.rpartition(".")[0]


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Module and name of everything that a tree imports; the name is "" where a whole module is."""
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from ((str(node.module), alias.name) for alias in node.names)


def own_imports(module: str) -> Iterator[tuple[str, str]]:
    """Modules of flexproxy that a module imports, and the name that it takes from each."""
    for source, name in imported_names(TREES[module]):
        top, _, rest = source.partition(".")
        if top == "flexproxy":
            inner = f"{rest}.{name}".strip(".")
            yield (inner, "") if inner in TREES else (rest, name)


GRAPH = {module: {source for source, _ in own_imports(module)} for module in TREES}


def reached_from(module: str) -> set[str]:
    found, waiting = {module}, [module]
    while waiting:
        new = GRAPH[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def room_of(module: str) -> int:
    fits = {
        name: level
        for level, names in enumerate(ROOMS)
        for name in names
        if module == name or (name and module.startswith(f"{name}."))
    }
    return fits[max(fits, key=len)]


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call, with the last part of the function's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
            yield node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id, node


def root_of(node: ast.AST) -> str | None:
    """``torch`` of ``torch._dynamo.config``."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


CORE = reached_from("")
KERNELS = sorted(module for module in TREES if module.startswith("ops.kernels."))
BUILD_PATH = sorted(reached_from("building") - {"inspect.summary"})  # Selection.summary reads values back


def test_import_needs_torch_and_einops_only() -> None:
    """In a fresh interpreter, flexproxy adds nothing of what is optional, warns of nothing and leaves CUDA alone."""
    program = """
import json, sys, warnings
import torch, torch.nn.attention.flex_attention, einops
before = set(sys.modules)
warnings.simplefilter("error")
import flexproxy
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"new": sorted(new - set(sys.stdlib_module_names)), "cuda": torch.cuda.is_initialized()}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["new"]) - {"torch"} == {"flexproxy"}  # torch loads some of its own modules lazily
    assert result["cuda"] is False


def test_core_imports_only_what_is_required() -> None:
    """Nothing that ``import flexproxy`` reaches imports a package besides torch and einops, not even in a function."""
    allowed = {*sys.stdlib_module_names, "torch", "einops", "flexproxy"}
    assert {"sparse.attention", "masks.blocks", *(f"stages.{stage}" for stage in STAGES)} <= CORE
    for module in sorted(CORE):
        assert {source.partition(".")[0] for source, _ in imported_names(TREES[module])} <= allowed, module


def test_no_circles() -> None:
    graphlib.TopologicalSorter(GRAPH).prepare()


def test_arrows_point_one_way() -> None:
    """A module imports from its own room and from those before it; see ROOMS."""
    wrong = {f"{a} -> {b}" for a in GRAPH for b in GRAPH[a] if room_of(b) > room_of(a)}
    assert sorted(wrong) == []


def test_stages_import_no_stage() -> None:
    """A stage is a function of tensors; the pipeline composes them."""
    wrong = {f"{a} -> {b}" for a in GRAPH for b in GRAPH[a] if a.startswith("stages.") and b.startswith("stages.")}
    assert sorted(wrong) == []
    assert {module for module in TREES if module.startswith("stages.")} == {f"stages.{stage}" for stage in STAGES}
    assert {f"stages.{stage}" for stage in STAGES} <= reached_from("pipeline")


def test_the_specification_stands_alone() -> None:
    """It shares nothing with what is tested against it but the type of a mask."""
    assert set(own_imports("reference")) <= {("masks.structure", "MaskMod")}
    assert "reference" not in CORE


def test_an_underscore_stays_in_its_folder() -> None:
    """What begins with one is imported in its own folder alone, and so are such attributes used."""
    wrong = set()
    defined: dict[str, set[str]] = {}
    for module, tree in TREES.items():
        names = defined.setdefault(folder_of(module), {"_replace", "_asdict"})
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
                names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    for module, tree in TREES.items():
        for source, name in own_imports(module):
            if any(map(is_private, (*source.split("."), name))) and folder_of(source) != folder_of(module):
                wrong.add(f"{module}: {source}.{name}")
        used = {x.attr for x in ast.walk(tree) if isinstance(x, ast.Attribute) and root_of(x) != "torch"}
        wrong |= {f"{module}: {name}" for name in filter(is_private, used - defined[folder_of(module)])}
    assert sorted(wrong) == []


def test_no_module_is_hidden() -> None:
    """No function takes the place of a module of its name."""
    for module in TREES.keys() - {"", "__main__"}:
        name = f"flexproxy.{module}"
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError:  # what it needs is not installed
            continue
        assert getattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2]) is found, name


def test_at_most_eight_positional_parameters() -> None:
    """Kernels, which Triton calls, excepted."""
    wrong = {
        f"{module}.{node.name}"
        for module, tree in TREES.items()
        if module not in KERNELS
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if len(node.args.posonlyargs) + len(node.args.args) > 8
    }
    assert sorted(wrong) == []


def test_only_compat_looks_at_torch() -> None:
    """Versions and capabilities of torch are looked at in one file."""

    def looks(tree: ast.AST) -> bool:
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and root_of(node) == "torch"]
        asked = [node for name, node in calls(tree) if name in ("hasattr", "getattr", "signature") and node.args]
        names = ("torch", "flex", "F", "flex_attention", "BlockMask")
        return (
            any(node.attr in ("__version__", "version") for node in attributes)
            or any(node.attr == "config" and "_dynamo" in ast.unparse(node) for node in attributes)
            or any(root_of(node.args[0]) in names for node in asked)
        )

    assert {module for module, tree in TREES.items() if looks(tree)} == {"ops.compat"}


@pytest.mark.parametrize("module", [*BUILD_PATH, *KERNELS])
def test_nothing_waits_for_the_device(module: str) -> None:
    """No call on the way to a mask or to means reads a value back or copies from the host; no shape depends on one."""
    found = [
        f"{node.lineno}: {name}"
        for name, node in calls(TREES[module])
        if name in WAITING or (name == "where" and len(node.args) + len(node.keywords) < 3)
    ]
    assert not found


def test_neither_asserts_nor_prints_nor_knows_where_it_is() -> None:
    """Checks survive ``python -O``, a library is silent, and the package does not know a repository around it."""
    wrong = set()
    for module, tree in TREES.items():
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        if module not in KERNELS and any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
            wrong.add(f"{module}: assert")
        if "print" in names and room_of(module) < room_of("cli"):
            wrong.add(f"{module}: print")
        if "__file__" in names or "sys.path" in ast.unparse(tree):
            wrong.add(f"{module}: path")
    assert sorted(wrong) == []
