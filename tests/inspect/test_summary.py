"""The numbers of a selection against the specification."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import flexproxy
from flexproxy import ProxyConfig, masks
from tests.oracle import expect, pooled, random_case


@pytest.mark.parametrize("seed", range(24))
def test_summary_is_that_of_the_specification(seed: int) -> None:
    case = random_case(7000 + seed)
    expected = expect(case, *pooled(case))
    selection = flexproxy.select(case.q, case.k, **case.mask, config=case.config)
    summary = selection.summary()
    kept, admissible = selection.block_map(), expected.admissible
    batch, heads, num_q_blocks, num_k_blocks = kept.shape
    assert (summary.batch, summary.num_q_heads, summary.num_proxies) == (batch, heads, selection.rank.shape[1])
    assert (summary.num_queries, summary.num_keys) == case.lengths
    assert (summary.num_q_blocks, summary.num_k_blocks) == (num_q_blocks, num_k_blocks)
    size = summary.block_size
    assert size == case.config.block_size
    for b in range(batch):
        for h in range(heads):
            rows = [i for i in range(num_q_blocks) if admissible[b, h, i].any()]
            dense = [i for i in rows if int(kept[b, h, i].sum()) == int(admissible[b, h, i].sum())]
            assert (summary.rows[b][h], summary.dense_rows[b][h]) == (len(rows), len(dense))
            assert summary.forced[b][h] == expected.forced[b, h].sum(-1).max()
            counts = selection.count[b, h].tolist()
            assert summary.count[b][h] == max([c for c in counts if 0 < c < num_k_blocks], default=num_k_blocks)
            assert summary.budget[b][h] == min(summary.count[b][h] * size, case.lengths[1])
            share = int(kept[b, h].sum()) / max(1, int(admissible[b, h].sum())) if rows else 1.0
            assert summary.density[b][h] == pytest.approx(share, rel=1e-6)
    assert json.loads(json.dumps(dataclasses.asdict(summary)))["density"] == [list(heads) for heads in summary.density]


def test_the_table() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 1000, 16, generator=generator), torch.randn(1, 2, 1000, 16, generator=generator)
    config = ProxyConfig.paper(block_size=64, min_budget=128, max_budget=256, sink_blocks=1)
    summary = flexproxy.select(q, k, config=config).summary()
    lines = str(summary).splitlines()
    assert lines[0] == (
        "Selection: 1 sequence, 4 query heads, 1 proxy; 1000 queries, 1000 keys; 16 x 16 blocks of 64 tokens"
    )
    numbers = {line[:30].strip(): line[30:].split() for line in lines[1:]}
    assert numbers["count (blocks a row)"] == ["4", "4.0", "4"]
    assert numbers["budget (tokens a row)"] == ["256", "256.0", "256"]
    assert numbers["forced (blocks a row, at most)"] == ["2", "2.0", "2"]
    assert numbers["rows kept dense (of blocks)"] == ["4", "4.0", "4"]
    assert numbers["rows in all (of blocks)"] == ["16", "16.0", "16"]
    share = (1 + 2 + 3 + 4 * 13) / (16 * 17 / 2)
    assert numbers["density (kept / admissible)"] == [f"{share:.3f}"] * 3
    assert len({len(line) for line in lines[1:]}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        summary.batch = 2  # type: ignore[misc]


def test_a_sequence_of_padding_alone() -> None:
    """Nothing is admissible: density 1, no rows, no dense rows."""
    q = torch.randn(2, 2, 256, 16)
    real = torch.tensor([[1] * 256, [0] * 256])
    summary = flexproxy.select(q, q, mask_mod=masks.padding(real)).summary()
    assert summary.rows == ((2, 2), (0, 0))
    assert summary.dense_rows == ((2, 2), (0, 0))
    assert summary.density[1] == (1.0, 1.0)


def test_a_selection_shows_its_summary() -> None:
    q = torch.randn(1, 2, 300, 16)
    selection = flexproxy.select(q, q)
    assert repr(selection) == str(selection) == str(selection.summary())
