"""Rankings of blocks with flexproxy's budgets: as many blocks as flexproxy's own, and the oracle the best of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

import flexproxy
from benchmarks.baselines.blocks import at_density, below
from benchmarks.baselines.oracle import block_mass, oracle_levels, oracle_per_row_levels
from benchmarks.baselines.rankings import RANKED, mean_pooled_levels, random_levels, sink_recent_levels
from flexproxy import ProxyConfig
from tests.baseline_specs import SIZE, inputs

BUDGETED: dict[str, Callable[..., Tensor]] = {
    "oracle": oracle_levels,
    "mean-pooled": mean_pooled_levels,
    "sink + recent": sink_recent_levels,
    "random": random_levels,
}
DIAGONAL = 0, 1, 0  # what is forced


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("forced", [DIAGONAL, (1, 2, 0), RANKED])
@pytest.mark.parametrize("target", [{"gamma": 0.8}, {"gamma": 0.8, "min_budget": 5 * SIZE}, {"density": 0.4}])
def test_rankings_keep_as_much_as_flexproxy(name: str, forced: tuple[int, int, int], target: dict[str, float]) -> None:
    """Every row of every head has as many blocks as in flexproxy's own selection; only which ones differs."""
    q, k = inputs(300)
    dense = {"dense_last_blocks": forced[2]} if "dense_last_blocks" in {f.name for f in fields(ProxyConfig)} else {}
    if forced[2] and not dense:
        pytest.skip("this ProxyConfig has no dense last rows")
    settings: dict[str, Any] = {"min_budget": 0, "block_size": SIZE, "num_proxies": 1} | target | dense
    ours = flexproxy.select(q, k, config=ProxyConfig(sink_blocks=forced[0], local_blocks=forced[1], **settings))
    levels = BUDGETED[name](q, k, settings["min_budget"], forced, SIZE)
    kept = at_density(levels, 0.4) if "density" in target else below(levels, 0.8)
    assert torch.equal(kept.sum(-1), ours.block_map().sum(-1))
    assert not torch.equal(kept, ours.block_map())


def test_the_oracle_holds_the_most_attention() -> None:
    """At equal budgets no other ranking holds more in any row, and most hold less."""
    q, k = inputs(300)
    mass = block_mass(q, k, SIZE)
    assert torch.allclose(mass.sum(-1), torch.tensor([16.0] * 18 + [12.0]))  # probabilities of a query sum to 1
    held = {name: (mass * below(ranking(q, k, 0, DIAGONAL, SIZE), 0.6)).sum(-1) for name, ranking in BUDGETED.items()}
    for name in BUDGETED.keys() - {"oracle"}:
        assert bool((held[name] <= held["oracle"] + 1e-4).all())
        assert held[name].sum() < 0.95 * held["oracle"].sum()
    per_row = below(oracle_per_row_levels(q, k, 0, DIAGONAL, SIZE), 0.6)
    assert bool(((mass * per_row).sum(-1) >= 0.6 * mass.sum(-1) - 1e-4).all())
    known = oracle_levels(q, k, 0, DIAGONAL, SIZE, mass=mass)
    assert torch.equal(known, oracle_levels(q, k, 0, DIAGONAL, SIZE))


def test_random_blocks_are_seeded() -> None:
    """The draw depends on the seed and on nothing else; heads and rows have their own."""
    q, k = inputs(300)
    kept = at_density(random_levels(q, k, 0, RANKED, SIZE), 0.4)
    assert torch.equal(at_density(random_levels(q, k, 0, RANKED, SIZE), 0.4), kept)
    assert not torch.equal(at_density(random_levels(q, k, 0, RANKED, SIZE, seed=1), 0.4), kept)
    kept = below(random_levels(q, k, 6 * SIZE, DIAGONAL, SIZE), 0.01)
    assert torch.equal(below(random_levels(k.repeat(1, 2, 1, 1), q[:, :2], 6 * SIZE, DIAGONAL, SIZE), 0.01), kept)
    assert not torch.equal(kept[:, 0], kept[:, 1])


def test_sink_and_recent_blocks() -> None:
    """The first block and a band: as long as the budget, whatever the queries and keys are."""
    q, k = inputs(160)
    kept = below(sink_recent_levels(q, k, 3 * SIZE, DIAGONAL, SIZE), 0.01)
    block = torch.arange(10)
    distance = block[:, None] - block
    expected = (distance >= 0) & ((block == 0) | (distance < 2) | (block[:, None] < 3))
    assert torch.equal(kept, expected.expand_as(kept))
    dense_end = below(sink_recent_levels(q, k, 3 * SIZE, RANKED, SIZE), 0.01)
    assert torch.equal(dense_end, (expected | (block[:, None] == 9) & (distance >= 0)).expand_as(kept))
