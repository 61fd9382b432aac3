"""The Triton kernels compile for a GPU that is not here: the interpreter accepts much that the compiler does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.tools.tensor_descriptor", reason="needs triton 3.3 or later")
ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, without the interpreter that the tests turn on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
        timeout=500,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "memory"), [("80", 99), ("90", 227), ("120", 99)])
def test_every_kernel_compiles(capability: str, memory: int) -> None:
    """Without and with TMA; memory: KiB that a program has on the smallest GPUs of that generation."""
    done = run("-m", "tests.compile_kernels", capability, "--only", "bfloat16", "64")
    assert done.returncode == 0, done.stderr[-3000:]
    number, shared = (int(word) for word in done.stdout.split() if word.isdigit())
    assert number > 30
    assert shared <= memory * 1024


PLANTED = """
import triton
import triton.language as tl

@triton.jit
def kernel(x, n, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.arange(0, BLOCK) + tl.arange(0, BLOCK // 2), mask=tl.arange(0, BLOCK) < n)
"""


@pytest.mark.slow
@pytest.mark.parametrize("planted", [True, False])
def test_a_kernel_that_does_not_compile_is_seen(planted: bool, tmp_path: Path) -> None:
    """Two shapes that do not go together are an error; the same kernel without them compiles."""
    text = PLANTED if planted else PLANTED.replace(" // 2", "")
    (tmp_path / "planted.py").write_text(text)
    program = f"""
import sys, torch
sys.path.insert(0, {str(tmp_path)!r})
from planted import kernel
from tests.compile_kernels import compile_for
compile_for(kernel, 90, (torch.zeros(16, dtype=torch.int32), 5, 16), {{}})
"""
    done = run("-c", program)
    assert (done.returncode != 0) is planted, done.stderr[-3000:]
    assert ("CompilationError" in done.stderr) is planted
