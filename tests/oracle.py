"""Random cases, and what the specification (flexproxy.reference) says of them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, or_masks

import flexproxy
from flexproxy import ProxyConfig, Selection, masks, pipeline, reference
from flexproxy.masks.structure import MaskMod, structure_of
from flexproxy.stages.lists import compile_block_mask
from flexproxy.stages.proxy import head_groups, pool_heads
from flexproxy.stages.scores import block_scores
from tests.layouts import LOADABLE, OTHERS

# Error of one fp32 operation, relative to the largest term.
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """Inputs of one call.

    mask_mod: None is the default. offset: the position of query 0 in each sequence. ids: of documents and padding, int
    ``[B, Skv]``, where the mask has any. known: flexproxy knows the blocks of the mask without evaluating it.
    blocks: bool ``[B, Hq, Nq, Nk]``, where the mask is given with lists that are stricter than its function.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    config: ProxyConfig
    mask_name: str
    mask_mod: MaskMod | None
    offset: list[int]
    ids: Tensor | None = None
    known: bool = True
    blocks: Tensor | None = None

    @property
    def mask(self) -> dict[str, Any]:
        """The mask as ``select`` takes it."""
        if self.blocks is None:
            return {"mask_mod": self.mask_mod}
        partial, full = self.blocks.to(self.q.device), torch.zeros_like(self.blocks, device=self.q.device)
        mask_mod, size = self.mask_mod or masks.causal, self.config.block_size
        return {"block_mask": compile_block_mask(partial, full, mask_mod, size, self.lengths, False)}

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q.shape[3])

    @property
    def lengths(self) -> tuple[int, int]:
        return self.q.shape[2], self.k.shape[2]

    def token_mask(self) -> Tensor:
        """bool ``[B, Hq, Sq, Skv]``, on the CPU."""
        num_queries, num_keys = self.lengths
        mask_mod = self.mask_mod or masks.shift(masks.causal, num_keys - num_queries)
        device = self.q.device.type
        batch, heads = self.q.shape[:2]
        allowed = reference.token_mask(mask_mod, batch, heads, num_queries, num_keys, device).cpu()
        return allowed if self.blocks is None else reference.listed(allowed, self.blocks, self.config.block_size)

    def labels(self) -> tuple[Tensor, Tensor]:
        """Sequences of queries ``[B, Sq]`` and keys ``[B, Skv]``, on the CPU."""
        if self.ids is None:
            return reference.labels_of(self.token_mask(), self.known)
        position = torch.arange(self.lengths[0]) + self.offset[0]
        return self.ids[:, position], self.ids[:, : self.lengths[1]]

    def groups(self) -> reference.Groups:
        if self.config.groups is None:
            return reference.groups_of(self.config.proxies(self.q.shape[1], self.k.shape[1]), self.q.shape[1])
        number = max(self.config.groups) + 1
        return [[h for h, p in enumerate(self.config.groups) if p == proxy] for proxy in range(number)]


def _mask(
    rng: random.Random, batch: int, heads: int, num_queries: int, num_keys: int, device: str
) -> tuple[str, MaskMod | None, Tensor | None]:
    """A random mask for queries at the end of the keys, and the ids of its documents and padding."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def ints(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator).to(device)

    offset = num_keys - num_queries
    shifts: list[int | Tensor] = [
        offset,
        torch.tensor(offset, device=device),
        torch.full((batch,), offset, device=device),
    ]
    shift = rng.choice(shifts)
    position = torch.arange(num_keys, device=device)
    left = (position >= ints(max(1, num_keys // 2), batch, 1)).long()
    right = (position < num_keys - ints(max(1, num_keys // 2), batch, 1)).long()
    packed, scattered = ints(4, batch, num_keys).sort(-1).values, ints(3, num_keys) - 1
    some_heads = ints(2, heads).bool()
    number = ints(num_keys, batch)
    join = rng.choice([masks.and_masks, and_masks])
    kinds: dict[str, tuple[MaskMod | None, Tensor | None]] = {
        "default": (None, None),
        "causal": (masks.causal, None),
        "full": (masks.full, None),
        "window": (join(masks.causal, masks.sliding_window(rng.randint(1, num_keys))), None),
        "left padding": (join(masks.causal, masks.padding(left)), left - 1),
        "right padding": (join(masks.causal, masks.padding(right)), right - 1),
        "documents": (join(masks.causal, masks.document(packed)), packed),
        "scattered documents": (join(masks.causal, masks.document(scattered)), scattered),
        "documents and padding": (
            join(masks.causal, masks.document(packed), masks.padding(left)),
            torch.where(left > 0, packed, -1),
        ),
        "windows of documents": (join(masks.sliding_window(rng.randint(1, num_keys)), masks.document(packed)), packed),
        "prefix": (masks.prefix_lm(number), None),
        "window or prefix": (
            or_masks(masks.sliding_window(rng.randint(1, num_keys)), masks.prefix_lm(number // 4)),
            None,
        ),
        "closure": (lambda b, h, q, kv: (q >= kv) & ((q - kv) % 3 != 1), None),
        "closure of the batch": (lambda b, h, q, kv: (q >= kv) & (kv >= number[b] // 3), None),
        "closure of documents": (join(lambda b, h, q, kv: (q >= kv) & (kv % 5 != 1), masks.document(packed)), packed),
        "head-dependent": (lambda b, h, q, kv: (q >= kv) & (some_heads[h] | (q - kv < 100)), None),
        "window of the head": (lambda b, h, q, kv: (q >= kv) & (q - kv < 10 + 60 * h), None),
        "nothing": (lambda b, h, q, kv: q < 0, None),
    }
    name = rng.choice(sorted(kinds))
    mask_mod, ids = kinds[name]
    ids = None if ids is None else ids.cpu().expand(batch, -1)
    return name, mask_mod if mask_mod is None else masks.shift(mask_mod, shift), ids


def random_case(seed: int, device: str = "cpu", bf16: bool = True, lists: bool = False) -> Case:
    """Inputs that vary in every respect that the contract names. Without bf16, those of bf16 are of fp16.

    lists: some masks are given with lists that are stricter than their functions.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    num_kv_heads, group = rng.choice([(1, 1), (1, 4), (2, 2), (2, 3), (4, 1), (2, 1), (3, 2)])
    heads = num_kv_heads * group
    batch = rng.choice([1, 1, 2, 3])
    block_size = rng.choice([16, 32, 64, 128])
    num_queries = rng.randint(1, 6 * block_size if block_size < 128 else 420)
    num_keys = num_queries + rng.choice([0, 0, rng.randint(1, 3 * block_size), 2 * block_size])
    head_dim = rng.choice([16, 32, 64, 80, 96, 128, 256])
    dtype = rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    dtype = torch.float16 if dtype == torch.bfloat16 and not bf16 else dtype
    sharpness = rng.choice([1.0, 2.0, 4.0])

    def tensor(h: int, s: int) -> Tensor:
        x = sharpness * torch.randn(batch, h, s, head_dim, generator=generator)
        return rng.choice([*LOADABLE, *OTHERS])(x.to(device, dtype))

    proxies = [p for p in range(1, heads + 1) if num_kv_heads % p == 0 or (p % num_kv_heads == 0 and heads % p == 0)]
    groups = None
    if rng.random() < 0.2:
        number = rng.randint(1, heads)
        groups = [*range(number), *(rng.randrange(number) for _ in range(heads - number))]
        rng.shuffle(groups)
    config = ProxyConfig(
        num_proxies=rng.choice([None, *proxies]),
        groups=groups,
        gamma=rng.choice([0.3, 0.6, 0.8, 0.9, 0.95, 1.0]),
        density=(seed % 9 + 1) / 10 if seed % 5 == 1 else None,
        stride=rng.choice([1, 2, 4, 4, 8, 16]),
        query_stride=rng.choice([None, None, 1, 2, 8]),
        block_size=block_size,
        min_budget=rng.choice([0, 0, block_size, 2 * block_size + 1]),
        max_budget=rng.choice([None, None, None, 6 * block_size]),
        sink_blocks=rng.choice([0, 1, 1, 2]),
        local_blocks=rng.choice([1, 1, 2]),
        dense_last_blocks=rng.choice([0, 1, 1, 2]),
        query_choice="outlier" if seed % 3 == 2 else "first",
        sharing="rows" if seed % 5 < 2 else "heads",
    )
    q, k, v = tensor(heads, num_queries), tensor(num_kv_heads, num_keys), tensor(num_kv_heads, num_keys)
    name, mask_mod, ids = _mask(rng, batch, heads, num_queries, num_keys, device)
    blocks = None
    if lists and mask_mod is not None and rng.random() < 0.15:
        rows, columns = (-(-length // block_size) for length in (num_queries, num_keys))
        blocks = torch.rand(batch, rng.choice([1, heads]), rows, columns, generator=generator) < 0.7
    known = structure_of(mask_mod).clauses is not None if mask_mod is not None else True
    return Case(q, k, v, config, name, mask_mod, [num_keys - num_queries] * batch, ids, known, blocks)


@dataclass(frozen=True)
class Expected:
    """What the specification says of a case; all on the CPU."""

    allowed: Tensor  # bool [B, Hq, Sq, Skv]
    admissible: Tensor  # bool [B, Hq, Nq, Nk]
    full: Tensor  # bool [B, Hq, Nq, Nk]
    proxy_admissible: Tensor  # bool [B, P, Nq, Nk]
    proxy_forced: Tensor  # bool [B, P, Nq, Nk]
    forced: Tensor  # bool [B, Hq, Nq, Nk]
    dense: Tensor  # bool [B, Hq, Nq]
    scores: Tensor  # fp64 [B, P, Nq, Nk]
    q_label: Tensor  # int [B, Hq, Sq], of the documents of valid queries; 0 for all where there are none
    k_label: Tensor  # int [B, Skv], the same
    masses: dict[int, Tensor]  # fp64 [B, Hq, Nk], by label
    score_error: float  # bound of the error of an fp32 score

    def counts(self, gamma: float, config: ProxyConfig) -> Tensor:
        """Blocks that every row keeps, int32 ``[B, Hq, Nq]``."""
        size, most = config.block_size, self.forced.sum(-1).amax(-1)
        count = {label: torch.zeros_like(most) for label in self.masses}
        for (label, masses), b in itertools.product(self.masses.items(), range(len(most))):
            own = (self.k_label[b] == label).nonzero().flatten().div(size, rounding_mode="floor").unique()
            part, bounds = masses[b, None][..., own], (config.min_budget, config.max_budget)
            count[label][b] = reference.budgets(part, gamma, *bounds, size, most[b, None])[0]
        return reference.row_counts(count, self.q_label, self.dense, self.admissible.shape[-1], size)

    def thresholds(self, b: int) -> list[float]:
        """Where the count of a document of sequence b may change with gamma, ascending."""
        cumulative = [masses[b].sort(-1, descending=True).values.cumsum(-1) for masses in self.masses.values()]
        return sorted(set(torch.stack(cumulative).flatten().tolist()))


def pooled(case: Case) -> tuple[Tensor, Tensor]:
    """Proxy queries (all of them, where some are chosen) and proxy keys, as the implementation in use makes them."""
    config = case.config
    groups, k_groups = head_groups(config, case.q.shape[1], case.k.shape[1])
    q_stride, k_stride = config.strides
    q_stride = 1 if config.chooses_queries else q_stride
    return pool_heads(case.q, groups, q_stride), pool_heads(case.k, k_groups, k_stride)


def any_of_group(x: Tensor, groups: reference.Groups) -> Tensor:
    return torch.stack([x[:, heads].any(1) for heads in groups], 1)


def expect(case: Case, q_proxy: Tensor, k_proxy: Tensor) -> Expected:
    """Run the specification. The scores are those of the given pooled heads, whose own rounding is another test's."""
    config, groups = case.config, case.groups()
    size, (q_stride, k_stride) = config.block_size, config.strides
    allowed = case.token_mask()
    admissible, full = reference.classify(allowed, size)
    labels = case.labels()
    of_group = any_of_group(allowed, groups)

    def forced(pairs: Tensor, some: Tensor) -> Tensor:
        sink, rule = reference.sinks(pairs, *labels, size), (config.sink_blocks, config.local_blocks)
        return reference.forced(case.offset, some, sink, case.lengths[0], size, *rule)

    proxy_admissible = any_of_group(admissible, groups)
    both_forced = forced(of_group, proxy_admissible), forced(allowed, admissible)
    dense = reference.last_rows(allowed, labels[0], size, config.dense_last_blocks)
    sampled = of_group[..., ::k_stride]
    q_proxy, k_proxy, q, k = (x.cpu() for x in (q_proxy, k_proxy, case.q, case.k))
    if config.query_choice == "first":
        sampled = sampled[:, :, ::q_stride]
    else:
        valid = any_of_group(allowed.any(-1), groups)
        chosen = reference.outlying_queries(q_proxy, valid, q_stride)[..., None]
        sampled = sampled.gather(2, chosen.expand(-1, -1, -1, sampled.shape[3]))
        q_proxy = q_proxy.gather(2, chosen.expand(-1, -1, -1, q_proxy.shape[3]))
    scores = reference.block_scores(q_proxy, k_proxy, sampled, (size // q_stride, size // k_stride), case.scale)
    q_label, k_label = torch.zeros(allowed.shape[:3], dtype=torch.int64), torch.zeros(len(k), k.shape[2])
    if "documents" in case.mask_name:  # of padding alone there is one sequence
        q_label, k_label = torch.where(allowed.any(-1), labels[0][:, None], -1), labels[1]
    masses = {}
    for label in sorted(set(q_label.flatten().tolist()) - {-1}):
        own = allowed & (q_label == label)[..., None]
        masses[label] = reference.probe_masses(q, k, own, size, case.scale)
    # A score is a sum of D products less a log-sum-exp: each rounded, the sum in an order that nobody promises.
    largest = float(case.scale * q_proxy.double().norm(dim=-1).max() * k_proxy.double().norm(dim=-1).max())
    score_error = EPS * (8 * math.sqrt(q.shape[3]) * max(largest, 1.0) + 16)
    return Expected(
        allowed, admissible, full, proxy_admissible, *both_forced, dense, scores, q_label, k_label, masses, score_error
    )


def check_rank(rank: Tensor, expected: Expected) -> None:
    """Ranks are a permutation that follows the contract.

    A scored block may stand where the specification has one whose score differs by no more than twice the error of a
    score, and nowhere else.
    """
    exact = reference.rank_blocks(expected.scores, expected.proxy_admissible, expected.proxy_forced)
    assert torch.equal(rank.long().sort(-1).values, torch.arange(rank.shape[-1]).expand_as(rank))

    # Class of each block by the specification: forced 0, scored 1, unscored 2, inadmissible 3.
    kind = torch.where(expected.scores == -math.inf, 2, 1)
    kind = torch.where(expected.proxy_forced, 0, kind)
    kind = torch.where(expected.proxy_admissible, kind, 3)
    order, exact_order = rank.long().argsort(-1), exact.long().argsort(-1)
    in_order = kind.gather(-1, order)
    assert torch.equal(in_order, kind.gather(-1, exact_order)), "classes out of order"
    scored = in_order == 1
    assert torch.equal(order[~scored], exact_order[~scored]), "equals not by index"
    gap = (expected.scores.gather(-1, order) - expected.scores.gather(-1, exact_order))[scored].abs()
    assert bool((gap <= 2 * expected.score_error).all()), f"the score that ranks there is {gap.max()} away"


def check_count(count: Tensor, expected: Expected, config: ProxyConfig) -> None:
    """Counts lie between those for gamma less and plus the rounding of a mass."""
    error = 64 * EPS
    gammas = (1.0, 1.0) if config.gamma == 1.0 else (config.gamma - error, config.gamma + error)
    low, high = (expected.counts(gamma, config) for gamma in gammas)
    assert bool(((low <= count) & (count <= high)).all()), (low, count, high)


@contextmanager
def recorded_scores() -> Iterator[list[Tensor]]:
    """The scores of the selections inside, as the implementation in use gives them."""
    found: list[Tensor] = []

    def recorded(*arguments: Any) -> Tensor:
        found.append(block_scores(*arguments))
        return found[-1]

    with mock.patch.object(pipeline, "block_scores", recorded):
        yield found


def check_shares(case: Case, selection: Selection, scores: Tensor, expected: Expected) -> None:
    """With ``sharing="rows"``: counts are exactly those that follow from the scores, ranks, and counts of the heads.

    The scores, fp32, are within their error of the specification's.
    """
    scores, config, admissible = scores.cpu().double(), case.config, expected.admissible.sum(-1)
    known = expected.scores.isfinite()
    assert torch.equal(known, scores.isfinite()), "other blocks have a score"
    gap = (scores - expected.scores)[known].abs()
    assert bool((gap <= expected.score_error).all()), f"a score is {gap.max()} away"
    if config.density is None:
        heads = replace(config, sharing="heads")
        count = flexproxy.select(case.q, case.k, **case.mask, config=heads).count.cpu()
        check_count(count, expected, config)
        total = torch.minimum(count, admissible).sum((1, 2)).tolist()
    else:
        total = [int(config.density * number) for number in admissible.sum((1, 2)).tolist()]
    if config.target < 1.0:
        bounds = math.ceil(config.min_budget / config.block_size), config.max_blocks
        ranked = selection.rank.cpu(), case.groups(), expected.admissible, expected.forced
        count = reference.share(scores, *ranked, expected.dense, total, bounds)
    got = selection.count.cpu()
    kept = torch.minimum(got, admissible).sum((1, 2)).tolist()
    assert torch.equal(got, count), f"of {total} blocks {kept} are kept; {got.tolist()}, expected {count.tolist()}"
