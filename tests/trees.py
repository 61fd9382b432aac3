"""Random trees of masks, and what they mean: masks, combinators of ours and of torch, functions, shifts."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from flexproxy import masks
from flexproxy.masks.structure import MaskMod

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
LARGEST_OFFSET = 2**28  # what is larger counts as this, see `shift`

Truth = Callable[[Tensor], Tensor]  # from positions int64 [B, Sq] to bool, broadcasting to [B, Hq, Sq, Skv]


class Node(NamedTuple):
    """A mask, and what it must mean."""

    mask_mod: MaskMod
    truth: Truth
    position: Callable[[int], list[int]] | None  # of each sequence; where parts do not agree, the argument
    clauses: int | None  # how many; None where a function of somebody else is in it
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

    @staticmethod
    def number(parts: Sequence[Node], combine: Callable[[list[int]], int]) -> int | None:
        known = [part.clauses for part in parts if part.clauses is not None]
        return combine(known) if len(known) == len(parts) else None

    def conjunction(self, parts: Sequence[Node], whose: Any) -> Node:
        positions = [part.position for part in parts if part.position is not None]

        def position(default: int) -> list[int]:
            of_parts = zip(*(of_part(default) for of_part in positions), strict=True)
            return [of_all[0] if len(set(of_all)) == 1 else default for of_all in of_parts]

        return Node(
            whose.and_masks(*(part.mask_mod for part in parts)),
            lambda pos: functools.reduce(torch.logical_and, [part.truth(pos) for part in parts]),
            position if positions else None,
            self.number(parts, math.prod),
            f"and({', '.join(part.text for part in parts)})",
        )

    def disjunction(self, parts: Sequence[Node], whose: Any) -> Node:
        return Node(
            whose.or_masks(*(part.mask_mod for part in parts)),
            lambda pos: functools.reduce(torch.logical_or, [part.truth(pos) for part in parts]),
            None,
            self.number(parts, sum),
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
            masks.shift(inner.mask_mod, given), lambda pos: inner.truth(pos + step), position, inner.clauses, text
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
            return Node(masks.causal, lambda pos: seen(pos) & (ago(pos) >= 0), start, 1, kind)
        if kind == "full":
            return Node(masks.full, seen, None, 1, kind)
        if kind == "window":
            window = rng.choice([1, rng.randint(1, length + 9), 2**31 - 1])
            given = torch.tensor(window, device=self.device) if rng.random() < 0.5 else window
            return Node(
                masks.sliding_window(given),
                lambda pos: seen(pos) & (ago(pos) >= 0) & (ago(pos) < window),
                start,
                1,
                f"window {window}",
            )
        if kind == "document":
            ids = self.ints(-1, rng.choice([0, 1, 3, 8]), *rng.choice([[batch, longer], [longer]]))
            ids = ids.sort(-1).values if rng.random() < 0.5 else ids  # contiguous, or scattered
            dtype = rng.choice([torch.int32, torch.int64, torch.int8, torch.uint16, torch.uint32, torch.uint64])
            if not dtype.is_signed:
                ids = ids.clamp(min=0)
            label = ids.cpu().expand(batch, -1)
            return Node(masks.document(ids.to(dtype)), self.equal_labels(label, seen), None, 1, f"document {dtype}")
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
                masks.padding(given), self.equal_labels(real.cpu().long() - 1, seen), None, 1, f"padding {side}"
            )
        if kind == "prefix":
            prefix = self.ints(0, length + 5, batch)
            lengths = prefix.cpu()[:, None, None, None]
            return Node(
                masks.prefix_lm(prefix), lambda pos: seen(pos) & ((ago(pos) >= 0) | (key < lengths)), start, 1, kind
            )
        # A function of somebody else is asked about negative positions as well.
        table = self.ints(0, 2, HEADS, length).bool()
        on_cpu = table.cpu()[:, None] if kind == "function of heads" else table.cpu()[0]

        def function(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            row: Any = h if kind == "function of heads" else 0 * kv_idx
            return ((q_idx + kv_idx) % 3 != 1) & table[row, kv_idx]

        return Node(function, lambda pos: ((pos[:, None, :, None] + key) % 3 != 1) & on_cpu, None, None, kind)

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
