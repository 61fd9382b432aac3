"""Fixtures for all tests."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from flexproxy.ops import implementations

# Without a GPU, Triton kernels run in its interpreter. It decides when a kernel is defined, so before the first import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests compute little at a time: there threads cost more than they save, and far more where others want the cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]

# The command line in a process of its own. A shell's background jobs, and what they start, ignore Ctrl-C: not this one.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from flexproxy.cli import main
sys.exit(main())
"""


# Single parameters that take more than about five seconds on a CPU; whole tests carry the mark themselves.
SLOW = re.compile(
    r"""
      test_selection_equals_the_reference\[interpreter-(?!(24|228)\])
    | test_(new_masks_do_not_recompile|new_values_do_not_recompile|masks_made_inside|masks_made_outside
           |new_block_masks_do_not_recompile_flex_attention)\[cpu-(?!(default|documents|closure\ of\ tensors)\])
    | test_new_lengths_recompile_once\[cpu-(?!documents\])
    | test_an_unwritten_element_is_seen\[interpreter-(?!(ranking|pool)\])
    | test_what_is_not_finite_counts_as_in_pytorch\[interpreter-(?!default-nan)
    | test_nothing_is_read_beyond_the_inputs\[interpreter-(?!15\])
    | test_eager_output_is_dense_attention_under_the_selection\[(?!0\])
    | test_nothing_is_cut_off\[(?!1\])
    """,
    re.VERBOSE,
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW.match(item.name):
            item.add_marker("slow")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device that a test runs on: the CPU, and a GPU where there is one."""
    return str(request.param)


IMPLEMENTATIONS = [
    pytest.param(("cpu", "torch"), id="cpu-torch"),
    pytest.param(
        ("cpu", "triton"),
        id="interpreter",
        marks=pytest.mark.skipif(
            find_spec("triton") is None or torch.cuda.is_available() or not implementations.interpreter_runs(),
            reason="needs triton 3.4, and no GPU",
        ),
    ),
    *(
        pytest.param(
            ("cuda", name),
            id=f"cuda-{name}",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
        )
        for name in ("torch", "triton")
    ),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation of the operators, in use during the test: gives the device."""
    device, name = request.param
    with implementations.use(name):
        yield device
