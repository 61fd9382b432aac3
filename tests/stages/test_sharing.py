"""One budget for the rows and heads of a sequence, beyond what random selections meet."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flexproxy
from flexproxy import ProxyConfig, masks, pipeline, reference
from flexproxy.masks.blocks import summarize_rows
from flexproxy.ops import row_summary
from flexproxy.stages.sharing import shared_counts, total_blocks


def on(device: str, *arguments: Any) -> Any:
    return [x.to(device) if isinstance(x, Tensor) else x for x in arguments]


def random_scores(generator: torch.Generator, *shape: int) -> Tensor:
    """Around 0 and far below, many at the borders of a step, some equal, some without a number."""
    scores = -80 * torch.rand(shape, generator=generator) ** 4
    on_border = torch.rand(shape, generator=generator) < 0.3
    scores = torch.where(on_border, (scores * 64).round() / 64, scores)
    for value in (-math.inf, math.nan, -64.0, -64 + 2**-7, -64 + 2**-6, 0.0, -0.0, 1e-6, -3e38):
        scores[torch.rand(shape, generator=generator) < 0.03] = value
    return scores


@pytest.mark.parametrize("seed", range(12))
def test_counts_equal_the_reference(seed: int, implementation: str) -> None:
    """Any scores, totals from nothing to everything, bounds that bind, rows without a forced block, dense rows."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, rows, blocks = rng.choice([1, 2]), 5, rng.choice([7, 40])
    heads, own_masks = 4, seed % 3 == 0
    groups = [[0], [1], [2], [3]] if own_masks else rng.choice([[[2, 0], [3, 1]], [[0, 1, 2, 3]], [[3], [1], [0], [2]]])
    shape = (batch if seed % 2 else 1), (heads if own_masks else 1), rows, blocks
    admissible = torch.rand(shape, generator=generator) < rng.choice([0.5, 0.9])
    admissible[..., 1, :] = False
    forced = admissible & (torch.rand(shape, generator=generator) < rng.choice([0.0, 0.1]))
    dense = torch.rand(shape[:3], generator=generator) < 0.2
    scores = random_scores(generator, batch, len(groups), rows, blocks)
    some, force = (x.expand(batch, len(groups), -1, -1) for x in (admissible, forced))
    rank = reference.rank_blocks(scores.nan_to_num(-math.inf, neginf=-math.inf), some, force)
    every, all_forced, all_dense = (x.expand(batch, heads, *x.shape[2:]) for x in (admissible, forced, dense))
    number = every.sum((1, 2, 3))
    total = (number * torch.rand(batch, generator=generator) * rng.choice([0.0, 1.0, 1.0, 1.0, 3.0])).long()
    bounds = rng.choice([0, 0, 2, 5]), rng.choice([None, 6, 9])
    want = reference.share(scores, rank, groups, every, all_forced, all_dense, total.tolist(), bounds)

    sequence = torch.stack([torch.zeros_like(dense, dtype=torch.int32), dense.int()], -1)
    proxy_of = torch.tensor([next(p for p, own in enumerate(groups) if h in own) for h in range(heads)])
    summary = summarize_rows(*on(implementation, admissible, admissible, sequence))
    arguments = scores, rank, proxy_of, summary, forced.sum(-1).amax(-1).int()
    most = blocks if bounds[1] is None else bounds[1]
    got = shared_counts(*on(implementation, *arguments, total, bounds[0], most))
    assert got.dtype == torch.int32
    assert torch.equal(got.cpu(), want)


def test_every_total_of_one_row(implementation: str) -> None:
    """Scores of -1 twice, then in the last step but one, in the last, none. The first is kept in any case.

    So 1, 2, 3 or 5 blocks can be kept; of a total of 4 the smaller number. Seven sequences are alike but for the total.
    """
    row = torch.tensor([-1.0, -1.0, -64 + 3 / 64, -64 + 2 / 64, -math.inf])
    total = torch.arange(7)
    scores, rank = (x.expand(7, 1, 1, 5).contiguous() for x in (row, torch.arange(5, dtype=torch.int32)))
    every = torch.ones(1, 1, 1, 5, dtype=torch.bool, device=implementation)
    summary = summarize_rows(every, every, torch.zeros(1, 1, 1, 2, dtype=torch.int32, device=implementation))
    none, head = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    got = shared_counts(*on(implementation, scores, rank, head, summary, none, total, 0, 5))
    assert got.flatten().tolist() == [1, 1, 2, 3, 3, 5, 5]


def test_total_blocks() -> None:
    """Two sequences of two heads with 3 and 5, or 2 and 4 admissible blocks; counts of 4 and 2, or 1 and 9."""
    summary = torch.zeros(2, 1, 2, 7, dtype=torch.int32)
    summary[:, 0, :, row_summary.NUMBER] = torch.tensor([[3, 5], [2, 4]])
    count = torch.tensor([[[4, 4], [2, 2]], [[1, 1], [9, 9]]], dtype=torch.int32)
    assert total_blocks(summary, count, (2, 2), None).tolist() == [3 + 4 + 2 + 2, 1 + 1 + 2 + 4]
    assert total_blocks(summary, None, (2, 2), 0.3).tolist() == [4, 3]  # of 16 and 12, rounded down


def inputs(device: str, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Some queries look for one key far away, the others for nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, heads, 512, 32, generator=generator) for heads in (4, 2))
    q[:, :, 256:320] *= 4
    return q.to(device), k.to(device)


ROWS = ProxyConfig(num_proxies=4, query_stride=4, sharing="rows", block_size=16, min_budget=64)


@pytest.mark.parametrize("density", [0.4, 0.5, 0.8])
def test_a_density_is_reached(density: float, device: str) -> None:
    """By each sequence, whatever else is in the batch, and by packed documents together."""
    q, k = inputs(device)
    documents = masks.document(torch.arange(512, device=device) // 400)
    config = replace(ROWS, density=density)
    for mask_mod in (masks.causal, masks.and_masks(masks.causal, documents)):
        selection = flexproxy.select(q, k, mask_mod=mask_mod, config=config)
        assert selection.density().mean(1).tolist() == pytest.approx([density] * 2, abs=0.01)
        for b in range(2):
            alone = flexproxy.select(q[b : b + 1], k[b : b + 1], mask_mod=mask_mod, config=config)
            assert torch.equal(alone.count[0], selection.count[b])


def test_as_many_blocks_as_one_count_for_each_head(device: str) -> None:
    q, k = inputs(device)
    config = replace(ROWS, gamma=0.7, max_budget=320)
    shared, heads = (flexproxy.select(q, k, config=replace(config, sharing=x)) for x in ("rows", "heads"))
    kept, wanted = (selection.block_map().sum((1, 2, 3)) for selection in (shared, heads))
    assert kept.tolist() == pytest.approx(wanted.tolist(), rel=0.005)
    rows = shared.count[:, :, :-1]
    assert int(rows.min()) == 1  # the first row has one block
    assert int(rows.max()) == 20
    assert bool((shared.count[:, :, -1] == 32).all()), "the last row is dense"
    assert shared.summary().count == ((20,) * 4,) * 2


def test_a_density_needs_no_masses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "block_masses", None)
    flexproxy.select(*inputs("cpu", 1), config=replace(ROWS, density=0.4))


def test_defaults_are_for_heads_by_themselves() -> None:
    config = ProxyConfig(sharing="rows")
    assert (config.proxies(32, 8), config.strides) == (32, (16, 4))
    assert ProxyConfig(sharing="rows", block_size=16, stride=8).strides == (16, 8)
    own = ProxyConfig(sharing="rows", num_proxies=4, query_stride=4)
    assert (own.proxies(32, 8), own.strides) == (4, (4, 4))
    assert (ProxyConfig().proxies(32, 8), ProxyConfig().strides) == (8, (4, 4))
