"""What a mask keeps of dense attention, against dense attention in double precision."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import flexproxy
from flexproxy import masks, reference, stats
from flexproxy.stages.lists import compile_block_mask
from tests.accuracy import allowed_pairs
from tests.oracle import Case, random_case
from tests.test_selection import rounds_lengths_up


def dense_probability(q: Tensor, k: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """fp64 ``[B, Hq, Sq, Skv]``, 0 in rows without an allowed key."""
    key_heads = [head * k.shape[1] // q.shape[1] for head in range(q.shape[1])]
    scores = scale * torch.einsum("bhqd,bhkd->bhqk", q.double(), k[:, key_heads].double())
    return scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)


def dense_recovered(q: Tensor, k: Tensor, allowed: Tensor, kept: Tensor, scale: float, rows: list[int]) -> Tensor:
    share = (dense_probability(q, k, allowed, scale) * kept).sum(-1)[:, :, rows]
    valid = allowed.any(-1)[:, :, rows]
    return (share * valid).sum(-1) / valid.sum(-1)


def listed_pairs(mask: BlockMask, batch: int, heads: int, num_queries: int, num_keys: int) -> Tensor:
    """The pairs that a compiled kernel reads, by a loop over the lists."""
    pairs = reference.token_mask(mask.mask_mod, batch, heads, num_queries, num_keys, "cpu")
    q_size, k_size = mask.BLOCK_SIZE
    read = torch.zeros(batch, heads, num_queries, num_keys, dtype=torch.bool)
    lists = [(mask.kv_num_blocks, mask.kv_indices, False)]
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        lists.append((mask.full_kv_num_blocks, mask.full_kv_indices, True))
    for number, index, is_full in lists:
        for b, h, i in itertools.product(range(batch), range(heads), range(-(-num_queries // q_size))):
            at = b % number.shape[0], h % number.shape[1], i
            for j in index[at][: number[at]].tolist():
                area = b, h, slice(i * q_size, (i + 1) * q_size), slice(j * k_size, (j + 1) * k_size)
                read[area] = True if is_full else pairs[area]
    return read


def test_rows_are_spread_over_the_queries_and_not_those_that_the_scores_sample() -> None:
    rows = stats.spread_rows(4096, 256)
    assert torch.equal(rows // 16, torch.arange(256))
    assert torch.bincount(rows % 4, minlength=4).min() > 32
    assert torch.equal(rows, stats.spread_rows(4096, 256))
    assert torch.equal(stats.spread_rows(100, 256), torch.arange(100))
    ragged = stats.spread_rows(1000, 7)
    assert all(i * 1000 // 7 <= row < (i + 1) * 1000 // 7 for i, row in enumerate(ragged.tolist()))


@pytest.mark.parametrize("first", range(0, 36, 12))
def test_recovered_mass_is_that_of_dense_attention(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all that the contract lets vary: of a Selection, of its BlockMask, and in pieces of a row or of all."""
    for seed in range(first, first + 12):
        case = random_case(5000 + seed)
        q, k = case.q, case.k
        monkeypatch.setattr(stats, "CHUNK_ELEMENTS", (2**15, 2**18, 2**24)[seed % 3])
        selection = flexproxy.select(q, k, mask_mod=case.mask_mod, config=case.config)
        mask_mod = case.mask_mod or masks.shift(masks.causal, k.shape[2] - q.shape[2])
        kept = allowed_pairs(selection, mask_mod, *case.lengths, case.config.block_size)
        rows = stats.spread_rows(q.shape[2], 20).tolist()
        want = dense_recovered(q, k, case.token_mask(), kept, case.scale, rows)
        got = stats.recovered_mass(q, k, selection, rows=20)
        assert got.dtype == torch.float32
        assert_masses(got, want, case)
        some = torch.tensor([0, q.shape[2] // 2])
        want = dense_recovered(q, k, case.token_mask(), kept, case.scale, some.tolist())
        assert_masses(stats.recovered_mass(q, k, selection.block_mask(), mask_mod=case.mask_mod, rows=some), want, case)
        if not rounds_lengths_up():
            density = stats.density(q, k, selection.block_mask(), mask_mod=case.mask_mod)
            torch.testing.assert_close(density, selection.density(), rtol=1e-6, atol=0)
            assert torch.equal(stats.density(q, k, selection), selection.density())


def assert_masses(got: Tensor, want: Tensor, case: Case) -> None:
    """An fp32 score is off by EPS * (sqrt(D) max|q||k| scale), and a probability by twice that, relative."""
    largest = case.scale * float(case.q.double().norm(dim=-1).max() * case.k.double().norm(dim=-1).max())
    error = torch.finfo(torch.float32).eps * (16 * math.sqrt(case.q.shape[3]) * max(largest, 1.0) + 64)
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=0, atol=error, equal_nan=True, msg=case.mask_name)


def gqa_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, allowed pairs, and kept pairs of a band of blocks that foreign code made."""
    generator = torch.Generator().manual_seed(0)
    q, k = (2 * torch.randn(2, h, 200, 16, generator=generator) for h in (4, 2))
    allowed = torch.ones(200, 200, dtype=torch.bool).tril()
    return q, k, allowed.expand(2, 4, -1, -1), allowed


def test_planted_mistakes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails when heads are interleaved, blocks are off by one, or the mask is forgotten."""
    q, k, allowed, _ = gqa_case()
    config = flexproxy.ProxyConfig(block_size=16, min_budget=0, gamma=0.5)
    selection = flexproxy.select(q, k, config=config)
    kept = allowed_pairs(selection, masks.causal, 200, 200, 16)
    every = torch.arange(200)
    want = dense_recovered(q, k, allowed, kept, 0.25, every.tolist())

    def is_right(*args: Any, **kwargs: Any) -> bool:
        return torch.allclose(stats.recovered_mass(*args, **kwargs).double(), want, rtol=0, atol=1e-5)

    assert is_right(q, k, selection, rows=every)
    assert not is_right(q, k.flip(1), selection, rows=every)
    assert not is_right(q, k, selection, rows=every, scale=0.3)
    assert not is_right(q, k, selection, rows=every[:100])
    assert not is_right(q, k, selection.block_mask(), mask_mod=masks.full, rows=every)
    right = stats._Pairs.at
    monkeypatch.setattr(stats._Pairs, "at", lambda self, rows, n: right(self, (rows + 1).clamp(max=199), n))
    assert not is_right(q, k, selection, rows=every)


@pytest.mark.parametrize("block_size", [(32, 32), (64, 32), (32, 64), (128, 128)])
@pytest.mark.parametrize("name", ["window", "head-dependent", "full lists, no function"])
def test_a_block_mask_of_others(name: str, block_size: tuple[int, int]) -> None:
    """Made without flexproxy: oblong blocks, lists of one head, full blocks that the function would not allow."""
    if rounds_lengths_up():
        pytest.skip("this torch labels blocks by its own rules")
    q, k, allowed, _ = gqa_case()
    window = torch.tensor([20, 40, 60, 200])
    if name == "window":
        mask = create_block_mask(masks.sliding_window(50), None, None, 200, 200, device="cpu", BLOCK_SIZE=block_size)
    elif name == "head-dependent":
        mask = create_block_mask(
            lambda b, h, q, kv: (q >= kv) & (q - kv < window[h] + b),
            2,
            4,
            200,
            200,
            device="cpu",
            BLOCK_SIZE=block_size,
        )
    else:
        number = torch.ones(1, 1, -(-200 // block_size[0]), dtype=torch.int32)
        index = torch.zeros(1, 1, number.shape[-1], -(-200 // block_size[1]), dtype=torch.int32)
        mask = BlockMask.from_kv_blocks(
            number * 0, index, number, index, BLOCK_SIZE=block_size, mask_mod=lambda b, h, q, kv: q < 0,
            seq_lengths=(200, 200),
        )  # fmt: skip
    read = listed_pairs(mask, 2, 4, 200, 200)
    rows = list(range(200))
    want = dense_recovered(q, k, allowed, read, 0.25, rows)
    got = stats.recovered_mass(q, k, mask)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    assert float(got.min()) < 0.99

    def blocks(pairs: Tensor) -> Tensor:
        padded = torch.zeros(*pairs.shape[:2], 256, 256, dtype=torch.bool)
        padded[..., :200, :200] = pairs
        by_block: Tensor = padded.unflatten(3, (-1, block_size[1])).unflatten(2, (-1, block_size[0]))
        return by_block.any(5).any(3)

    kept, admissible = blocks(read), blocks(allowed)
    want = (kept & admissible).sum((-2, -1)) / admissible.sum((-2, -1))
    torch.testing.assert_close(stats.density(q, k, mask), want)


def test_density_counts_what_is_admissible_alone() -> None:
    """A BlockMask may list blocks that the mask beside it forbids."""
    q, k = torch.randn(1, 2, 256, 16), torch.randn(1, 1, 256, 16)
    everything = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= 0, 1, 1, 256, 256, device="cpu")
    density = stats.density(q, k, everything, mask_mod=masks.causal)
    torch.testing.assert_close(density, torch.ones(1, 2))


@pytest.mark.parametrize("seed", range(8))
def test_block_mass_is_that_of_dense_attention(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(6000 + seed)
    q, k, size = case.q, case.k, case.config.block_size
    monkeypatch.setattr(stats, "CHUNK_ELEMENTS", (2**15, 2**24)[seed % 2])
    selection = flexproxy.select(q, k, mask_mod=case.mask_mod, config=case.config)
    allowed = case.token_mask()
    probability = dense_probability(q, k, allowed, case.scale)
    for batch in {0, q.shape[0] - 1}:
        for head in {0, q.shape[1] // 2, q.shape[1] - 1}:
            got = stats.block_mass(q, k, selection, head=head, batch=batch)
            want = torch.zeros_like(got, dtype=torch.float64)
            for i, j in itertools.product(*map(range, got.shape)):
                rows, keys = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
                valid = allowed[batch, head, rows].any(-1).sum().clamp(min=1)
                want[i, j] = probability[batch, head, rows, keys].sum() / valid
            assert_masses(got, want, case)


def test_a_long_sequence_takes_little_memory() -> None:
    """Nothing of the size of all pairs is made: one sequence of 128K, whose scores alone would take 64 GiB."""
    q, k = torch.randn(1, 1, 2**17, 16), torch.randn(1, 1, 2**17, 16)
    mask = create_block_mask_of_diagonal(2**10)
    got = stats.recovered_mass(q, k, mask, rows=8)
    assert 0 < float(got) < 0.5


def create_block_mask_of_diagonal(number: int) -> BlockMask:
    diagonal = torch.eye(number, dtype=torch.bool)[None, None]
    lengths = number * 128, number * 128
    return compile_block_mask(diagonal, diagonal & False, masks.causal, 128, lengths, False)


def test_mistakes_are_named() -> None:
    q, k, _, _ = gqa_case()
    selection = flexproxy.select(q, k)
    mask: Any
    for mask, more, message in (
        (masks.causal, {}, "mask: expected a Selection or a BlockMask, got function"),
        (selection, {"mask_mod": masks.causal}, "mask_mod: expected None beside a Selection"),
        (flexproxy.select(q[:1], k[:1]), {}, r"mask: expected a Selection for B, Hq, Sq, Skv = \(2, 4, 200, 200\)"),
        (flexproxy.build(q[:, :, :9], k), {}, r"mask: expected a mask for Sq, Skv"),
        (selection, {"rows": 0}, "rows: expected a number of queries"),
        (selection, {"rows": torch.tensor([200])}, "rows: expected indices from 0 to 199, got 200 to 200"),
        (selection, {"rows": torch.tensor([0.5])}, r"rows: expected indices \[m\]"),
        (selection, {"scale": math.inf}, "scale: expected a finite number"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            stats.recovered_mass(q, k, mask, **more)
    with pytest.raises(ValueError, match="head: expected an index from 0 to 3, got 4"):
        stats.block_mass(q, k, selection, head=4)
