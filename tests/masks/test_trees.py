"""Random trees of masks against their definition: masks, combinators of ours and of torch, functions, shifts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

import flexproxy
from flexproxy import ProxyConfig, masks, reference
from flexproxy.masks.clauses import MAX_CLAUSES
from flexproxy.masks.structure import clauses_of, documents_of, structure_of
from tests.accuracy import assert_accurate, skip_unless_flex_compiles
from tests.lists import full_blocks, partial_blocks
from tests.trees import HEADS, Tree

NUM_TREES, TREES_PER_TEST = 120, 20


def check_lists(tree: Tree) -> None:
    """The function allows what the parts mean, and with the whole budget ``build`` lists the blocks of that."""
    allowed, mask_mod = tree.allowed(), tree.root.mask_mod
    got = reference.token_mask(mask_mod, tree.batch, HEADS, *tree.lengths, tree.device).cpu()
    assert torch.equal(got, allowed), "tokens"
    q, k, _ = tree.inputs()
    block_mask = flexproxy.build(q, k, mask_mod=mask_mod, config=ProxyConfig(block_size=tree.block_size, gamma=1.0))
    some, full = reference.classify(allowed, tree.block_size)
    assert torch.equal(partial_blocks(block_mask, some.shape[-1]), some & ~full), "partial blocks"
    assert torch.equal(full_blocks(block_mask, some.shape[-1]), full), "full blocks"
    tokens = reference.token_mask(block_mask.mask_mod, tree.batch, HEADS, *tree.lengths, tree.device).cpu()
    assert torch.equal(tokens, allowed), "tokens of the BlockMask"


def check_own_blocks(tree: Tree) -> None:
    """However small the budget, a row keeps the blocks that its queries stand in, by the rule of positions."""
    q, k, _ = tree.inputs()
    config = ProxyConfig(block_size=tree.block_size, gamma=1e-6, min_budget=0, sink_blocks=0, local_blocks=1)
    selection = flexproxy.select(q, k, mask_mod=tree.root.mask_mod, config=config)
    some, _ = reference.classify(tree.allowed(), tree.block_size)
    missing = tree.own_blocks() & some & ~selection.block_map().cpu()
    assert not bool(missing.any()), f"{int(missing.sum())} own blocks are missing"


def check_known(tree: Tree) -> None:
    """Clauses are known of a tree of masks, and where it stands; keys and queries of other labels are not allowed."""
    structure, device = structure_of(tree.root.mask_mod), torch.device(tree.device)
    clauses, number = clauses_of(structure, *tree.lengths, device), tree.root.clauses
    assert (None if clauses is None else len(clauses)) == (None if number is None or number > MAX_CLAUSES else number)
    stands = structure.offset(tree.num_keys - tree.num_queries, device).expand(tree.batch)
    assert stands.tolist() == tree.stands()
    labels = documents_of(structure, *tree.lengths, device)
    if labels is not None:
        of_query, of_key = (label.cpu() for label in labels)
        same = (of_query[:, :, None] == of_key[:, None]) & (of_query >= 0)[:, :, None]
        assert not bool((tree.allowed() & ~same[:, None]).any()), "labels"


CHECKS = [check_lists, check_own_blocks, check_known]


@pytest.mark.parametrize("first", range(0, NUM_TREES, TREES_PER_TEST))
@pytest.mark.parametrize("check", CHECKS)
def test_trees(check: Callable[[Tree], None], first: int, device: str) -> None:
    for seed in range(first, first + TREES_PER_TEST):
        tree = Tree(seed, device)
        try:
            check(tree)
        except (AssertionError, RuntimeError) as error:
            case = f"seed {seed}, {tree.lengths} by {tree.block_size}, {tree.root.text}"
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 204))
def test_trees_by_each_implementation(seed: int, implementation: str) -> None:
    tree = Tree(seed, implementation)
    for check in CHECKS:
        check(tree)


def test_planted_mistakes_are_seen() -> None:
    """A mask that means, allows or knows something else than its tree."""
    mistakes: list[tuple[Callable[[Tree], None], Callable[[Tree], dict[str, Any]]]] = [
        (check_lists, lambda tree: {"mask_mod": masks.shift(tree.root.mask_mod, 1)}),
        (check_own_blocks, lambda tree: {"position": lambda default: [n - tree.block_size for n in tree.stands()]}),
        (check_known, lambda tree: {"position": lambda default: [-3] * tree.batch}),
    ]
    for check, mistake in mistakes:
        seen = 0
        for seed in range(6):
            right, tree = Tree(seed, "cpu"), Tree(seed, "cpu")
            tree.root = right.root._replace(**mistake(right))
            try:
                check(tree)
            except (AssertionError, RuntimeError):
                seen += 1
        assert seen > 0, check.__name__


def test_the_seeds_reach_what_they_are_for() -> None:
    roots = [Tree(seed, "cpu").root for seed in range(NUM_TREES)]
    assert sum(root.clauses is not None and root.clauses <= MAX_CLAUSES for root in roots) > NUM_TREES // 3
    assert sum(root.clauses is None for root in roots) > NUM_TREES // 4
    assert sum(root.text.count("(") > 2 for root in roots) > NUM_TREES // 4
    assert sum(root.position is not None for root in roots) > NUM_TREES // 3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("seed", range(8))
def test_eager_attention(seed: int, device: str) -> None:
    """Eager ``flex_attention`` under the BlockMask of a small budget is dense attention to what it keeps."""
    tree = Tree(seed, device)
    q, k, v = tree.inputs()
    config = ProxyConfig(block_size=tree.block_size, gamma=0.5, min_budget=0)
    selection = flexproxy.select(q, k, mask_mod=tree.root.mask_mod, config=config)
    out = flex.flex_attention(q, k, v, block_mask=selection.block_mask(), enable_gqa=True)
    assert isinstance(out, Tensor)
    size = tree.block_size
    kept = selection.block_map().cpu().repeat_interleave(size, 2).repeat_interleave(size, 3)
    allowed = tree.allowed() & kept[:, :, : tree.num_queries, : tree.num_keys]
    assert_accurate(out, q, k, v, allowed.to(device))
    assert bool((out.cpu()[~allowed.any(-1)] == 0).all())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 3, 5, 7])
def test_compiled_attention(seed: int, device: str) -> None:
    """Compiled ``flex_attention`` under the whole mask is dense attention."""
    skip_unless_flex_compiles(device)
    tree = Tree(seed, device)
    q, k, v = tree.inputs()
    config = ProxyConfig(block_size=tree.block_size, gamma=1.0)
    out = flexproxy.attention(q, k, v, mask_mod=tree.root.mask_mod, config=config)
    assert isinstance(out, Tensor)
    assert_accurate(out, q, k, v, tree.allowed().to(device))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_traced_build(seed: int, device: str) -> None:
    """In a trace a tree of our own masks gives the lists that it gives in eager mode."""
    if torch.__version__ < "2.6":
        pytest.skip("torch 2.5 does not trace create_mask")
    tree = Tree(seed, device, own_only=True)
    q, k, _ = tree.inputs()
    config = ProxyConfig(block_size=tree.block_size, gamma=0.5, min_budget=0)

    def lists(q: Tensor, k: Tensor) -> tuple[Tensor | None, ...]:
        mask = flexproxy.build(q, k, mask_mod=tree.root.mask_mod, config=config)
        return mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices

    traced = torch.compile(lists, fullgraph=True, backend="eager")(q, k)
    for ours, eager in zip(traced, lists(q, k), strict=True):
        assert ours is not None
        assert eager is not None
        assert torch.equal(ours, eager)
