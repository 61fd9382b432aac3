"""Examples, on a CPU: each runs from top to bottom, finds its own claim true, and prints what it found."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.accuracy import skip_unless_flex_compiles

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# What each script prints, as a pattern; numbers differ from platform to platform.
PRINTED = {
    "quickstart": r"every head:( 0\.\d\d){8}\nmean density 0\.\d{3}, error of the output 0\.0\d\d of its norm\n",
    "composing_masks": r"allowed: +625750\n.*head by head:( +\d+){4}\nblocks kept / admissible: +0\.\d{3}\n",
    "chunked_prefill": r"gamma 1\.0: .*( 1\.000){4} error .*e-0[5-9]\ngamma 0\.9: .*( 0\.\d{3}){4} error .*e-02\n",
    "padded_batch": r"( +(1000|424|637) tokens: density 0\.\d{3}, largest difference alone \d\.\de[+-]\d\d\n){3}",
    "reading_a_selection": r"8 query heads, 2 proxies.*\n   7      1 .*[#.]{32}\n\nmass .* 0\.\d{3} to 0\.\d{3}",
    "compare_with_dense": r"( 0\.80 .*)\n( 0\.95 .*)\n( 1\.00    1\.000 .* 0\.0000 +0\.0000)\n",
}
OF_THE_NEEDLE_MODEL = ("reading_a_selection", "compare_with_dense")


@pytest.mark.parametrize("name", PRINTED)
def test_script(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if name == "quickstart":
        skip_unless_flex_compiles("cpu")
    if name in OF_THE_NEEDLE_MODEL:
        pytest.importorskip("transformers")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(PRINTED[name], capsys.readouterr().out, re.DOTALL)


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PRINTED, "context_parallel"}


@pytest.mark.slow
def test_context_parallel() -> None:
    """Two ranks, gloo."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(EXAMPLES / "context_parallel.py")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = r"2 ranks, 2048 tokens, density 0\.\d{3}\nblocks of each rank:( \d+){2}\n.* one process: (\S+)\n"
    found = re.search(printed, done.stdout)
    assert found, done.stdout
    assert float(found[2]) < 1e-5
