"""Reading queries and keys again and again gives what the operators give."""

from __future__ import annotations

import pytest
import torch

from flexproxy import ProxyConfig
from flexproxy.ops import implementations
from flexproxy.ops.operators import kernels
from flexproxy.pipeline import read, read_mask
from flexproxy.plan import plan_estimate
from flexproxy.stages.proxy import flat


@pytest.mark.parametrize("groups", [None, (0, 1, 1, 0)])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(90, 90), (40, 130), (257, 257)])
def test_reads_are_those_of_the_operators(
    num_queries: int, num_keys: int, groups: tuple[int, ...] | None, implementation: str
) -> None:
    device = implementation
    if implementations.chosen() != "triton":
        pytest.skip("a reader is made of kernels")
    config = ProxyConfig(block_size=32, stride=2, groups=groups, min_budget=32)
    rng = torch.Generator().manual_seed(num_keys)
    reader = None
    for n in range(6):  # into the same memory; from the third time on the launches are those of before
        q = torch.randn(2, 4, num_queries, 16, generator=rng).to(device)
        if n == 4:  # another layout
            q = q.transpose(1, 2).contiguous().transpose(1, 2)
        k = torch.randn(2, num_keys, 4, 16, generator=rng).to(device).transpose(1, 2)
        plan = plan_estimate((q, k), None, None, (config, None))
        mask = read_mask(None, None, plan.frame, q.device)
        if reader is None:
            pools = [(*flat(x), 2) for x in (plan.frame.groups, plan.key_groups)]
            reader = kernels().Reader(pools, mask.probes, mask.probed, mask.head_rows, 32, plan.scale)
        reader.read(q, k)
        for ours, theirs in zip((*reader.proxies(), reader.masses()), read(q, k, mask, plan), strict=True):
            assert theirs is not None
            assert torch.equal(ours, theirs)
