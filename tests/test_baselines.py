"""The peers' selections: against dense specifications in double precision, and by the properties of their papers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flexproxy
from benchmarks import baselines
from benchmarks.baselines import METHODS, blocks, flashprefill, flexprefill, xattention
from benchmarks.baselines.xattention import antidiagonal_scores
from benchmarks.contenders import causal_block_mask
from flexproxy import ProxyConfig, masks
from tests.accuracy import assert_accurate
from tests.lists import full_blocks, partial_blocks

SIZE, DIM = 16, 32
LENGTHS = (1, 15, 16, 100, 127, 160)
NAMES = sorted(METHODS)


def select(name: str, q: Tensor, k: Tensor, threshold: float) -> Tensor:
    """A method with small blocks, and without what its paper keeps regardless of scores where that can be left away."""
    settings: dict[str, dict[str, Any]] = {
        "XAttention": {"stride": 4},
        "FlexPrefill": {"min_budget": 0},
        "FlashPrefill": {"sink_blocks": 0, "local_blocks": 1, "last_rows": 0},
    }
    method: Any = METHODS[name].select
    kept: Tensor = method(q, k, threshold, block_size=SIZE, **settings[name])
    return kept


def inputs(length: int, seed: int = 0, batch: int = 2, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    q = torch.randn(batch, heads, length, DIM, generator=generator)
    return 2 * q, 2 * torch.randn(batch, kv_heads, length, DIM, generator=generator)


def looser(name: str) -> list[float]:
    """Thresholds, each of which keeps at least what the one before keeps; the last keeps everything."""
    thresholds = [0.05, 0.3, 0.6, 0.9, 0.99, 1.0]
    return thresholds if METHODS[name].increasing else [1 - x for x in thresholds]


# Specifications: one head, double precision, loops. ``mistake`` plants an error that the comparison must see.


def heads_of(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            yield b, h, q[b, h].double(), k[b, h * k.shape[1] // q.shape[1]].double()


def greedy(mass: list[float], fraction: float, forced: set[int]) -> set[int]:
    """The fewest entries that hold a fraction of the mass; forced ones first, equals by index."""
    if fraction >= 1:
        return set(range(len(mass)))
    order = sorted(range(len(mass)), key=lambda j: (j not in forced, -mass[j], j))
    kept, total = set(forced), sum(mass)
    for n, j in enumerate(order):
        if sum(mass[i] for i in order[:n]) < fraction * total:
            kept.add(j)
    return kept


def xattention_spec(q: Tensor, k: Tensor, threshold: float, stride: int, mistake: bool) -> Tensor:
    length = q.shape[0]
    windows, num_blocks, cell = -(-length // stride), -(-length // SIZE), SIZE // stride
    score = torch.full((windows, windows), -math.inf, dtype=torch.float64)
    for i in range(windows):
        for j in range(i + 1):
            total = 0.0
            for t in range(stride):
                row, column = i * stride + (t if mistake else stride - 1 - t), j * stride + t
                if row < length and column < length:
                    total += float(q[row] @ k[column])
            score[i, j] = total / (math.sqrt(DIM) * stride)
    probability = score.softmax(-1)
    kept = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    for i in range(num_blocks):
        rows = probability[i * cell : (i + 1) * cell]
        mass = [float(rows[:, j * cell : (j + 1) * cell].sum()) for j in range(num_blocks)]
        kept[i, sorted(greedy(mass, threshold, {0, i}))] = True
    return kept.tril()


def flashprefill_spec(q: Tensor, k: Tensor, alpha: float, sink: int, local: int, last: int, mistake: bool) -> Tensor:
    length = q.shape[0]
    num_blocks = -(-length // SIZE)
    mean = [k[j * SIZE : (j + 1) * SIZE].mean(0) for j in range(num_blocks)]
    kept = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    for i in range(num_blocks):
        score = [0.0] * num_blocks
        for position in range(i * SIZE, min((i + 1) * SIZE, length)):
            for j in range(num_blocks):
                if (j + (0 if mistake else 1)) * SIZE - 1 <= position:
                    score[j] += math.exp(float(q[position] @ mean[j]) / math.sqrt(DIM))
        score = [x / (sum(score) or 1.0) for x in score]  # equation 2
        for j in range(i + 1):
            always = j < sink or i - j < local or i >= num_blocks - last
            kept[i, j] = always or score[j] >= alpha * max(score)
    return kept


def flexprefill_spec(q: Tensor, k: Tensor, gamma: float, tau: float, min_blocks: int, mistake: bool) -> Tensor:
    length = q.shape[0]
    num_blocks, rows = -(-length // SIZE), min(SIZE, length)
    columns, bands = [0.0] * num_blocks, [0.0] * num_blocks
    for position in range(length - rows, length):
        probability = (k[: position + 1] @ q[position] / math.sqrt(DIM)).softmax(0)
        for key in range(position + 1):
            columns[key // SIZE] += float(probability[key]) / rows
            bands[(position - key) // SIZE] += float(probability[key]) / rows
    mean_q = [q[i * SIZE : (i + 1) * SIZE].mean(0) for i in range(num_blocks)]
    mean_k = torch.stack([k[j * SIZE : (j + 1) * SIZE].mean(0) for j in range(num_blocks)])
    estimate = (mean_k @ q[-rows:].mean(0) / math.sqrt(DIM)).softmax(0).tolist()
    divergence = sum(
        0.5 * x * math.log(x / ((x + y) / 2)) + 0.5 * (y * math.log(y / ((x + y) / 2)) if y else 0.0)
        for x, y in zip(estimate, columns, strict=True)
    )
    query_aware = math.sqrt(max(divergence, 0.0)) < tau

    def lines(mass: list[float]) -> set[int]:
        lifted = [math.inf if j == 0 else mass[j] for j in range(num_blocks)]
        heaviest = sorted(range(num_blocks), key=lambda j: (-lifted[j], j))[:min_blocks]
        return greedy(mass, 0.0 if query_aware else gamma, {0}) | set(heaviest)

    vertical, band = lines(columns), lines(bands)
    kept = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    for position in range(length):
        for key in range(position + 1):
            distance = (position - key) // SIZE if not mistake else position // SIZE - key // SIZE
            kept[position // SIZE, key // SIZE] |= key // SIZE in vertical or distance in band
    if query_aware:
        pairs = [(i, j) for i in range(num_blocks) for j in range(num_blocks)]
        mass = []
        for i in range(num_blocks):
            row = (mean_k[: i + 1] @ mean_q[i] / math.sqrt(DIM)).softmax(0).tolist()
            mass += row + [0.0] * (num_blocks - i - 1)
        forced = {n for n, (i, j) in enumerate(pairs) if j in (0, i)}
        for n in greedy(mass, gamma, forced):
            kept[pairs[n]] = True
    return kept.tril()


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
@pytest.mark.parametrize("gamma", [0.3, 0.9])
@pytest.mark.parametrize(("tau", "min_blocks"), [(0.0, 0), (0.0, 2), (0.2, 0), (0.2, 2), (2.0, 1)])
def test_flexprefill_equals_its_specification(length: int, gamma: float, tau: float, min_blocks: int) -> None:
    q, k = inputs(length)
    kept = flexprefill(q, k, gamma, tau, min_blocks * SIZE, block_size=SIZE)
    for b, h, q_head, k_head in heads_of(q, k):
        assert torch.equal(kept[b, h], flexprefill_spec(q_head, k_head, gamma, tau, min_blocks, mistake=False))


def test_the_specifications_see_mistakes() -> None:
    """Diagonals for antidiagonals, blocks that look ahead, a band without its second diagonal: each would be found."""
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


def test_flexprefill_heads_choose_differently() -> None:
    """At a tau of the specification's cases some heads are query-aware and some are not."""
    q, k = inputs(160)
    none, some, every = (flexprefill(q, k, 0.7, tau, 0, block_size=SIZE) for tau in (0.0, 0.2, 2.0))
    as_none, as_every = (some == none).all((-1, -2)), (some == every).all((-1, -2))
    assert bool((as_none | as_every).all())
    assert bool(as_none.any())
    assert bool(as_every.any())
    assert not torch.equal(none, every)


# Properties


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", LENGTHS)
def test_causal_with_its_diagonal(name: str, length: int) -> None:
    q, k = inputs(length)
    num_blocks = -(-length // SIZE)
    for threshold in looser(name):
        kept = select(name, q, k, threshold)
        assert kept.shape == (2, 4, num_blocks, num_blocks)
        assert kept.dtype == torch.bool
        assert not bool(kept.triu(1).any())
        assert bool(kept.diagonal(dim1=-2, dim2=-1).all())


@pytest.mark.parametrize("name", NAMES)
def test_monotone_in_its_threshold(name: str) -> None:
    """A looser threshold keeps what a tighter one keeps, and more; the loosest keeps everything."""
    q, k = inputs(160)
    maps = [select(name, q, k, threshold) for threshold in looser(name)]
    for tight, loose in itertools.pairwise(maps):
        assert not bool((tight & ~loose).any())
    assert torch.equal(maps[-1], torch.ones_like(maps[-1]).tril())
    assert baselines.density(maps[0]) < 0.6
    assert baselines.density(maps[-1]) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_grouped_heads_are_repeated_heads(name: str) -> None:
    q, k = inputs(127)
    threshold = looser(name)[2]
    assert torch.equal(select(name, q, k, threshold), select(name, q, k.repeat_interleave(2, 1), threshold))
    assert not torch.equal(select(name, q, k, threshold), select(name, q, k.repeat(1, 2, 1, 1), threshold))


@pytest.mark.parametrize("name", NAMES)
def test_sequences_and_heads_are_independent(name: str) -> None:
    q, k = inputs(127, batch=3)
    threshold = looser(name)[2]
    kept = select(name, q, k, threshold)
    assert torch.equal(select(name, q.flip(0), k.flip(0), threshold), kept.flip(0))
    assert torch.equal(select(name, q[1:2, 2:], k[1:2, 1:], threshold), kept[1:2, 2:])


@pytest.mark.parametrize("name", ["XAttention", "FlashPrefill"])
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = inputs(160)
    threshold = looser(name)[2]
    whole = select(name, q, k, threshold)
    for elements in (1, 5000, 20000):  # a row of blocks at a time, some, and a last chunk that is smaller
        monkeypatch.setitem(METHODS[name].select.__globals__, "CHUNK_ELEMENTS", elements)
        assert torch.equal(select(name, q, k, threshold), whole)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("token", [37, 50])
def test_a_hot_key_is_found(name: str, token: int) -> None:
    """One key that all queries look at: its column of blocks is kept in every row, and little else is."""
    q, k = (0.1 * x for x in inputs(160))
    q[..., 0], k[:, :, token, 0] = 30.0, 30.0
    kept = select(name, q, k, 0.95 if name == "FlexPrefill" else 0.5)  # its gamma is a share of all rows together
    assert bool(kept[:, :, token // SIZE :, token // SIZE].all())
    assert baselines.density(kept) < 0.65


def slash(distance: int, length: int = 160) -> tuple[Tensor, Tensor]:
    """Every query looks at the key that is ``distance`` tokens before it, and at no other."""
    direction = 40 * torch.eye(length + distance)[None, None]
    return direction[:, :, :length], direction[:, :, distance:]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("distance", [33, 53])
def test_a_hot_slash_is_found(name: str, distance: int) -> None:
    q, k = slash(distance)
    kept = select(name, q, k, 0.5)[0, 0]
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


def test_smallest_cover() -> None:
    mass = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1])
    none = torch.zeros(5, dtype=torch.bool)
    first = torch.tensor([True, False, False, False, False])

    def kept(*args: Any) -> list[int]:
        return blocks.smallest_cover(mass, *args).nonzero().flatten().tolist()

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
    increasing = METHODS[name].increasing
    threshold, reached = baselines.threshold_for_density(lambda x: select(name, q, k, x), 0.5, increasing)
    assert reached == baselines.density(select(name, q, k, threshold))
    assert reached == pytest.approx(0.5, abs=0.03)


def test_an_unreachable_density_gives_the_nearest() -> None:
    """What is always kept stands in the way of a small density."""
    q, k = inputs(160)
    _, reached = baselines.threshold_for_density(lambda x: flashprefill(q, k, x, block_size=SIZE), 0.01, False)
    assert reached == baselines.density(flashprefill(q, k, 1.0, block_size=SIZE))


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


@pytest.mark.parametrize("name", NAMES)
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
    method = METHODS[name].select
    for wrong in (k[:, :, :32], k[:1], k[..., :16], k[0], k.repeat(1, 2, 1, 1)[:, :3]):
        with pytest.raises(ValueError, match="k: expected"):
            method(q, wrong, 0.5)
    with pytest.raises(ValueError, match="stride: expected"):
        xattention(q, k, 0.5, stride=7)
