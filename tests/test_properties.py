"""Properties that hold whatever the scores are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks

import flexproxy
from flexproxy import ProxyConfig, masks
from flexproxy.config import NEIGHBOURS
from tests.oracle import Case, check_rank, expect, pooled, random_case

CONFIG = ProxyConfig.paper(num_proxies=2, gamma=0.7, block_size=32, min_budget=32)


def whole_numbers(seed: int, *shape: int, device: str = "cpu") -> Tensor:
    """Random integers as fp32: sums and means of few of them are exact, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float().to(device)


def inputs(seed: int, batch: int, heads: int, kv_heads: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    q = whole_numbers(seed, batch, heads, length, 32, device=device)
    return q, whole_numbers(seed + 1, batch, kv_heads, length, 32, device=device)


@pytest.mark.parametrize("seed", range(20))
def test_gamma_one_keeps_everything(seed: int, device: str) -> None:
    case = random_case(5000 + seed, device)
    config = ProxyConfig(
        gamma=1.0,
        block_size=case.config.block_size,
        stride=case.config.stride,
        query_stride=case.config.query_stride,
        sharing=case.config.sharing,
    )
    selection = flexproxy.select(case.q, case.k, mask_mod=case.mask_mod, config=config)
    admissible = selection.admissible.expand(*case.q.shape[:2], -1, -1)
    assert torch.equal(selection.block_map(), admissible)
    assert bool((selection.density() == 1.0).all())


@given(seed=st.integers(0, 10_000), gammas=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=4))
@settings(deadline=None, max_examples=40)
def test_budget_is_monotone_in_gamma(seed: int, gammas: list[float]) -> None:
    """A larger gamma never keeps less: counts grow, and the blocks kept before are kept still."""
    case = random_case(seed)
    previous = None
    for gamma in sorted(gammas):
        config = ProxyConfig(
            gamma=gamma,
            block_size=case.config.block_size,
            stride=case.config.stride,
            query_stride=case.config.query_stride,
            sharing=case.config.sharing,
            min_budget=0,
        )
        selection = flexproxy.select(case.q, case.k, mask_mod=case.mask_mod, config=config)
        block_map = selection.block_map()
        if previous is not None:
            assert bool((selection.count >= previous[0]).all())
            assert bool((block_map | ~previous[1]).all())
        previous = selection.count, block_map


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=60)
def test_every_query_sees_itself(seed: int) -> None:
    """Under a causal mask the block of a query's own position is kept, also where a query block straddles two."""
    case = random_case(seed)
    num_queries, num_keys = case.lengths
    config = ProxyConfig(
        gamma=0.01,
        min_budget=0,
        sharing=case.config.sharing,
        block_size=case.config.block_size,
        stride=case.config.stride,
        query_stride=case.config.query_stride,
    )
    block_map = flexproxy.select(case.q, case.k, config=config).block_map()
    query = torch.arange(num_queries)
    size = config.block_size
    assert bool(block_map[:, :, query // size, (query + num_keys - num_queries) // size].all())


def test_permuted_heads_give_permuted_results(device: str) -> None:
    """KV heads permuted with their query heads, and query heads permuted within a group: the results follow."""
    q, k = inputs(1, 2, 8, 4, 300, device)
    config = ProxyConfig(num_proxies=4, gamma=0.7, block_size=32, min_budget=32)
    kv_order = torch.tensor([2, 0, 3, 1], device=device)
    within = torch.tensor([1, 0], device=device)
    q_order = (kv_order[:, None] * 2 + within).flatten()
    plain = flexproxy.select(q, k, config=config)
    permuted = flexproxy.select(q[:, q_order], k[:, kv_order], config=config)
    assert torch.equal(permuted.rank, plain.rank[:, kv_order])
    assert torch.equal(permuted.block_map(), plain.block_map()[:, q_order])
    config = replace(config, num_proxies=8, sharing="rows")
    plain, permuted = (flexproxy.select(*x, config=config) for x in ((q, k), (q[:, q_order], k[:, kv_order])))
    assert torch.equal(permuted.count, plain.count[:, q_order])
    assert len(set(plain.count.flatten().tolist())) > 4


def test_groups_in_any_order_are_the_same_groups(device: str) -> None:
    """``groups`` that name the contiguous groups equal ``num_proxies``, and renumbered proxies permute the ranking."""
    q, k = inputs(2, 1, 8, 4, 300, device)
    options = {"gamma": 0.7, "block_size": 32, "min_budget": 32}
    by_number = flexproxy.select(q, k, config=ProxyConfig(num_proxies=2, **options))  # type: ignore[arg-type]
    by_name = flexproxy.select(q, k, config=ProxyConfig(groups=[0] * 4 + [1] * 4, **options))  # type: ignore[arg-type]
    renumbered = flexproxy.select(q, k, config=ProxyConfig(groups=[1] * 4 + [0] * 4, **options))  # type: ignore[arg-type]
    assert torch.equal(by_name.rank, by_number.rank)
    assert torch.equal(renumbered.rank, by_number.rank.flip(1))
    assert torch.equal(renumbered.block_map(), by_number.block_map())


def test_permuted_batch_gives_permuted_results(device: str) -> None:
    q, k = inputs(3, 3, 4, 2, 200, device)
    real = (torch.arange(200) >= torch.tensor([[0], [50], [111]])).to(device)
    order = torch.tensor([2, 0, 1], device=device)
    shared = replace(CONFIG, num_proxies=4, sharing="rows")
    for config in (CONFIG, ProxyConfig(density=0.4, block_size=32, min_budget=32), shared):
        plain = flexproxy.select(q, k, mask_mod=and_masks(masks.causal, masks.padding(real)), config=config)
        mask_mod = and_masks(masks.causal, masks.padding(real[order]))
        permuted = flexproxy.select(q[order], k[order], mask_mod=mask_mod, config=config)
        assert torch.equal(permuted.rank, plain.rank[order])
        assert torch.equal(permuted.count, plain.count[order])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_sequence(side: str, device: str) -> None:
    """A sequence padded by whole blocks keeps the blocks that it keeps alone."""
    q, k = inputs(4, 1, 4, 2, 256, device)
    alone = flexproxy.select(q, k, config=CONFIG).block_map()
    noise = inputs(5, 1, 4, 2, 64, device)
    parts = [[x, y] if side == "left" else [y, x] for x, y in zip(noise, (q, k), strict=True)]
    padded_q, padded_k = (torch.cat(part, 2) for part in parts)
    real = torch.ones(1, 320, dtype=torch.long, device=device)
    start = 64 if side == "left" else 0
    real[:, : 64 if side == "left" else 0] = 0
    real[:, start + 256 :] = 0
    mask_mod = and_masks(masks.causal, masks.padding(real))
    padded = flexproxy.select(padded_q, padded_k, mask_mod=mask_mod, config=CONFIG).block_map()
    inner = slice(start // 32, start // 32 + 8)
    assert torch.equal(padded[:, :, inner, inner], alone)
    padded[:, :, inner, inner] = False
    assert not bool(padded.any())


def test_packed_documents_rank_as_they_do_alone(device: str) -> None:
    """Documents packed into one sequence at block borders rank their own blocks as each does alone."""
    q, k = inputs(6, 1, 4, 2, 384, device)
    ids = torch.tensor([0] * 128 + [1] * 256, device=device)
    packed = flexproxy.select(q, k, mask_mod=and_masks(masks.causal, masks.document(ids)), config=CONFIG)
    last = flexproxy.select(q[:, :, 128:], k[:, :, 128:], config=CONFIG)
    assert torch.equal(packed.count[:, :, 4:], last.count)
    assert torch.equal(packed.block_map()[:, :, 4:, 4:], last.block_map())
    first = flexproxy.select(q[:, :, :128], k[:, :, :128], config=CONFIG)
    causal = torch.ones(4, 4, device=device).tril().bool()
    ranks = packed.rank[:, :, :4, :4]
    assert torch.equal(ranks[..., causal], first.rank[..., causal])


@pytest.mark.parametrize("seed", range(10))
def test_prefill_in_chunks_ranks_as_the_whole(seed: int, device: str) -> None:
    """Chunks that start at block borders rank as the whole prefill: same specification, and the code follows it.

    Where outliers are sampled, at the borders of what they are compared with, too.
    """
    base = random_case(6000 + seed, device)
    size = base.config.block_size
    length = base.k.shape[2] // size * size + size // 2 + 1
    generator = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads, dim = base.q.shape[0], base.q.shape[1], base.k.shape[1], base.q.shape[3]
    q = torch.randn(batch, heads, length, dim, generator=generator).to(device, base.q.dtype)
    k = torch.randn(batch, kv_heads, length, dim, generator=generator).to(device, base.q.dtype)
    whole = Case(q, k, k, base.config, "default", None, [0] * batch)
    whole_scores = expect(whole, *pooled(whole)).scores
    step = 2 * size if base.config.query_choice == "first" else max(2 * size, NEIGHBOURS)
    for start in range(0, length, step):
        end = min(start + step, length)
        chunk = Case(q[:, :, start:end], k[:, :, :end], k[:, :, :end], base.config, "default", None, [start] * batch)
        expected = expect(chunk, *pooled(chunk))
        rows, columns = slice(start // size, -(-end // size)), slice(0, -(-end // size))
        torch.testing.assert_close(expected.scores, whole_scores[:, :, rows, columns], rtol=0, atol=1e-9)
        rank = flexproxy.select(chunk.q, chunk.k, config=base.config).rank
        check_rank(rank.cpu(), expected)


def test_strides_of_memory_do_not_matter(device: str) -> None:
    q, k = inputs(7, 2, 4, 2, 200, device)
    plain = flexproxy.select(q, k, config=CONFIG)
    strided = flexproxy.select(
        q.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([k, k], -1)[..., :32], config=CONFIG
    )
    assert torch.equal(plain.rank, strided.rank)
    assert torch.equal(plain.count, strided.count)


def test_equal_scores_go_to_the_lower_index(device: str) -> None:
    """Repeated keys have equal scores: blocks are ranked by index, after the diagonal."""
    q = whole_numbers(8, 1, 2, 32, 16, device=device).repeat(1, 1, 4, 1)
    k = whole_numbers(9, 1, 2, 32, 16, device=device).repeat(1, 1, 4, 1)
    config = ProxyConfig.paper(block_size=32, min_budget=0)
    rank = flexproxy.select(q, k, mask_mod=masks.full, config=config).rank
    expected = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3], [1, 2, 0, 3], [1, 2, 3, 0]], dtype=torch.int32)
    assert torch.equal(rank[0, 0].cpu(), expected)


def test_the_same_selection_twice(device: str) -> None:
    case = random_case(77, device)
    first = flexproxy.select(case.q, case.k, mask_mod=case.mask_mod, config=case.config)
    second = flexproxy.select(case.q, case.k, mask_mod=case.mask_mod, config=case.config)
    assert torch.equal(first.rank, second.rank)
    assert torch.equal(first.count, second.count)


def test_inputs_are_left_alone(device: str) -> None:
    case = random_case(78, device)
    q, k = case.q.clone(), case.k.clone()
    flexproxy.build(case.q, case.k, mask_mod=case.mask_mod, config=case.config)
    assert torch.equal(q, case.q)
    assert torch.equal(k, case.k)
