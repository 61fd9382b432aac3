"""The selections of benchmarks/baselines by the properties of their papers, and the BlockMask made of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flexproxy
from benchmarks import baselines
from benchmarks.baselines import (
    LEVELS,
    METHODS,
    blocks,
    flashprefill,
    flashprefill_v2,
    mean_correction,
    prism,
    xattention,
)
from benchmarks.baselines.flashprefill import pooled_scores
from benchmarks.baselines.oracle import block_mass
from benchmarks.baselines.xattention import antidiagonal_scores
from benchmarks.contenders import causal_block_mask
from flexproxy import ProxyConfig, masks
from tests.accuracy import assert_accurate
from tests.baseline_specs import DIM, LENGTHS, SIZE, inputs
from tests.lists import full_blocks, partial_blocks

PEERS, NAMES = sorted(METHODS), sorted(LEVELS)
SEEING = [name for name in NAMES if name not in ("random", "sink + recent")]  # which look at queries and keys


def levels_of(name: str, q: Tensor, k: Tensor, min_budget: int = 0) -> Tensor:
    """A method with small blocks, and without what its paper keeps regardless of scores where that can be left away.

    min_budget: tokens, of methods with flexproxy's budgets only.
    """
    scores_alone = {"sink_blocks": 0, "local_blocks": 1, "last_rows": 0}
    settings: dict[str, dict[str, Any]] = {
        "XAttention": {"stride": 4},
        "FlexPrefill": {"min_budget": 0},
        "FlashPrefill": scores_alone,
        "FlashPrefill V2": scores_alone,
        "Prism": {},
    }
    return LEVELS[name](q, k, block_size=SIZE, **settings.get(name, {"min_budget": min_budget, "forced": (0, 1, 0)}))


def select(name: str, q: Tensor, k: Tensor, threshold: float, min_budget: int = 0) -> Tensor:
    return blocks.below(levels_of(name, q, k, min_budget), threshold)


LOOSER = [0.05, 0.3, 0.6, 0.9, 0.99, 1.0]
"""Thresholds, each of which keeps at least what the one before keeps; the last keeps everything."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", LENGTHS)
def test_causal_with_its_diagonal(name: str, length: int) -> None:
    q, k = inputs(length)
    num_blocks = -(-length // SIZE)
    for threshold in LOOSER:
        kept = select(name, q, k, threshold)
        assert kept.shape == (2, 4, num_blocks, num_blocks)
        assert kept.dtype == torch.bool
        assert not bool(kept.triu(1).any())
        assert bool(kept.diagonal(dim1=-2, dim2=-1).all())


@pytest.mark.parametrize("name", NAMES)
def test_monotone_in_its_threshold(name: str) -> None:
    """A looser threshold keeps what a tighter one keeps, and more; the loosest keeps everything."""
    q, k = inputs(160)
    maps = [select(name, q, k, threshold) for threshold in LOOSER]
    for tight, loose in itertools.pairwise(maps):
        assert not bool((tight & ~loose).any())
    assert torch.equal(maps[-1], torch.ones_like(maps[-1]).tril())
    assert baselines.density(maps[0]) < 0.6
    assert baselines.density(maps[-1]) == 1.0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "FlashPrefill V2"])
def test_grouped_heads_are_repeated_heads(name: str) -> None:
    q, k = inputs(127)
    threshold = LOOSER[2]
    assert torch.equal(select(name, q, k, threshold), select(name, q, k.repeat_interleave(2, 1), threshold))
    assert not torch.equal(select(name, q, k, threshold), select(name, q, k.repeat(1, 2, 1, 1), threshold))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
def test_sequences_and_heads_are_independent(name: str) -> None:
    q, k = inputs(127, batch=3)
    threshold = LOOSER[2]
    kept = select(name, q, k, threshold)
    assert torch.equal(select(name, q.flip(0), k.flip(0), threshold), kept.flip(0))
    assert torch.equal(select(name, q[1:2, 2:], k[1:2, 1:], threshold), kept[1:2, 2:])


@pytest.mark.parametrize("name", ["XAttention", "FlashPrefill", "FlashPrefill V2", "oracle", "oracle, per row"])
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = inputs(160)
    threshold = LOOSER[2]
    whole = select(name, q, k, threshold)
    for elements in (1, 5000, 20000):  # a row of blocks at a time, some, and a last chunk that is smaller
        for function in (LEVELS[name], block_mass, pooled_scores, antidiagonal_scores):
            monkeypatch.setitem(function.__globals__, "CHUNK_ELEMENTS", elements)
        assert torch.equal(select(name, q, k, threshold), whole)


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize("token", [37, 50])
def test_a_hot_key_is_found(name: str, token: int) -> None:
    """One key that all queries look at: its column of blocks is kept in every row, and little else is."""
    q, k = (0.1 * x for x in inputs(160))
    q[..., 0], k[:, :, token, 0] = 30.0, 30.0
    threshold = 0.95 if name == "FlexPrefill" else 0.5  # its gamma is a share of all rows together
    kept = select(name, q, k, threshold, min_budget=2 * SIZE)
    assert bool(kept[:, :, token // SIZE :, token // SIZE].all())
    assert baselines.density(kept) < 0.65


def slash(distance: int, length: int = 160) -> tuple[Tensor, Tensor]:
    """Every query looks at the key that is ``distance`` tokens before it, and at no other."""
    direction = F.pad(40 * torch.eye(length + distance), (0, -(length + distance) % 8))[None, None]
    return direction[:, :, :length], direction[:, :, distance:]


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize("distance", [33, 53])
def test_a_hot_slash_is_found(name: str, distance: int) -> None:
    q, k = slash(distance)
    kept = select(name, q, k, 0.5, min_budget=2 * SIZE)[0, 0]
    for position in range(distance + SIZE, 160 - SIZE):
        row, column = position // SIZE, (position - distance) // SIZE
        # One of the two blocks that the slash crosses in this row may hold too little of it for a share of the row.
        assert bool(kept[row, max(0, column - 1) : column + 2].any())
    assert baselines.density(kept[None, None]) < 0.75


def test_antidiagonals_meet_every_second_slash() -> None:
    """In windows of an even stride, antidiagonals meet the diagonals at odd distances, and pass between the others."""
    for distance in (33, 34, 35, 36):
        q, k = slash(distance)
        scores = antidiagonal_scores(q, k, 4, SIZE)[0, 0, 3:]
        crossed = scores.diagonal(1).sum() + scores.diagonal(0).sum()  # two and three blocks back
        share = float(crossed / scores.sum())
        assert share > 0.9 if distance % 2 else share < 0.4, (distance, share)


def test_a_hot_pair_on_an_antidiagonal_is_found() -> None:
    """XAttention sees one query and one key where they lie on the antidiagonal of their window, and only there."""
    for row, column, found in ((130, 49, True), (131, 48, True), (130, 48, False), (131, 51, False)):
        q, k = torch.zeros(1, 1, 160, 4), torch.zeros(1, 1, 160, 4)
        q[0, 0, row, 0] = k[0, 0, column, 0] = 20.0
        kept = xattention(q, k, 0.3, stride=4, block_size=SIZE)
        assert bool(kept[0, 0, row // SIZE, column // SIZE]) == found, (row, column)


def rotated(x: Tensor, base: float = 10000.0) -> Tensor:
    """x ``[B, H, S, D]`` after RoPE, dimension i turned together with i + D / 2."""
    half = x.shape[3] // 2
    angle = torch.arange(x.shape[2])[:, None] * base ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    turned = (first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos())
    return torch.cat(turned, -1)


def test_prism_sees_a_position_that_pooling_all_dimensions_does_not() -> None:
    """Queries look 64 tokens back by the quick dimensions alone; the slow ones carry unrelated content."""
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(1, 1, 10, DIM, generator=generator).repeat_interleave(SIZE, 2)
    quick = torch.arange(DIM) % (DIM // 2) < DIM // 4
    content = torch.where(quick, 0.0, 3.0 * content)
    place = rotated(torch.where(quick, 3.0, 0.0).expand(1, 1, 160 + 4 * SIZE, DIM))
    q, k = content + place[:, :, :160], content.flip(2) + place[:, :, 4 * SIZE :]
    row = torch.arange(5, 10)  # row 4 would look at the first block, which is always kept
    seen = prism(q, k, 0.2, low=2, block_size=SIZE)[0, 0, row, row - 4]
    unseen = prism(q, k, 0.2, high=DIM, low=DIM, block_size=SIZE)[0, 0, row, row - 4]
    assert bool(seen.all())
    assert not bool(unseen.any())


def test_prism_takes_neighbours_where_rope_does() -> None:
    q, k = inputs(160)
    q_neighbours, k_neighbours = (x.unflatten(-1, (2, -1)).mT.flatten(3) for x in (q, k))
    kept = prism(q, k, 0.6, block_size=SIZE)
    assert torch.equal(prism(q_neighbours, k_neighbours, 0.6, interleaved=True, block_size=SIZE), kept)
    assert not torch.equal(prism(q_neighbours, k_neighbours, 0.6, block_size=SIZE), kept)


def test_prism_without_energy_in_a_band_keeps_equals_in_order() -> None:
    q, k = (torch.zeros(1, 1, 160, DIM) for _ in range(2))
    kept = prism(q, k, 0.5, block_size=SIZE)[0, 0]
    assert kept[9].tolist() == [True] * 5 + [False] * 4 + [True]


def test_the_smallest_cover() -> None:
    mass = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1])
    none = torch.zeros(5, dtype=torch.bool)
    first = torch.tensor([True, False, False, False, False])

    def kept(fraction: float, forced: Tensor, at_least: int = 0) -> list[int]:
        levels = blocks.cover_levels(mass, forced, at_least)
        return blocks.below(levels, fraction).nonzero().flatten().tolist()

    assert kept(0.4, none) == [1]
    assert kept(0.55, none) == [1, 2]  # of equals the lower index
    assert kept(0.55, first) == [0, 1, 2]  # 0.5 is not enough
    assert kept(0.45, first) == [0, 1]  # forced entries count
    assert kept(0.0, none) == []
    assert kept(0.0, first) == [0]
    assert kept(0.0, first, 3) == [0, 1, 2]
    assert kept(1.0, none) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", NAMES)
def test_threshold_for_density(name: str) -> None:
    q, k = inputs(640, batch=1)
    """By search as by the quantile of its levels, which is the nearest there is."""
    threshold, reached = baselines.threshold_for_density(lambda x: select(name, q, k, x), 0.5, True)
    assert reached == baselines.density(select(name, q, k, threshold))
    assert reached == pytest.approx(0.5, abs=0.03)
    nearest = baselines.density(baselines.at_density(levels_of(name, q, k), 0.5))
    assert abs(nearest - 0.5) <= abs(reached - 0.5)


def test_a_density_is_that_of_each_sequence() -> None:
    q, k = inputs(640)
    q[1] *= 4
    levels = levels_of("XAttention", q, k)
    together, alone = baselines.at_density(levels, 0.3), baselines.at_density(levels[1:], 0.3)
    assert torch.equal(together[1:], alone)
    for kept in together:
        assert baselines.density(kept[None]) == pytest.approx(0.3, abs=0.002)


def test_flashprefill_v2_selects_per_key_head() -> None:
    """One selection for a group, from the scores of all its heads, as if these were more queries of one head."""
    q, k = inputs(160)
    settings: dict[str, Any] = {"sink_blocks": 0, "local_blocks": 1, "last_rows": 0, "block_size": SIZE}
    kept = flashprefill_v2(q, k, 0.5, **settings)
    assert torch.equal(kept[:, 0::2], kept[:, 1::2])
    assert not torch.equal(kept[:, 0], kept[:, 2])
    same = q[:, 0::2].repeat_interleave(2, 1)
    one_head = flashprefill_v2(q[:, 0::2], k, 0.5, **settings)
    assert torch.equal(flashprefill_v2(same, k, 0.5, **settings)[:, 0::2], one_head)
    assert not torch.equal(kept[:, 0::2], one_head)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE over the causal tokens of the kept blocks."""
    tokens = block_map.repeat_interleave(SIZE, 2).repeat_interleave(SIZE, 3)[..., : q.shape[2], : q.shape[2]].tril()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = (q @ k.mT / DIM**0.5).masked_fill(~tokens, -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


@pytest.mark.parametrize("length", [100, 160])
def test_mean_correction_is_exact_for_equal_keys_and_values(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a block's keys are equal, and so its values, its mean is all that there is to know of it."""
    q, k = inputs(length)
    _, v = inputs(length, seed=1)
    k, v = (x[:, :, ::SIZE].repeat_interleave(SIZE, 2)[:, :, :length] for x in (k, v))
    dense, _ = sparse_attention(q, k, v, select("random", q, k, 1.0))
    kept = select("random", q, k, 0.5)
    out, lse = sparse_attention(q, k, v, kept)
    assert (out - dense).abs().max() > 0.1
    for elements in (2**27, 1, 20000):
        monkeypatch.setitem(mean_correction.__globals__, "CHUNK_ELEMENTS", elements)
        corrected = mean_correction(q, k, v, out, lse, kept, SIZE)
        assert torch.allclose(corrected, dense, atol=1e-5)
    everything = select("random", q, k, 1.0)
    assert torch.equal(mean_correction(q, k, v, dense, lse, everything, SIZE), dense)


def test_an_unreachable_density_gives_the_nearest() -> None:
    """What is always kept stands in the way of a small density."""
    q, k = inputs(160)
    _, reached = baselines.threshold_for_density(lambda x: flashprefill(q, k, x, block_size=SIZE), 0.01, False)
    assert reached == baselines.density(flashprefill(q, k, 1.0, block_size=SIZE))
    kept = baselines.at_density(LEVELS["FlashPrefill"](q, k, block_size=SIZE), 0.01)
    assert torch.equal(kept, flashprefill(q, k, 1.0, block_size=SIZE))


# The BlockMask


@pytest.mark.parametrize("length", [128, 300, 512])
def test_block_mask_of_everything_is_that_of_flexproxy(length: int) -> None:
    q, k = inputs(length, batch=1)
    num_blocks = -(-length // 128)
    everything = torch.ones(1, 4, num_blocks, num_blocks, dtype=torch.bool).tril()
    mask, expected = baselines.to_block_mask(everything, length), flexproxy.build(q, k, config=ProxyConfig(gamma=1.0))
    assert torch.equal(partial_blocks(mask, num_blocks), partial_blocks(expected, num_blocks))
    assert torch.equal(full_blocks(mask, num_blocks), full_blocks(expected, num_blocks))
    assert mask.shape == expected.shape


@pytest.mark.parametrize("name", PEERS)
def test_attention_under_the_block_mask(name: str) -> None:
    """Eager flex_attention with it is dense attention over the tokens of the kept blocks."""
    q, k = inputs(300, batch=1)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(0))
    method: Any = METHODS[name].select
    kept = method(q, k, 0.5) if name != "FlashPrefill" else method(q, k, 0.99, 0, 1, 0)
    tokens = kept.repeat_interleave(128, 2)[:, :, :300].repeat_interleave(128, 3)[..., :300]
    out = flex_attention(q, k, v, block_mask=baselines.to_block_mask(kept, 300), enable_gqa=True)
    assert isinstance(out, Tensor)
    assert_accurate(out, q, k, v, tokens & torch.ones(300, 300, dtype=torch.bool).tril())


def test_causal_block_mask_is_that_of_torch() -> None:
    mask = causal_block_mask(512, torch.device("cpu"))
    expected = create_block_mask(masks.causal, None, None, 512, 512, device="cpu")
    assert torch.equal(partial_blocks(mask, 4), partial_blocks(expected, 4))
    assert torch.equal(full_blocks(mask, 4), full_blocks(expected, 4))


@pytest.mark.parametrize("name", NAMES)
def test_errors(name: str) -> None:
    q, k = inputs(64)
    for wrong in (k[:, :, :32], k[:1], k[..., :16], k[0], k.repeat(1, 2, 1, 1)[:, :3]):
        with pytest.raises(ValueError, match="k: expected"):
            LEVELS[name](q, wrong)
    with pytest.raises(ValueError, match="stride: expected"):
        xattention(q, k, 0.5, stride=7)
    for high, low in ((15, 24), (16, 0), (16, 34)):
        with pytest.raises(ValueError, match="expected an even number of dimensions"):
            prism(q, k, 0.5, high, low)
