"""Fixtures for all tests."""

from __future__ import annotations

import os

import pytest
import torch

# Workers that each take all cores are far slower than workers that share them.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device that a test runs on: the CPU, and a GPU where there is one."""
    return str(request.param)
