"""Random trees of masks against their definition: masks, combinators of ours and of torch, functions, shifts."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

import flexproxy
from flexproxy import ProxyConfig, masks, reference
from flexproxy.masks.structure import MaskMod, clauses_of, documents_of, structure_of
from tests.accuracy import assert_accurate, skip_unless_flex_compiles
from tests.lists import full_blocks, partial_blocks

NUM_TREES, TREES_PER_TEST = 120, 20
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
LARGEST_OFFSET = 2**28  # what is larger counts as this, see `shift`

Truth = Callable[[Tensor], Tensor]  # from positions int64 [B, Sq] to bool, broadcasting to [B, Hq, Sq, Skv]


class Node(NamedTuple):
    """A mask, and what it must mean."""

    mask_mod: MaskMod
    truth: Truth
    position: Callable[[int], list[int]] | None  # of each sequence; where parts do not agree, the argument
    counted: bool  # no function of somebody else is in it
    text: str


class Tree:
    """A random mask for random lengths."""

    def __init__(self, seed: int, device: str, depth: int = 3, own_only: bool = False) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.own_only = device, own_only
        self.batch = self.rng.choice([1, 2, 3])
        self.block_size = self.rng.choice([16, 16, 32, 64, 128, 256])
        self.num_queries = self.rng.randint(1, 2 * self.block_size + 40)
        self.num_keys = self.num_queries + self.rng.choice([0, self.rng.randint(1, 2 * self.block_size)])
        self.root = self.node(self.rng.randint(0, depth))
        if self.rng.random() < 0.5:
            self.root = self.shift(self.root, self.num_keys - self.num_queries)

    def ints(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def node(self, depth: int) -> Node:
        kind = "leaf" if depth == 0 else self.rng.choice(["shift", "and", "and", "or"])
        if kind == "leaf":
            return self.shift(self.leaf()) if self.rng.random() < 0.3 else self.leaf()
        if kind == "shift":
            return self.shift(self.node(depth - 1))
        parts = [self.node(self.rng.randint(0, depth - 1)) for _ in range(self.rng.choice([1, 2, 2, 3]))]
        if len(parts) > 1 and self.rng.random() < 0.2:
            parts[1] = parts[0]
        whose: Any = masks if self.own_only or self.rng.random() < 0.6 else flex
        return self.conjunction(parts, whose) if kind == "and" else self.disjunction(parts, whose)

    def conjunction(self, parts: Sequence[Node], whose: Any) -> Node:
        positions = [part.position for part in parts if part.position is not None]

        def position(default: int) -> list[int]:
            of_parts = zip(*(of_part(default) for of_part in positions), strict=True)
            return [of_all[0] if len(set(of_all)) == 1 else default for of_all in of_parts]

        return Node(
            whose.and_masks(*(part.mask_mod for part in parts)),
            lambda pos: functools.reduce(torch.logical_and, [part.truth(pos) for part in parts]),
            position if positions else None,
            all(part.counted for part in parts),
            f"and({', '.join(part.text for part in parts)})",
        )

    def disjunction(self, parts: Sequence[Node], whose: Any) -> Node:
        return Node(
            whose.or_masks(*(part.mask_mod for part in parts)),
            lambda pos: functools.reduce(torch.logical_or, [part.truth(pos) for part in parts]),
            None,
            all(part.counted for part in parts),
            f"or({', '.join(part.text for part in parts)})",
        )

    def shift(self, inner: Node, by: int | None = None) -> Node:
        rng, far = self.rng, self.num_keys + 70
        if by is None:
            by = rng.choice(
                [rng.randint(-far, far), rng.randint(-9, 9), rng.choice([1, -1]) * rng.choice([2**31, far])]
            )
        values, offset = [by] * self.batch, by
        kind = rng.choice(["int", "tensor", "same", "each"])
        given: int | Tensor = offset
        if kind != "int":
            dtype = torch.int32 if abs(by) < 2**31 and rng.random() < 0.5 else torch.int64
            if kind == "each":
                values = [rng.choice([by, by + rng.randint(-20, 20)]) for _ in values]
            given = torch.tensor(by if kind == "tensor" else values, dtype=dtype, device=self.device)
        values = [max(-LARGEST_OFFSET, min(value, LARGEST_OFFSET)) for value in values]
        step = torch.tensor(values)[:, None]

        def position(default: int) -> list[int]:
            before = [0] * self.batch if inner.position is None else inner.position(0)
            return [x + y for x, y in zip(before, values, strict=True)]

        text = f"shift({inner.text}, {kind} {values})"
        return Node(
            masks.shift(inner.mask_mod, given), lambda pos: inner.truth(pos + step), position, inner.counted, text
        )

    def leaf(self) -> Node:
        rng, length, batch = self.rng, self.num_keys, self.batch
        key = torch.arange(length)
        kinds = ["causal", "full", "window", "document", "document", "padding", "padding", "prefix"]
        kind = rng.choice(kinds if self.own_only else [*kinds, "function", "function of heads"])
        longer = length + rng.choice([0, 0, 7])  # a table may reach beyond the keys

        def start(default: int) -> list[int]:
            return [0] * batch

        def seen(pos: Tensor) -> Tensor:
            return (pos >= 0)[:, None, :, None].expand(-1, -1, -1, length)

        def ago(pos: Tensor) -> Tensor:
            return pos[:, None, :, None] - key

        if kind == "causal":
            return Node(masks.causal, lambda pos: seen(pos) & (ago(pos) >= 0), start, True, kind)
        if kind == "full":
            return Node(masks.full, seen, None, True, kind)
        if kind == "window":
            window = rng.choice([1, rng.randint(1, length + 9), 2**31 - 1])
            given = torch.tensor(window, device=self.device) if rng.random() < 0.5 else window
            return Node(
                masks.sliding_window(given),
                lambda pos: seen(pos) & (ago(pos) >= 0) & (ago(pos) < window),
                start,
                True,
                f"window {window}",
            )
        if kind == "document":
            ids = self.ints(-1, rng.choice([0, 1, 3, 8]), *rng.choice([[batch, longer], [longer]]))
            ids = ids.sort(-1).values if rng.random() < 0.5 else ids  # contiguous, or scattered
            dtype = rng.choice([torch.int32, torch.int64, torch.int8, torch.uint16, torch.uint32, torch.uint64])
            if not dtype.is_signed:
                ids = ids.clamp(min=0)
            label = ids.cpu().expand(batch, -1)
            return Node(masks.document(ids.to(dtype)), self.equal_labels(label, seen), None, True, f"document {dtype}")
        if kind == "padding":
            place, first, second = torch.arange(longer, device=self.device), *self.ints(0, length, 2, batch, 1)
            side = rng.choice(["left", "right", "anywhere", "all"])
            real = {
                "left": place >= first,
                "right": place < second,
                "anywhere": self.ints(0, 3, batch, longer) > 0,
                "all": torch.zeros(batch, longer, dtype=torch.bool, device=self.device),
            }[side]
            given = real.to(rng.choice([torch.bool, torch.int64, torch.uint8]))
            return Node(
                masks.padding(given), self.equal_labels(real.cpu().long() - 1, seen), None, True, f"padding {side}"
            )
        if kind == "prefix":
            prefix = self.ints(0, length + 5, batch)
            lengths = prefix.cpu()[:, None, None, None]
            return Node(
                masks.prefix_lm(prefix), lambda pos: seen(pos) & ((ago(pos) >= 0) | (key < lengths)), start, True, kind
            )
        # A function of somebody else is asked about negative positions as well.
        table = self.ints(0, 2, HEADS, length).bool()
        on_cpu = table.cpu()[:, None] if kind == "function of heads" else table.cpu()[0]

        def function(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            row: Any = h if kind == "function of heads" else 0 * kv_idx
            return ((q_idx + kv_idx) % 3 != 1) & table[row, kv_idx]

        return Node(function, lambda pos: ((pos[:, None, :, None] + key) % 3 != 1) & on_cpu, None, False, kind)

    def equal_labels(self, label: Tensor, seen: Truth) -> Truth:
        """Tables int64 ``[B, S]``, negative for none; behind them is none."""
        end = label.shape[1]

        def truth(pos: Tensor) -> Tensor:
            of_query = label.gather(1, pos.clamp(0, end - 1)).masked_fill((pos < 0) | (pos >= end), -1)
            same = of_query[:, :, None] == label[:, None, : self.num_keys]
            return (same & (of_query >= 0)[:, :, None])[:, None]

        return truth

    # -------------------------------------------------------------------------------------------- what must hold

    @property
    def lengths(self) -> tuple[int, int]:
        return self.num_queries, self.num_keys

    def allowed(self) -> Tensor:
        """The mask by its definition: bool ``[B, Hq, Sq, Skv]``, on the CPU."""
        index = torch.arange(self.num_queries).expand(self.batch, -1)
        return self.root.truth(index).expand(self.batch, HEADS, *self.lengths)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        def normal(heads: int, length: int) -> Tensor:
            return torch.randn(self.batch, heads, length, HEAD_DIM, generator=self.generator).to(self.device)

        return normal(HEADS, self.num_queries), normal(KV_HEADS, self.num_keys), normal(KV_HEADS, self.num_keys)

    def stands(self) -> list[int]:
        """The position of query 0 of each sequence."""
        at_end = self.num_keys - self.num_queries
        return [at_end] * self.batch if self.root.position is None else self.root.position(at_end)

    def own_blocks(self) -> Tensor:
        """Blocks of keys in which queries of a row stand: bool ``[B, 1, Nq, Nk]``."""
        size = self.block_size
        own = torch.zeros(self.batch, 1, -(-self.num_queries // size), -(-self.num_keys // size), dtype=torch.bool)
        for b, offset in enumerate(self.stands()):
            for q in range(self.num_queries):
                if 0 <= q + offset < self.num_keys:
                    own[b, 0, q // size, (q + offset) // size] = True
        return own


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
    assert (structure.clauses is not None) == tree.root.counted
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


def test_many_trees_are_counted() -> None:
    """The seeds reach what they are for."""
    trees = [Tree(seed, "cpu") for seed in range(NUM_TREES)]
    known = [clauses_of(structure_of(t.root.mask_mod), *t.lengths, torch.device("cpu")) is not None for t in trees]
    assert sum(known) > NUM_TREES // 3
    assert sum(not t.root.counted for t in trees) > NUM_TREES // 4
    assert sum(t.root.text.count("(") > 2 for t in trees) > NUM_TREES // 4
    assert sum(t.root.position is not None for t in trees) > NUM_TREES // 3


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
