"""The selection against its specification: ranks, counts, lists, over random cases."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import and_masks, create_block_mask

import flexproxy
from flexproxy import ProxyConfig, masks, reference
from flexproxy.ops import implementations
from tests.oracle import EPS, check_count, check_rank, check_shares, expect, pooled, random_case, recorded_scores

NUM_CASES, CASES_PER_TEST = 240, 12


def interpreted(device: str) -> bool:
    """Whether the Triton kernels in use are interpreted: there bf16 products are wrong (triton 3.8)."""
    return device == "cpu" and implementations.picked(torch.device("cpu")) == "triton"


@pytest.mark.parametrize("first", range(0, NUM_CASES, CASES_PER_TEST))
def test_selection_equals_the_reference(first: int, implementation: str) -> None:
    """Ranks, counts and lists are those of the specification, over all that the contract lets vary.

    Exact but for near-ties, each of which is looked at: a block may stand where one ranks whose score differs by less
    than twice the error of an fp32 score, ``EPS * (8 sqrt(D) max|q||k| scale + 16)``; a count may be that of a gamma
    within ``64 EPS``. Where rows share, counts are those of the scores that the implementation has, and its heads' own.
    """
    for seed in range(first, first + CASES_PER_TEST):
        case = random_case(seed, implementation, bf16=not interpreted(implementation), lists=True)
        expected = expect(case, *pooled(case))
        with recorded_scores() as scores:
            selection = flexproxy.select(case.q, case.k, **case.mask, config=case.config)
        rank, count = selection.rank.cpu(), selection.count.cpu()
        groups = case.groups()
        try:
            assert all(h in groups[p] for h, p in enumerate(selection.proxy_of.tolist()))
            check_rank(rank, expected)
            if case.config.sharing == "heads":
                check_count(count, expected, case.config)
            else:
                check_shares(case, selection, scores[0], expected)

            # Given ranks and counts, all that follows is exact.
            selected = reference.select(rank, count, groups, expected.admissible, expected.forced)
            assert torch.equal(selection.block_map().cpu(), selected)
            kept, admissible = selected.sum((-2, -1)), expected.admissible.sum((-2, -1))
            density = torch.where(admissible > 0, kept / admissible.clamp(min=1), 1.0)
            torch.testing.assert_close(selection.density().cpu(), density, rtol=1e-6, atol=0)
            check_lists(selection.block_mask(), selected, expected.full)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {case.mask_name}, {case.config}: {error}") from error


def check_lists(mask: object, selected: torch.Tensor, full: torch.Tensor) -> None:
    """A BlockMask's lists hold the selected blocks, ascending, split by the specification's full blocks."""
    for wanted, number, index in (
        (selected & ~full, mask.kv_num_blocks, mask.kv_indices),  # type: ignore[attr-defined]
        (selected & full, mask.full_kv_num_blocks, mask.full_kv_indices),  # type: ignore[attr-defined]
    ):
        number, index = number.cpu(), index.cpu()
        assert number.dtype == index.dtype == torch.int32
        assert torch.equal(number, wanted.sum(-1, dtype=torch.int32))
        column = torch.arange(index.shape[-1])
        listed = torch.where(column < number[..., None], index, index.shape[-1])
        ascending = torch.where(wanted, column, index.shape[-1]).sort(-1).values
        assert torch.equal(listed, ascending.to(torch.int32))


def rounds_lengths_up() -> bool:
    """Whether this torch's create_block_mask rounds lengths up to whole blocks (2.5): then ragged ones differ."""
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, 1, 1, 130, 130, device="cpu")
    return tuple(mask.shape[-2:]) != (130, 130)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_create_block_mask_gives_the_same_mask(first: int, device: str) -> None:
    """The route through create_block_mask and ``selection.mask_mod()`` gives build's mask: dense, partial and full."""
    for seed in range(first, first + 20):
        case = random_case(1000 + seed, device)
        num_queries, num_keys = case.lengths
        size = case.config.block_size
        if rounds_lengths_up() and (num_queries % size or num_keys % size or num_queries < 128):
            continue
        selection = flexproxy.select(case.q, case.k, mask_mod=case.mask_mod, config=case.config)
        built = flexproxy.build(case.q, case.k, mask_mod=case.mask_mod, config=case.config)
        mask_mod = case.mask_mod or flexproxy.masks.shift(flexproxy.masks.causal, num_keys - num_queries)
        both = and_masks(mask_mod, selection.mask_mod())
        created = create_block_mask(
            both, case.q.shape[0], case.q.shape[1], num_queries, num_keys, device=device, BLOCK_SIZE=size
        )
        assert created.full_kv_num_blocks is not None
        assert built.full_kv_num_blocks is not None
        assert torch.equal(built.to_dense(), created.to_dense()), seed
        assert torch.equal(built.kv_num_blocks, created.kv_num_blocks), seed
        assert torch.equal(built.full_kv_num_blocks, created.full_kv_num_blocks), seed
        if not rounds_lengths_up():
            assert tuple(built.shape) == tuple(created.shape)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_classified_mask_gives_the_same_selection(first: int, device: str) -> None:
    """A mask given as a BlockMask, computed once, selects as the same mask given as a function."""
    for seed in range(first, first + 20):
        case = random_case(2000 + seed, device)
        size, lengths = case.config.block_size, case.lengths
        if case.mask_mod is None or (
            rounds_lengths_up() and (lengths[0] % size or lengths[1] % size or lengths[0] < 128)
        ):
            continue
        for dims in ((1, 1), case.q.shape[:2]):
            if dims == (1, 1) and case.mask_name not in ("causal", "full", "window", "closure", "nothing"):
                continue
            given = create_block_mask(
                case.mask_mod, dims[0], dims[1], lengths[0], lengths[1], device=device, BLOCK_SIZE=size
            )
            if given.BLOCK_SIZE[0] != size:
                continue  # torch 2.5 labels small blocks as 128 x 128
            by_block = flexproxy.build(case.q, case.k, block_mask=given, config=case.config)
            by_function = flexproxy.build(case.q, case.k, mask_mod=case.mask_mod, config=case.config)
            assert torch.equal(by_block.to_dense(), by_function.to_dense())
            assert torch.equal(by_block.kv_num_blocks, by_function.kv_num_blocks)


@pytest.mark.parametrize("choice", ["first", "outlier"])
def test_a_classified_mask_may_say_the_same_of_all_heads(choice: str, device: str) -> None:
    """The lists of a BlockMask hold for every head, where its function differs from head to head; and the reverse."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 1024, 32, generator=generator).to(device) for heads in (4, 2))
    sampling: dict[str, Any] = {"stride": 2, "query_stride": 8, "query_choice": choice}
    config = ProxyConfig(num_proxies=2, gamma=0.5, min_budget=128, **sampling)

    def by_head(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & ((query - key) % (h + 2) != 1)

    for mask_mod in (by_head, masks.causal):
        given = [
            create_block_mask(mask_mod, None, heads, 1024, 1024, device=device, BLOCK_SIZE=128) for heads in (None, 4)
        ]
        one, each = (flexproxy.select(q, k, block_mask=mask, config=config) for mask in given)
        assert torch.equal(one.rank, each.rank)
        assert torch.equal(one.count, each.count)


def test_pooling_is_the_mean_rounded_once(device: str) -> None:
    """Pooled heads are within one unit in the last place of the exact mean."""
    for seed in range(40):
        case = random_case(3000 + seed, device)
        groups = case.groups()
        k_groups = reference.key_groups(groups, case.q.shape[1], case.k.shape[1])
        q_stride, k_stride = case.config.strides
        strides = 1 if case.config.query_choice == "outlier" else q_stride, k_stride
        parts = zip((case.q, case.k), (groups, k_groups), strides, pooled(case), strict=True)
        for x, heads, stride, got in parts:
            want = reference.pool_heads(x.cpu(), heads, stride)
            assert got.dtype == x.dtype
            rounding = 4 * EPS * float(x.abs().max())
            torch.testing.assert_close(got.cpu(), want, rtol=torch.finfo(x.dtype).eps, atol=rounding)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.9, 1.0])
def test_density_finds_the_nearest_gamma(density: float, device: str) -> None:
    """``density=`` keeps what one gamma for all heads of a sequence keeps, the one nearest to the target."""
    for seed in range(12):
        case = random_case(4000 + seed, device)
        config = ProxyConfig(
            **{
                name: getattr(case.config, name)
                for name in ("num_proxies", "groups", "stride", "query_stride", "query_choice", "block_size")
            },
            min_budget=case.config.block_size,
            density=density,
            dense_last_blocks=seed % 3,
        )
        case = dataclasses.replace(case, config=config)
        expected = expect(case, *pooled(case))
        count = flexproxy.select(case.q, case.k, **case.mask, config=config).count.cpu()
        rows = expected.admissible.sum(-1)

        def density_of(counts: torch.Tensor, rows: torch.Tensor = rows) -> torch.Tensor:
            kept = torch.minimum(rows, counts).sum(-1) / rows.sum(-1).clamp(min=1)
            return kept.double().mean(1)

        budgets = functools.partial(expected.counts, config=config)
        for b in range(len(rows)):
            steps = expected.thresholds(b)
            middles = [*((x + y) / 2 for x, y in itertools.pairwise(steps)), steps[-1] * (1 - 1e-9)]
            candidates = [steps[0] * (1 - 1e-9), *middles, 1.0]
            reachable = [budgets(gamma)[b] for gamma in candidates if gamma > 0]
            best = min(abs(float(density_of(c[None].expand(len(rows), -1, -1))[b]) - density) for c in reachable)
            got = abs(float(density_of(count)[b]) - density)
            assert got <= best + 1e-6, (seed, b, got, best)
    if density == 1.0:
        assert bool((count >= rows).all())


PAPER = {
    "num_proxies": 1,
    "groups": None,
    "gamma": 0.95,
    "density": None,
    "sharing": "heads",
    "stride": 4,
    "query_stride": None,
    "query_choice": "first",
    "block_size": 128,
    "min_budget": 2048,
    "max_budget": None,
    "sink_blocks": 0,
    "local_blocks": 1,
    "dense_last_blocks": 0,
}


def test_settings_of_the_paper() -> None:
    """Written out, so that no change of a default changes them; every field is among them; changes are checked."""
    assert dataclasses.asdict(ProxyConfig.paper()) == PAPER
    assert dataclasses.asdict(ProxyConfig.paper(num_proxies=4, gamma=0.9)) == PAPER | {"num_proxies": 4, "gamma": 0.9}
    with pytest.raises(ValueError, match="stride: expected a divisor"):
        ProxyConfig.paper(stride=3)
    with pytest.raises(TypeError, match="budget"):
        ProxyConfig.paper(budget=1)


def test_a_selection_can_be_copied() -> None:
    """A deep copy has tensors of its own; its mask is the same function."""
    q = torch.randn(1, 4, 300, 16)
    selection = flexproxy.select(q, q, config=ProxyConfig(block_size=32, min_budget=0, gamma=0.5))
    for made, shared in ((copy.copy(selection), True), (copy.deepcopy(selection), False)):
        assert (made.rank.data_ptr() == selection.rank.data_ptr()) is shared
        assert torch.equal(made.block_map(), selection.block_map())
        assert made.allowed is selection.allowed
        assert torch.equal(made.block_mask().to_dense(), selection.block_mask().to_dense())


def test_a_selection_can_be_pickled() -> None:
    """With its mask: what it lists and allows afterwards is what it did before."""
    q = torch.randn(2, 4, 200, 16)
    ids = torch.arange(200) // 70
    for mask_mod in (None, masks.and_masks(masks.causal, masks.document(ids)), masks.shift(masks.full, 3)):
        config = ProxyConfig(block_size=32, min_budget=0, gamma=0.5)
        selection = flexproxy.select(q, q, mask_mod=mask_mod, config=config)
        made = pickle.loads(pickle.dumps(selection))
        ours, theirs = selection.block_mask(), made.block_mask()
        assert torch.equal(ours.kv_indices, theirs.kv_indices)
        functions = (reference.token_mask(mask.mask_mod, 2, 4, 200, 200, "cpu") for mask in (ours, theirs))
        assert torch.equal(*functions)
        assert repr(made) == repr(selection)


def test_a_selection_of_a_nameless_mask_cannot_be_pickled() -> None:
    q = torch.randn(1, 2, 200, 16)
    selection = flexproxy.select(q, q, mask_mod=lambda b, h, q, kv: q >= kv)
    with pytest.raises(TypeError, match="mask_mod: expected a mask that can be pickled"):
        pickle.dumps(selection)
    assert copy.deepcopy(selection).allowed is selection.allowed


def test_no_default_is_behind_the_paper() -> None:
    """``paper`` names every field: with other defaults, its settings are the same."""

    class Other(ProxyConfig):
        def __init__(self, **fields: Any) -> None:
            assert fields.keys() == PAPER.keys()
            super().__init__(**fields)

    assert dataclasses.asdict(Other.paper()) == PAPER


def test_the_method_of_the_paper(device: str) -> None:
    """Under the paper's settings, stage by stage as written out: counts and blocks are those of the specification."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 2700, 32, generator=generator)
    k = torch.randn(1, 2, 2700, 32, generator=generator)
    k[:, :, 600:700] += 3.0
    q[:, 3] += 3.0  # one head finds nearly all in two blocks, the others need more than the least budget
    selection = flexproxy.select(q.to(device), k.to(device), config=ProxyConfig.paper())

    allowed = reference.token_mask(masks.causal, 1, 4, 2700, 2700, "cpu")
    admissible, _ = reference.classify(allowed, 128)
    groups, k_groups = [[0, 1, 2, 3]], [[0, 1]]
    q_proxy, k_proxy = reference.pool_heads(q, groups, 4), reference.pool_heads(k, k_groups, 4)
    scores = reference.block_scores(q_proxy, k_proxy, allowed[:, :1, ::4, ::4], (32, 32), 32**-0.5)
    diagonal = torch.eye(22, dtype=torch.bool)[None, None]
    rank = reference.rank_blocks(scores, admissible[:, :1], diagonal)
    masses = reference.probe_masses(q, k, allowed, 128, 32**-0.5)
    count = reference.budgets(masses, 0.95, 2048, None, 128, torch.ones(1, 4))
    assert count.min() == 16
    assert 16 < count.max() <= 22
    rows = count[..., None].expand(-1, -1, 22)
    assert torch.equal(selection.count.cpu(), rows)
    assert torch.equal(selection.rank.cpu(), rank)
    force = diagonal.expand_as(admissible)
    assert torch.equal(selection.block_map().cpu(), reference.select(rank, rows, groups, admissible, force))
