"""Random cases, and what the specification (flexproxy.reference) says of them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, or_masks

from flexproxy import ProxyConfig, masks, reference
from flexproxy.masks.structure import MaskMod
from flexproxy.stages.proxy import head_groups, pool_heads

# Error of one fp32 operation, relative to the largest term.
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """Inputs of one call. ``offset``: the position of query 0 in each sequence; ``mask_mod``: None is the default."""

    q: Tensor
    k: Tensor
    v: Tensor
    config: ProxyConfig
    mask_name: str
    mask_mod: MaskMod | None
    offset: list[int]

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
        return reference.token_mask(mask_mod, self.q.shape[0], self.q.shape[1], num_queries, num_keys, device).cpu()

    def groups(self) -> reference.Groups:
        if self.config.groups is None:
            return reference.groups_of(self.config.num_proxies, self.q.shape[1])
        number = max(self.config.groups) + 1
        return [[h for h, p in enumerate(self.config.groups) if p == proxy] for proxy in range(number)]


def _mask(
    rng: random.Random, batch: int, heads: int, num_queries: int, num_keys: int, device: str
) -> tuple[str, MaskMod | None]:
    """A random mask for queries at the end of the keys."""
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
    packed = ints(4, batch, num_keys).sort(-1).values
    some_heads = ints(2, heads).bool()
    number = ints(num_keys, batch)
    kinds: dict[str, MaskMod | None] = {
        "default": None,
        "causal": masks.causal,
        "full": masks.full,
        "window": and_masks(masks.causal, masks.sliding_window(rng.randint(1, num_keys))),
        "left padding": and_masks(masks.causal, masks.padding(left)),
        "right padding": and_masks(masks.causal, masks.padding(right)),
        "documents": and_masks(masks.causal, masks.document(packed)),
        "scattered documents": and_masks(masks.causal, masks.document(ints(3, num_keys) - 1)),
        "documents and padding": and_masks(masks.causal, masks.document(packed), masks.padding(left)),
        "prefix": masks.prefix_lm(number),
        "window or prefix": or_masks(masks.sliding_window(rng.randint(1, num_keys)), masks.prefix_lm(number // 4)),
        "closure": lambda b, h, q, kv: (q >= kv) & ((q - kv) % 3 != 1),
        "closure of the batch": lambda b, h, q, kv: (q >= kv) & (kv >= number[b] // 3),
        "head-dependent": lambda b, h, q, kv: (q >= kv) & (some_heads[h] | (q - kv < 100)),
        "nothing": lambda b, h, q, kv: q < 0,
    }
    name = rng.choice(sorted(kinds))
    mask_mod = kinds[name]
    return name, mask_mod if mask_mod is None else masks.shift(mask_mod, shift)


def random_case(seed: int, device: str = "cpu", bf16: bool = True) -> Case:
    """Inputs that vary in every respect that the contract names. Without bf16, those of bf16 are of fp16."""
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
        layout = rng.choice(["bhsd", "bshd", "padded"])
        if layout == "bshd":
            x = torch.randn(batch, s, h, head_dim, generator=generator).transpose(1, 2)
        elif layout == "padded":
            x = torch.randn(batch, h, s, head_dim + 8, generator=generator)[..., :head_dim]
        else:
            x = torch.randn(batch, h, s, head_dim, generator=generator)
        return (x * sharpness).to(device, dtype)

    proxies = [p for p in range(1, heads + 1) if num_kv_heads % p == 0 or (p % num_kv_heads == 0 and heads % p == 0)]
    groups = None
    if rng.random() < 0.2:
        number = rng.randint(1, heads)
        groups = [*range(number), *(rng.randrange(number) for _ in range(heads - number))]
        rng.shuffle(groups)
    config = ProxyConfig(
        num_proxies=rng.choice(proxies),
        groups=groups,
        gamma=rng.choice([0.3, 0.6, 0.8, 0.9, 0.95, 1.0]),
        stride=rng.choice([1, 2, 4, 4, 8, 16]),
        query_stride=rng.choice([None, None, 1, 2, 8]),
        block_size=block_size,
        min_budget=rng.choice([0, 0, block_size, 2 * block_size + 1]),
        max_budget=rng.choice([None, None, None, 5 * block_size]),
        sink_blocks=rng.choice([0, 0, 1]),
        local_blocks=rng.choice([1, 1, 2]),
        query_choice="outlier" if seed % 3 == 2 else "first",
    )
    q, k, v = tensor(heads, num_queries), tensor(num_kv_heads, num_keys), tensor(num_kv_heads, num_keys)
    name, mask_mod = _mask(rng, batch, heads, num_queries, num_keys, device)
    return Case(q, k, v, config, name, mask_mod, [num_keys - num_queries] * batch)


@dataclass(frozen=True)
class Expected:
    """What the specification says of a case; all on the CPU."""

    allowed: Tensor  # bool [B, Hq, Sq, Skv]
    admissible: Tensor  # bool [B, Hq, Nq, Nk]
    full: Tensor  # bool [B, Hq, Nq, Nk]
    proxy_admissible: Tensor  # bool [B, P, Nq, Nk]
    forced: Tensor  # bool [B, P, Nq, Nk]
    forced_count: Tensor  # int [B, Hq]
    scores: Tensor  # fp64 [B, P, Nq, Nk]
    masses: Tensor  # fp64 [B, Hq, Nk]
    score_error: float  # bound of the error of an fp32 score


def pooled(case: Case) -> tuple[Tensor, Tensor]:
    """Proxy queries (all of them, where some are chosen) and proxy keys, as the implementation in use makes them."""
    config = case.config
    groups, k_groups = head_groups(config.num_proxies, config.groups, case.q.shape[1], case.k.shape[1])
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
    proxy_admissible = any_of_group(admissible, groups)
    forced = reference.forced(
        case.offset, proxy_admissible, case.lengths[0], size, config.sink_blocks, config.local_blocks
    )
    proxy_of = [next(p for p, heads in enumerate(groups) if head in heads) for head in range(case.q.shape[1])]
    forced_count = (forced[:, proxy_of] & admissible).sum(-1).amax(-1)
    sampled = any_of_group(allowed, groups)[..., ::k_stride]
    q_proxy, k_proxy, q, k = (x.cpu() for x in (q_proxy, k_proxy, case.q, case.k))
    if config.query_choice == "first":
        sampled = sampled[:, :, ::q_stride]
    else:
        valid = any_of_group(allowed.any(-1), groups)
        chosen = reference.outlying_queries(q_proxy, valid, q_stride)[..., None]
        sampled = sampled.gather(2, chosen.expand(-1, -1, -1, sampled.shape[3]))
        q_proxy = q_proxy.gather(2, chosen.expand(-1, -1, -1, q_proxy.shape[3]))
    scores = reference.block_scores(q_proxy, k_proxy, sampled, (size // q_stride, size // k_stride), case.scale)
    masses = reference.probe_masses(q, k, allowed, size, case.scale)
    # A score is a sum of D products less a log-sum-exp: each rounded, the sum in an order that nobody promises.
    largest = float(case.scale * q_proxy.double().norm(dim=-1).max() * k_proxy.double().norm(dim=-1).max())
    score_error = EPS * (8 * math.sqrt(q.shape[3]) * max(largest, 1.0) + 16)
    return Expected(allowed, admissible, full, proxy_admissible, forced, forced_count, scores, masses, score_error)


def check_rank(rank: Tensor, expected: Expected) -> int:
    """Ranks are a permutation that follows the contract; two scored blocks nearer than their rounding may swap.

    Returns the number of blocks whose rank differs from the specification's, save those with a probability that fp32
    rounds to 1: sharp attention gives a row several of these.
    """
    exact = reference.rank_blocks(expected.scores, expected.proxy_admissible, expected.forced)
    order = rank.long().argsort(-1)
    assert torch.equal(rank.long().sort(-1).values, torch.arange(rank.shape[-1]).expand_as(rank))

    # Class of each block by the specification: forced 0, scored 1, unscored 2, inadmissible 3.
    kind = torch.where(expected.scores == -math.inf, 2, 1)
    kind = torch.where(expected.forced, 0, kind)
    kind = torch.where(expected.proxy_admissible, kind, 3)
    in_order = kind.gather(-1, order)
    assert bool((in_order[..., 1:] >= in_order[..., :-1]).all()), "classes out of order"
    same = in_order[..., 1:] == in_order[..., :-1]
    scored = same & (in_order[..., 1:] == 1)
    by_index = same & ~scored
    assert bool((order[..., 1:] > order[..., :-1])[by_index].all()), "equals not by index"
    value = expected.scores.gather(-1, order).masked_fill(in_order != 1, 0.0)
    rises = (value[..., 1:] - value[..., :-1])[scored]
    assert bool((rises <= 2 * expected.score_error).all()), f"score rises by {rises.max()}"
    return int(((rank != exact) & (expected.scores < -1e-5)).sum())


def check_count(count: Tensor, expected: Expected, config: ProxyConfig) -> int:
    """Counts lie between those for gamma less and plus the rounding of a mass. Returns how many are not exact."""
    error = 64 * EPS

    def budgets(gamma: float) -> Tensor:
        return reference.budgets(
            expected.masses, gamma, config.min_budget, config.max_budget, config.block_size, expected.forced_count
        )

    exact = budgets(config.gamma)
    low, high = (
        (exact, exact) if config.gamma == 1.0 else (budgets(config.gamma - error), budgets(config.gamma + error))
    )
    assert bool(((low <= count) & (count <= high)).all()), (low, count, high)
    return int((count != exact).sum())
