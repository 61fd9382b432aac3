"""What is imported by what: dependencies, layers, the public names, and no look at values on the way to a mask."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flexproxy
from flexproxy import ProxyConfig, Selection, masks

PACKAGE = Path(flexproxy.__file__).parent
STAGES = ("proxy", "scores", "budget", "ranking")
FOUNDATIONS = {"_ops", "_kept", "_tensors", "_compat", "implementations", "clauses", "admissible", "config", "masks"}

# These wait for the device, or give a tensor whose shape depends on values.
WAITING = {
    "allclose",
    "argwhere",
    "as_tensor",
    "bincount",
    "cpu",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "nonzero_static",
    "numpy",
    "repeat_interleave",
    "synchronize",
    "tensor",
    "tolist",
    "unique",
    "unique_consecutive",
}


def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(), module)


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Full names of the modules that a tree imports, also inside functions; ``from x import y`` gives x and x.y.

    What is imported for a type checker alone does not count.
    """
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """Modules of flexproxy that a module of flexproxy imports."""
    names = {name.removeprefix("flexproxy.").split(".")[0] for name in imported_names(tree_of(module)) if is_own(name)}
    return {name for name in names if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()}


def is_own(name: str) -> bool:
    return name.startswith("flexproxy.")


def reached_from(module: str) -> set[str]:
    """Modules of flexproxy that importing a module imports, by their text."""
    found: set[str] = set()
    waiting = own_imports(module)
    while waiting:
        module = waiting.pop()
        found.add(module)
        waiting |= own_imports(module) - found
    return found


def core() -> set[str]:
    return reached_from("__init__")


# Selection.summary() reads values back, as it says, and is not on the way to a mask.
BUILD_PATH = sorted((reached_from("pipeline") | {"pipeline"}) - {"summary"})
KERNELS = sorted(f"kernels/{path.stem}" for path in (PACKAGE / "kernels").glob("*.py"))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call, with the last part of the function's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield node.func.attr, node
            elif isinstance(node.func, ast.Name):
                yield node.func.id, node


def root_of(node: ast.AST) -> str | None:
    """``torch`` of ``torch._dynamo.config``."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


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
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=PACKAGE.parent, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["new"]) - {"torch"} == {"flexproxy"}  # torch loads some of its own modules lazily
    assert result["cuda"] is False


def test_public_names() -> None:
    """The public names are those of API.md, and each is there and described."""
    assert sorted(flexproxy.__all__) == [
        "ProxyConfig",
        "Selection",
        "and_block_masks",
        "attention",
        "build",
        "calibrate",
        "kernel_options",
        "masks",
        "record",
        "select",
    ]
    assert sorted(masks.__all__) == ["causal", "document", "full", "padding", "prefix_lm", "shift", "sliding_window"]
    for module in (flexproxy, masks):
        for name in module.__all__:
            assert getattr(module, name).__doc__, name


@pytest.mark.parametrize(
    ("name", "parameters"),
    {
        "build": "q, k, *, mask_mod=None, block_mask=None, config=None, scale=None",
        "select": "q, k, *, mask_mod=None, block_mask=None, config=None, scale=None",
        "attention": "q, k, v, *, mask_mod=None, block_mask=None, config=None, scale=None, score_mod=None, "
        "kernel_options=None, return_lse=False, compensate=False",
        "ProxyConfig.paper": "**changes",
        "kernel_options": "q, k",
        "and_block_masks": "a, b",
        "calibrate": "model, texts, *, density=None, quality=None, config=None, length=None, sequences=4, "
        "max_proxies=8, tolerance=0.03, rows=512, progress=None",
        "masks.causal": "b, h, q_idx, kv_idx",
        "masks.full": "b, h, q_idx, kv_idx",
        "masks.sliding_window": "window",
        "masks.document": "document_ids",
        "masks.padding": "attention_mask",
        "masks.prefix_lm": "prefix_lengths",
        "masks.shift": "mask_mod, q_offset",
        "record": "model, *, mass=False",
        "Selection.block_map": "self",
        "Selection.density": "self",
        "Selection.mask_mod": "self",
        "Selection.block_mask": "self",
        "Selection.summary": "self",
    }.items(),
)
def test_signatures(name: str, parameters: str) -> None:
    """Names, order, kinds and defaults of parameters are those of API.md."""
    function: object = flexproxy
    for part in name.split("."):
        function = getattr(function, part)
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == f"({parameters})"


def test_fields() -> None:
    """The fields and defaults of ProxyConfig, and the public fields of Selection, are those of API.md."""
    assert {field.name: field.default for field in dataclasses.fields(ProxyConfig)} == {
        "num_proxies": 1,
        "groups": None,
        "gamma": 0.95,
        "density": None,
        "stride": 4,
        "query_stride": None,
        "query_choice": "first",
        "block_size": 128,
        "min_budget": 2048,
        "max_budget": None,
        "sink_blocks": 0,
        "local_blocks": 1,
    }
    assert [f.name for f in dataclasses.fields(Selection) if not f.name.startswith("_")] == [
        "rank",
        "count",
        "proxy_of",
    ]


def test_core_imports_only_what_is_required() -> None:
    """Nothing that ``import flexproxy`` reaches imports a package besides torch and einops, not even in a function."""
    allowed = set(sys.stdlib_module_names) | {"torch", "einops", "flexproxy"}
    assert {"attention", *BUILD_PATH} <= core()
    assert {*STAGES, *FOUNDATIONS, "block_mask", "pipeline", "selection"} <= set(BUILD_PATH)
    assert not core() & {
        "calibration",
        "cli",
        "demo",
        "reference",
        "needle",
        "integrations",
        "stats",
        "plot",
        "recording",
    }
    for module in sorted(core()):
        foreign = {name.partition(".")[0] for name in imported_names(tree_of(module))} - allowed
        assert not foreign, f"{module} imports {foreign}"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_do_not_import_one_another(stage: str) -> None:
    """A stage is a function of tensors; the pipeline alone composes stages."""
    assert own_imports(stage) <= FOUNDATIONS, own_imports(stage)
    assert set(STAGES) <= own_imports("pipeline")


def test_foundations_import_no_stage() -> None:
    """The arrows point one way: what the stages stand on knows none of them, nor the pipeline."""
    for module in sorted(FOUNDATIONS):
        assert own_imports(module) <= FOUNDATIONS, f"{module}: {own_imports(module)}"


def test_kernels_know_no_stage() -> None:
    """A kernel stands in for an operator: it needs what the stages stand on, other kernels, and Triton."""
    assert len(KERNELS) > 5
    for module in KERNELS:
        own = own_imports(module)
        assert own <= FOUNDATIONS | {"kernels"}, f"{module}: {own}"
        foreign = {name.partition(".")[0] for name in imported_names(tree_of(module))} - set(sys.stdlib_module_names)
        assert foreign <= {"torch", "triton", "flexproxy"}, f"{module} imports {foreign}"


def test_reference_is_independent() -> None:
    """The specification shares nothing with what is tested against it but the type of a mask."""
    own = {name for name in imported_names(tree_of("reference")) if name.startswith("flexproxy")}
    assert own == {"flexproxy.masks.mods", "flexproxy.masks.mods.MaskMod"}
    assert "reference" not in core()


def test_only_compat_looks_at_torch() -> None:
    """Versions and capabilities of torch are looked at in one file."""
    looked = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        here = [
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and root_of(node) == "torch"
            and (node.attr in ("__version__", "version") or (node.attr == "config" and "_dynamo" in ast.unparse(node)))
        ]
        here += [
            node.lineno
            for name, node in calls(tree)
            if name in ("hasattr", "getattr", "signature")
            and node.args
            and root_of(node.args[0]) in ("torch", "flex", "F", "flex_attention", "BlockMask")
        ]
        looked += [f"{path.name}:{line}" for line in here if path.name != "_compat.py"]
        assert path.name != "_compat.py" or here, "the scan does not see what _compat does"
    assert not looked


@pytest.mark.parametrize("module", [*BUILD_PATH, "compensation", *KERNELS])
def test_nothing_waits_for_the_device(module: str) -> None:
    """No call on the way to a mask or to means reads a value back or copies from the host; no shape depends on one."""
    found = [
        f"{node.lineno}: {name}"
        for name, node in calls(tree_of(module))
        if name in WAITING or (name == "where" and len(node.args) + len(node.keywords) < 3)
    ]
    assert not found


def test_no_assert_for_what_a_user_passes() -> None:
    """Checks of arguments survive ``python -O``."""
    modules = ["_checks", "config", "masks", "attention", "pipeline", "block_mask", "stats", "summary", "totals"]
    for module in modules + [f"plot/{name}" for name in ("blocks", "layers", "figures")]:
        assert not [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.Assert)], module


def test_no_print() -> None:
    """A library is silent."""
    for module in sorted(core()):
        assert "print" not in {name for name, _ in calls(tree_of(module))}, module


def test_the_scans_see_mistakes() -> None:
    """Each scan above finds its mistake in a text that has it."""
    tree = ast.parse(
        "def f(x):\n"
        "    import transformers\n"
        "    from flexproxy import scores\n"
        "    from flexproxy.stages.budget import clip_counts\n"
        "    hasattr(torch.nn, 'x')\n"
        "    return x.cpu().sum().item(), torch.where(x), torch._dynamo.config\n"
        "if TYPE_CHECKING:\n"
        "    import matplotlib\n"
    )
    assert set(imported_names(tree)) == {
        "transformers",
        "flexproxy",
        "flexproxy.stages.scores",
        "flexproxy.stages.budget",
        "flexproxy.stages.budget.clip_counts",
    }
    assert {"cpu", "item", "where", "hasattr"} <= {name for name, _ in calls(tree)}
    assert [root_of(node.args[0]) for name, node in calls(tree) if name == "hasattr"] == ["torch"]
