"""Rankings of blocks with flexproxy's budgets: as many blocks as flexproxy's own, and the oracle the best of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flexproxy
from benchmarks.baselines import mean_pooled, oracle, oracle_per_row, random_blocks, sink_recent
from benchmarks.baselines.oracle import block_mass
from flexproxy import ProxyConfig
from tests.baseline_specs import SIZE, inputs

BUDGETED: dict[str, Callable[..., Tensor]] = {
    "oracle": oracle,
    "mean-pooled": mean_pooled,
    "sink + recent": sink_recent,
    "random": random_blocks,
}
SMALL: dict[str, Any] = {"min_budget": 0, "block_size": SIZE}


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("target", [{"gamma": 0.8}, {"gamma": 0.8, "min_budget": 3 * SIZE}, {"density": 0.4}])
def test_rankings_keep_as_much_as_flexproxy(name: str, target: dict[str, float]) -> None:
    """Every row of every head has as many blocks as in flexproxy's own selection; only which ones differs."""
    q, k = inputs(300)
    settings: dict[str, Any] = SMALL | target
    ours = flexproxy.select(q, k, config=ProxyConfig(**settings)).block_map()
    kept = BUDGETED[name](q, k, **settings)
    assert torch.equal(kept.sum(-1), ours.sum(-1))
    assert not torch.equal(kept, ours)


def test_the_oracle_holds_the_most_attention() -> None:
    """At equal budgets no other ranking holds more in any row, and most hold less."""
    q, k = inputs(300)
    mass = block_mass(q, k, SIZE)
    assert torch.allclose(mass.sum(-1), torch.tensor([16.0] * 18 + [12.0]))  # probabilities of a query sum to 1
    held = {name: (mass * ranking(q, k, 0.6, **SMALL)).sum(-1) for name, ranking in BUDGETED.items()}
    for name in BUDGETED.keys() - {"oracle"}:
        assert bool((held[name] <= held["oracle"] + 1e-4).all())
        assert held[name].sum() < 0.95 * held["oracle"].sum()
    per_row = oracle_per_row(q, k, 0.6, **SMALL)
    assert bool(((mass * per_row).sum(-1) >= 0.6 * mass.sum(-1) - 1e-4).all())


def test_random_blocks_are_seeded() -> None:
    """The draw depends on the seed and on nothing else; heads and rows have their own."""
    q, k = inputs(300)
    settings: dict[str, Any] = SMALL | {"density": 0.4}
    kept = random_blocks(q, k, **settings)
    assert torch.equal(random_blocks(q, k, **settings), kept)
    assert not torch.equal(random_blocks(q, k, **settings, seed=1), kept)
    same_budgets: dict[str, Any] = {"gamma": 0.01, "min_budget": 6 * SIZE, "block_size": SIZE}
    kept = random_blocks(q, k, **same_budgets)
    assert torch.equal(random_blocks(k.repeat(1, 2, 1, 1), q[:, :2], **same_budgets), kept)
    assert not torch.equal(kept[:, 0], kept[:, 1])


def test_sink_and_recent_blocks() -> None:
    """The first block and a band: as long as the budget, whatever the queries and keys are."""
    q, k = inputs(160)
    kept = sink_recent(q, k, gamma=0.01, min_budget=3 * SIZE, block_size=SIZE)
    block = torch.arange(10)
    distance = block[:, None] - block
    expected = (distance >= 0) & ((block == 0) | (distance < 2) | (block[:, None] < 3))
    assert torch.equal(kept, expected.expand_as(kept))
