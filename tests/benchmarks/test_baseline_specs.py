"""The selections of benchmarks/baselines equal their specifications, which see planted mistakes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import (
    flashprefill,
    flashprefill_v2,
    flexprefill,
    mean_correction,
    prism,
    xattention,
)
from benchmarks.baselines.blocks import below
from benchmarks.baselines.oracle import oracle_levels, oracle_per_row_levels
from benchmarks.baselines.rankings import mean_pooled_levels, sink_recent_levels
from tests.baseline_specs import (
    DIM,
    LENGTHS,
    SIZE,
    block_mass_spec,
    budget_spec,
    flashprefill_spec,
    flashprefill_v2_spec,
    flexprefill_spec,
    heads_of,
    inputs,
    mean_correction_spec,
    mean_pooled_spec,
    per_row_spec,
    prism_spec,
    ranked_spec,
    sink_recent_spec,
    xattention_spec,
)

Spec = Callable[[Tensor, Tensor, bool], Tensor]
RANKINGS: dict[Callable[..., Tensor], Spec] = {
    oracle_levels: block_mass_spec,
    mean_pooled_levels: mean_pooled_spec,
    sink_recent_levels: lambda q, k, mistake: sink_recent_spec(q, mistake),
}
DIAGONAL = 0, 1, 0  # what is forced


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.8, 0.95])
def test_xattention_equals_its_specification(length: int, threshold: float) -> None:
    q, k = inputs(length)
    kept = xattention(q, k, threshold, stride=4, block_size=SIZE)
    for b, h, q_head, k_head in heads_of(q, k):
        assert torch.equal(kept[b, h], xattention_spec(q_head, k_head, threshold, 4, mistake=False))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("alpha", "always"), [(0.12, (2, 4, 2)), (0.12, (0, 1, 0)), (0.5, (1, 2, 1)), (0.9, (0, 1, 0))]
)
def test_flashprefill_equals_its_specification(length: int, alpha: float, always: tuple[int, int, int]) -> None:
    q, k = inputs(length)
    kept = flashprefill(q, k, alpha, *always, block_size=SIZE)
    for b, h, q_head, k_head in heads_of(q, k):
        assert torch.equal(kept[b, h], flashprefill_spec(q_head, k_head, alpha, *always, mistake=False))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.8])
def test_flashprefill_v2_equals_its_specification(length: int, alpha: float) -> None:
    q, k = inputs(length)
    kept = flashprefill_v2(q, k, alpha, 0, 1, 0, block_size=SIZE)
    for b, group in itertools.product(range(2), range(2)):
        heads = slice(2 * group, 2 * group + 2)
        expected = flashprefill_v2_spec(q[b, heads].double(), k[b, group].double(), alpha, mistake=False)
        assert torch.equal(kept[b, heads], expected.expand(2, -1, -1))


def test_mean_correction_equals_its_specification() -> None:
    """And not what it would be with a block counted as one token."""
    q, k = inputs(100)
    _, v = inputs(100, seed=1)
    kept = flashprefill_v2(q, k, 0.5, 0, 1, 0, block_size=SIZE)
    tokens = kept.repeat_interleave(SIZE, 2).repeat_interleave(SIZE, 3)[..., :100, :100].tril()
    logits = (q @ k.repeat_interleave(2, 1).mT / DIM**0.5).masked_fill(~tokens, -torch.inf)
    out = logits.softmax(-1) @ v.repeat_interleave(2, 1)
    corrected = mean_correction(q, k, v, out, logits.logsumexp(-1), kept, SIZE).double()
    for b, h, q_head, k_head in heads_of(q, k):
        expected, wrong = (
            mean_correction_spec(q_head, k_head, v[b, h // 2].double(), kept[b, h], mistake)
            for mistake in (False, True)
        )
        assert torch.allclose(corrected[b, h], expected, atol=1e-5)
        assert not torch.allclose(corrected[b, h], wrong, atol=1e-3)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("gamma", [0.3, 0.9])
@pytest.mark.parametrize(("tau", "min_blocks"), [(0.0, 0), (0.0, 2), (0.2, 0), (0.2, 2), (2.0, 1)])
def test_flexprefill_equals_its_specification(length: int, gamma: float, tau: float, min_blocks: int) -> None:
    q, k = inputs(length)
    kept = flexprefill(q, k, gamma, tau, min_blocks * SIZE, block_size=SIZE)
    for b, h, q_head, k_head in heads_of(q, k):
        assert torch.equal(kept[b, h], flexprefill_spec(q_head, k_head, gamma, tau, min_blocks, mistake=False))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("p", [0.2, 0.6, 0.9])
@pytest.mark.parametrize(("high", "low"), [(16, 24), (8, 24), (32, 2)])
def test_prism_equals_its_specification(length: int, p: float, high: int, low: int) -> None:
    q, k = inputs(length)
    q, k = 4 * q, 4 * k  # means of noise are small
    kept = prism(q, k, p, high, low, block_size=SIZE)
    for b, h, q_head, k_head in heads_of(q, k):
        assert torch.equal(kept[b, h], prism_spec(q_head, k_head, p, high, low, mistake=False))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("gamma", "min_blocks"), [(0.4, 0), (0.8, 0), (0.4, 3), (1.0, 0)])
@pytest.mark.parametrize("ranking", RANKINGS)
def test_rankings_with_budgets_equal_their_specifications(
    ranking: Callable[..., Tensor], length: int, gamma: float, min_blocks: int
) -> None:
    q, k = inputs(length)
    kept = below(ranking(q, k, min_blocks * SIZE, DIAGONAL, SIZE), gamma)
    for b, h, q_head, k_head in heads_of(q, k):
        score, count = RANKINGS[ranking](q_head, k_head, False), budget_spec(q_head, k_head, gamma, min_blocks)
        assert torch.equal(kept[b, h], ranked_spec(score, count))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("coverage", "min_blocks"), [(0.3, 0), (0.8, 0), (0.3, 3), (1.0, 0)])
def test_the_oracle_per_row_equals_its_specification(length: int, coverage: float, min_blocks: int) -> None:
    q, k = inputs(length)
    kept = below(oracle_per_row_levels(q, k, min_blocks * SIZE, DIAGONAL, SIZE), coverage)
    for b, h, q_head, k_head in heads_of(q, k):
        assert torch.equal(kept[b, h], per_row_spec(q_head, k_head, coverage, min_blocks, mistake=False))


def test_the_specifications_see_mistakes() -> None:
    """Each would be found.

    Diagonals for antidiagonals, blocks that look ahead, a band without its second diagonal, bands of other dimensions.
    """
    q, k = inputs(160)
    b, h, q_head, k_head = next(heads_of(q, k))
    assert not torch.equal(
        xattention(q, k, 0.5, stride=4, block_size=SIZE)[b, h], xattention_spec(q_head, k_head, 0.5, 4, mistake=True)
    )
    assert not torch.equal(
        flashprefill(q, k, 0.5, 0, 1, 0, SIZE)[b, h], flashprefill_spec(q_head, k_head, 0.5, 0, 1, 0, mistake=True)
    )
    assert not torch.equal(
        flexprefill(q, k, 0.5, 0.0, 0, SIZE)[b, h], flexprefill_spec(q_head, k_head, 0.5, 0.0, 0, mistake=True)
    )
    kept = flashprefill_v2(q, k, 0.8, 0, 1, 0, SIZE)[b, h]
    assert not torch.equal(kept, flashprefill_v2_spec(q[b, :2].double(), k_head, 0.8, mistake=True))
    assert not torch.equal(kept, flashprefill_v2_spec(q_head[None], k_head, 0.8, mistake=False))  # of one head alone
    kept, wrong = prism(q, k, 0.5, block_size=SIZE)[b, h], prism_spec(q_head, k_head, 0.5, 16, 24, mistake=True)
    assert not torch.equal(kept, wrong)


def test_flexprefill_heads_choose_differently() -> None:
    """At a tau of the specification's cases some heads are query-aware and some are not."""
    q, k = inputs(160)
    none, some, every = (flexprefill(q, k, 0.7, tau, 0, block_size=SIZE) for tau in (0.0, 0.2, 2.0))
    as_none, as_every = (some == none).all((-1, -2)), (some == every).all((-1, -2))
    assert bool((as_none | as_every).all())
    assert bool(as_none.any())
    assert bool(as_every.any())
    assert not torch.equal(none, every)


def test_the_specifications_of_rankings_see_mistakes() -> None:
    """The maximum for the sum or the mean, a window without the first block, a diagonal on top of what is counted."""
    q, k = inputs(160)
    b, h, q_head, k_head = next(heads_of(q, k))
    count = budget_spec(q_head, k_head, 0.4, 0)
    for ranking, spec in RANKINGS.items():
        kept = below(ranking(q, k, 0, DIAGONAL, SIZE), 0.4)[b, h]
        assert not torch.equal(kept, ranked_spec(spec(q_head, k_head, True), count))
        assert not torch.equal(kept, ranked_spec(spec(q_head, k_head, False), count + 1))
    kept = below(oracle_per_row_levels(q, k, 0, DIAGONAL, SIZE), 0.5)[b, h]
    assert not torch.equal(kept, per_row_spec(q_head, k_head, 0.5, 0, mistake=True))
