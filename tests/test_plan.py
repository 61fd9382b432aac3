"""Plans: made once for what they depend on, and for nothing else."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flexproxy
from flexproxy import ProxyConfig, checks, masks, plan
from flexproxy.plan import Planner, plan_estimate, planned
from flexproxy.sparse.plan import plan_attention
from tests.accuracy import eagerly

CONFIG = ProxyConfig(block_size=32, min_budget=0, gamma=0.6)


def pair(batch: int = 1, length: int = 128) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 4, length, 16), torch.randn(batch, 2, length, 16)


@pytest.fixture
def planner() -> Planner[object]:
    """One that makes objects, and checks nothing."""
    return planned(lambda *_: object())


def test_a_plan_is_made_once(planner: Planner[object]) -> None:
    q, k = pair()
    ids = torch.zeros(128, dtype=torch.int32)
    window = torch.tensor(30)
    for mask_mod in (None, masks.causal, masks.document(ids), masks.sliding_window(window), masks.sliding_window(7)):
        first = planner((q, k), mask_mod, None, (CONFIG, 0.5))
        for value in (0.0, float("nan")):  # values do not matter, nor which tensors hold them
            q.fill_(value)
            ids += 1
            window += 1
            settings = ProxyConfig(block_size=32, min_budget=0, gamma=0.6), 0.5
            assert planner((q.clone(), k.clone()), mask_mod, None, settings) is first
    assert planner((q, k), masks.document(ids + 5), None, (CONFIG, 0.5)) in planner.plans.values()


def user_mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


def test_what_a_plan_depends_on(planner: Planner[object]) -> None:
    """Each of these is a plan of its own."""
    q, k = pair(2)
    table = torch.zeros(2, 128, dtype=torch.int32)
    block_mask = functools.partial(create_block_mask, masks.causal, H=None, device="cpu", BLOCK_SIZE=32)
    find = functools.partial(planner, mask_mod=None, block_mask=None, settings=(1, True))
    plans = [
        find((q, k)),
        find((q.bfloat16(), k)),
        find((q, k.bfloat16())),
        find((q[:1], k)),
        find((q[:, :, 1:], k)),
        find((q.to("meta"), k)),
        find((q.requires_grad_(), k)),
        find((q.detach().to_sparse(), k)),
        find((torch.nn.Parameter(q), k)),
        find((q, k), settings=(1.0, True)),
        find((q, k), settings=(1, 1)),
        find((q, k), mask_mod=masks.causal),
        find((q, k), mask_mod=user_mask),
        find((q, k), mask_mod=masks.document(table)),
        find((q, k), mask_mod=masks.document(table[0])),
        find((q, k), mask_mod=masks.document(torch.zeros(2, 3000, dtype=torch.int32))),
        find((q, k), mask_mod=masks.padding(table)),
        find((q, k), mask_mod=masks.padding(table.to("meta"))),
        find((q, k), mask_mod=masks.and_masks(user_mask, masks.padding(table))),
        find((q, k), block_mask=block_mask(B=None, Q_LEN=128, KV_LEN=128)),
        find((q, k), block_mask=block_mask(B=2, Q_LEN=128, KV_LEN=128)),
        find((q, k), block_mask=block_mask(B=None, Q_LEN=128, KV_LEN=127)),
    ]
    with torch.no_grad():
        plans.append(find((q, k)))
    alike = 0 if hasattr(block_mask(B=None, Q_LEN=128, KV_LEN=127), "seq_lengths") else 1  # torch 2.5 rounds lengths up
    assert len(set(map(id, plans))) == len(plans) - alike


def test_a_plan_holds_nothing_of_the_callers() -> None:
    """Neither tensors nor functions, nor what these capture."""

    def call() -> list[weakref.ref[Any]]:
        q, k = pair()
        table = torch.ones(1, 128, dtype=torch.int64)
        mask_mod = masks.and_masks(masks.padding(table), lambda b, h, q, kv: table[b, kv] > 0)
        flexproxy.build(q, k, mask_mod=mask_mod, config=CONFIG)
        score_mod = lambda score, b, h, q, kv: score * table[b, kv]  # noqa: E731
        with eagerly():
            flexproxy.attention(q, k, k, mask_mod=mask_mod, config=CONFIG, score_mod=score_mod)
        return [weakref.ref(x) for x in (q, k, table, mask_mod, score_mod)]

    references = call()
    gc.collect()
    assert [reference() for reference in references] == [None] * 5


def test_few_are_kept(planner: Planner[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_KEPT", 3)
    q, k = pair()
    for number in range(10):
        planner((q, k), None, None, (number,))
        assert len(planner.plans) <= 3


def test_an_error_is_raised_each_time() -> None:
    """Also where what came is like what fits: a function of three arguments is a function."""
    q, k = pair()
    flexproxy.build(q, k, mask_mod=user_mask, config=CONFIG)
    wrong: Any = lambda b, h, q: q >= 0  # noqa: E731
    listed: Any = [q]
    scales: Any = ((True, TypeError), ([1.0], TypeError), (float("nan"), ValueError))
    for _ in range(2):
        with pytest.raises(TypeError, match="mask_mod: expected a function of"):
            flexproxy.build(q, k, mask_mod=wrong, config=CONFIG)
        with pytest.raises(TypeError, match="q: expected a tensor"):
            flexproxy.build(listed, k, config=CONFIG)
        with pytest.raises(ValueError, match="num_proxies: expected"):
            flexproxy.build(q, k, config=ProxyConfig(num_proxies=3))
        for scale, error in scales:
            flexproxy.build(q, k, config=CONFIG, scale=1.0)
            with pytest.raises(error, match="scale: expected"):
                flexproxy.build(q, k, config=CONFIG, scale=scale)


def test_masks_that_change_in_place_are_read_anew() -> None:
    """The plan is that of the first call; the selection is that of the values at hand."""
    q, k = pair(length=160)
    window = torch.tensor(1, dtype=torch.int32)
    mask_mod = masks.sliding_window(window)
    plan_estimate.plans.clear()
    for value in (20, 160, 70):
        window.fill_(value)
        selection = flexproxy.select(q, k, mask_mod=mask_mod, config=CONFIG)
        expected = flexproxy.select(q, k, mask_mod=masks.sliding_window(value), config=CONFIG)
        assert torch.equal(selection.rank, expected.rank)
        assert torch.equal(selection.count, expected.count)
        assert torch.equal(selection.admissible, expected.admissible)
    assert len(plan_estimate.plans) == 2, "one of windows in tensors, and one of others"


def test_arguments_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    check = checks._check_tensor

    def counted(name: str, x: Any, shape: str) -> None:
        checked.append(name)
        check(name, x, shape)

    monkeypatch.setattr(checks, "_check_tensor", counted)
    monkeypatch.setattr("flexproxy.sparse.kernel.run_compiled", lambda q, k, v, **others: q)
    plan_attention.plans.clear()
    q, k = pair()
    for _ in range(2):
        flexproxy.attention(q, k, k, config=CONFIG)
    assert checked == ["q", "k", "v"]


def test_a_plan_can_be_read() -> None:
    q, k = pair()
    text = repr(plan_estimate((q, k), masks.causal, None, (CONFIG, None)))
    assert text.startswith("Plan(config=ProxyConfig(")
    for part in ("scale=0.25", "num_queries=128", "strides=(4, 4)", "gradients=False"):
        assert part in text
