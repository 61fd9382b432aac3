"""Which implementation carries out the operators: by name, by itself, and never another in silence."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch

import flexproxy
from flexproxy import ProxyConfig, environment
from flexproxy.ops import compat, implementations
from flexproxy.ops.implementations import picked, use

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_cached() -> Iterator[None]:
    """What can run is looked up anew in each test, and after it."""
    implementations._missing.cache_clear()
    yield
    implementations._missing.cache_clear()


def make_machine(monkeypatch: pytest.MonkeyPatch, triton: bool = True, interpreted: bool = False) -> None:
    """A machine with Triton, its interpreter on or off, and one GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    monkeypatch.setattr(implementations, "find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr(implementations, "interpreter_runs", lambda: True)
    monkeypatch.setattr(compat, "IS_ROCM", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize("name", ["Triton", "cuda", "", None, 1])
def test_unknown_names(name: Any) -> None:
    with pytest.raises(ValueError, match=r"name: expected one of \['auto', 'torch', 'triton'\], got .*; 'auto' picks"):
        use(name).__enter__()
    assert implementations._chosen.get() == "auto"


def test_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch on a CPU, also where the interpreter could run; Triton on a GPU."""
    make_machine(monkeypatch, interpreted=True)
    assert picked(CPU) == "torch"
    assert picked(GPU) == "triton"
    assert implementations.automatic(GPU)[0] == "triton"
    with use("torch"):
        assert picked(GPU) == "torch"
    with use("triton"):
        assert picked(CPU) == "triton"


MISSING = {
    "no triton": ({"triton": False}, CPU, r"triton is not installed \(pip install triton\)"),
    "no interpreter": ({}, CPU, "the tensors are on cpu, and TRITON_INTERPRET is not set"),
    "old interpreter": ({}, CPU, r"the interpreter of triton before 3\.4 cannot run the kernels"),
    "old GPU": ({}, GPU, r"cuda:0 has a compute capability below 8\.0"),
    "AMD GPU": ({}, GPU, "on AMD GPUs the kernels have not been tried"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_cannot_run_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, Triton runs or raises an error with the remedy; not asked for, PyTorch runs."""
    machine, device, message = MISSING[name]
    make_machine(monkeypatch, **machine)
    if name == "old GPU":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    if name == "AMD GPU":
        monkeypatch.setattr(compat, "IS_ROCM", True)
    if name == "old interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(implementations, "interpreter_runs", lambda: False)
    assert picked(device) == "torch"
    chosen, why = implementations.automatic(device)
    assert chosen == "torch"
    assert re.match("cpu is not a CUDA device" if device is CPU else f"{message}|cpu is not", why)
    with use("torch"):
        assert picked(device) == "torch"
    with (
        use("triton"),
        pytest.raises(RuntimeError, match=f"^implementation: 'triton' was asked for, but {message}; use"),
    ):
        picked(device)


@pytest.mark.parametrize(
    ("version", "runs"), [("3.1.0", False), ("3.3.1", False), ("3.4.0", True), ("4.0.0+git1", True)]
)
def test_which_interpreter_runs(version: str, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "triton_version", lambda: version)
    assert implementations.interpreter_runs() is runs


@pytest.mark.parametrize("distribution", ["triton", "pytorch-triton", "triton-windows"])
def test_the_version_is_that_of_the_module(distribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever distribution brings it: none of the others is known to the package index."""

    def version(name: str) -> str:
        if name != distribution:
            raise metadata.PackageNotFoundError(name)
        return "0.1"

    module = ModuleType("triton")
    module.__version__, module.__spec__ = "3.5.1+git2", ModuleSpec("triton", None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", module)
    monkeypatch.setattr(metadata, "version", version)
    assert compat.triton_version() == environment.version_of("triton") == "3.5.1+git2"
    assert compat.triton_release() == (3, 5)
    assert implementations.interpreter_runs()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert compat.triton_version() is environment.version_of("triton") is None
    assert not implementations.interpreter_runs()


def test_an_operator_raises_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes from ``build`` as it is."""
    make_machine(monkeypatch)
    q = torch.randn(1, 2, 300, 16)
    with use("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET is not set"):
        flexproxy.build(q, q)
    assert flexproxy.build(q, q).kv_indices.shape == (1, 2, 3, 3)


def test_the_choice_ends_with_its_block() -> None:
    chosen = implementations._chosen
    with use("triton"):
        with use("torch"):
            with use("auto"):
                assert chosen.get() == "auto"
            assert chosen.get() == "torch"
        assert chosen.get() == "triton"
        with pytest.raises(KeyError), use("torch"):
            raise KeyError
        assert chosen.get() == "triton"
        with pytest.raises(ValueError), use("nothing"):  # type: ignore[arg-type]
            pass
        assert chosen.get() == "triton"
    assert chosen.get() == "auto"


def test_threads_do_not_see_the_choice() -> None:
    seen: list[str] = []
    both = threading.Barrier(2)

    def other() -> None:
        seen.append(implementations._chosen.get())
        with use("triton"):
            both.wait(10)  # both have chosen
            both.wait(10)

    thread = threading.Thread(target=other)
    with use("torch"):
        thread.start()
        both.wait(10)
        seen.append(implementations._chosen.get())
        both.wait(10)
        thread.join(10)
    assert seen == ["auto", "torch"]


def test_autocast_changes_nothing(implementation: str) -> None:
    """Scores in 16 bits would select other blocks: autocast is off inside of the operators, and on again behind."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, heads, 100, 16, generator=generator).to(implementation) for heads in (2, 1))
    k = 1 + k / 1000  # blocks that differ by little
    config = ProxyConfig(block_size=16, min_budget=0, gamma=0.7, stride=1)
    plain = flexproxy.select(q, k, config=config)
    with torch.autocast(implementation, dtype=torch.bfloat16):
        assert (q @ q.mT).dtype == torch.bfloat16, "autocast is not on"
        cast = flexproxy.select(q, k, config=config)
        assert (q @ q.mT).dtype == torch.bfloat16
    assert torch.equal(cast.rank, plain.rank)
    assert torch.equal(cast.count, plain.count)
    rounded = flexproxy.select(q.bfloat16().float(), k.bfloat16().float(), config=config)
    assert not torch.equal(rounded.rank, plain.rank), "the case does not tell 16 bits from 32"
