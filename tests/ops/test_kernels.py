"""The Triton kernels beyond the specification: what they leave unwritten, what they touch, how they split the work.

That they select as the specification does is tested where all implementations are, in test_selection.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import or_masks

import flexproxy
from flexproxy import ProxyConfig, masks
from flexproxy.masks.blocks import summarize_rows
from flexproxy.masks.structure import MaskMod
from flexproxy.ops import implementations
from flexproxy.pipeline import read, read_mask
from flexproxy.plan import plan_estimate
from flexproxy.stages.budget import count_blocks
from flexproxy.stages.proxy import head_groups, pool_heads
from flexproxy.stages.ranking import ForcedRule, rank_blocks
from tests.conftest import IMPLEMENTATIONS
from tests.oracle import Case, check_count, check_rank, expect, random_case

pytest.importorskip("triton")
kernels: Any = importlib.import_module("flexproxy.ops.kernels")
LAUNCHERS = [
    importlib.import_module(f"flexproxy.ops.kernels.{name}")
    for name in ("block_logits", "blocks", "budget", "documents", "lists", "proxy", "ranking", "scores", "sharing")
]


@pytest.fixture(params=[place for place in IMPLEMENTATIONS if "triton" in place.values[0]])  # type: ignore[operator]
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each device that runs the kernels, which are in use during the test."""
    device, name = request.param
    with implementations.use(name):
        yield device


# Small, and between them what ``test_cases_hold_what_kernels_tell_apart`` names.
SEEDS = (15, 31, 143, 71, 190, 183)


def cases(device: str) -> Iterator[tuple[str, Case]]:
    for n, seed in enumerate(SEEDS):
        case = random_case(seed, device, bf16=False, lists=True)
        if n % 2:
            case = dataclasses.replace(case, config=dataclasses.replace(case.config, density=0.4, max_budget=None))
        yield f"seed {seed}, {case.mask_name}", case


def test_cases_hold_what_kernels_tell_apart() -> None:
    """Or the tests on them show less than they say."""
    some = [case for _, case in cases("cpu")]
    assert {case.known and case.blocks is None for case in some} == {False, True}, "clauses, and bits or lists"
    assert any(not case.known and case.blocks is None for case in some), "bits"
    assert any(case.known and case.blocks is not None for case in some), "lists over clauses"
    assert any(case.known and case.ids is not None for case in some), "clauses with labels"
    assert any(case.known and case.ids is None for case in some), "clauses without"
    assert any("head" in case.mask_name and case.q.shape[1] > len(case.groups()) for case in some), "heads that differ"
    assert any(len(case.groups()) > 1 for case in some)
    assert {case.config.groups is None for case in some} == {False, True}
    assert {case.config.query_choice for case in some} == {"first", "outlier"}
    assert {case.q.dtype for case in some} == {torch.float16, torch.float32}
    assert {case.lengths[0] < case.lengths[1] for case in some} == {False, True}


def outputs(case: Case, **options: Any) -> dict[str, Tensor]:
    """All that a build gives, what is behind the lists included."""
    selection = flexproxy.select(case.q, case.k, **case.mask, config=case.config, **options)
    mask = selection.block_mask()
    kept, (partial_number, partial_index, full_number, full_index) = selection._lists()
    assert torch.equal(mask.kv_indices, partial_index)
    return {
        "rank": selection.rank,
        "count": selection.count,
        "kept": kept,
        "partial number": partial_number,
        "partial index": partial_index,
        "full number": full_number,
        "full index": full_index,
    }


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], context: str) -> None:
    for name, value in want.items():
        assert torch.equal(got[name], value), f"{context}: {name} differs"


class Poisoned:
    """``torch`` as a launcher sees it: new tensors are full of garbage, and lie between guards.

    What a kernel is to write must not depend on what was there; nothing may be written outside of it.
    """

    GUARD = 64
    GARBAGE = ((math.nan, 2**30, True), (3e38, -(2**30), False))

    def __init__(self, which: int) -> None:
        self.of_float, self.of_int, self.of_bool = self.GARBAGE[which]
        self.buffers: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def garbage(self, dtype: torch.dtype) -> Any:
        if dtype == torch.bool:
            return self.of_bool
        return (min(self.of_float, torch.finfo(dtype).max)) if dtype.is_floating_point else self.of_int

    def empty(self, *shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        buffer = torch.full((size.numel() + 2 * self.GUARD,), self.garbage(dtype), dtype=dtype, device=device)
        self.buffers.append(buffer)
        return buffer[self.GUARD : self.GUARD + size.numel()].view(size)

    def empty_like(self, x: Tensor) -> Tensor:
        return self.empty(*x.shape, dtype=x.dtype, device=x.device)

    def check_guards(self) -> None:
        for buffer in self.buffers:
            guards = torch.cat([buffer[: self.GUARD], buffer[-self.GUARD :]])
            want = torch.full_like(guards, self.garbage(buffer.dtype))
            assert torch.equal(guards.view(torch.uint8), want.view(torch.uint8)), f"written outside of {buffer.shape}"


def poison(monkeypatch: pytest.MonkeyPatch, which: int) -> Poisoned:
    poisoned = Poisoned(which)
    for module in LAUNCHERS:
        monkeypatch.setattr(module, "torch", poisoned)
    return poisoned


@pytest.mark.slow
def test_nothing_depends_on_what_memory_held(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With garbage in every new tensor, builds are those without; nothing is written outside of a tensor."""
    clean = {name: outputs(case) for name, case in cases(device)}
    for which in range(len(Poisoned.GARBAGE)):
        poisoned = poison(monkeypatch, which)
        for name, case in cases(device):
            got = outputs(case)
            assert_same(got, clean[name], name)
            for kind in ("partial", "full"):
                number, index = got[f"{kind} number"], got[f"{kind} index"]
                behind = torch.arange(index.shape[-1], device=device) >= number[..., None]
                assert not bool(index[behind].any()), f"{name}: garbage behind the {kind} lists"
        poisoned.check_guards()
        assert len(poisoned.buffers) > 10 * len(SEEDS)


def test_masses_of_documents_are_written_whole(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the last part too, which means nothing: a compiler compares all that an operator gives."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, 90, 16, generator=generator).to(device) for _ in range(2))
    mask_mod = masks.and_masks(masks.causal, masks.document(torch.arange(90, device=device) // 40))
    plan = plan_estimate((q, k), mask_mod, None, (ProxyConfig(block_size=16, min_budget=0), None))
    prepared, masses = read_mask(mask_mod, None, plan.frame, q.device), []
    for which in range(len(Poisoned.GARBAGE)):
        with monkeypatch.context() as patch:
            poison(patch, which)
            masses.append(read(q, k, prepared, plan).masses)
    first, second = masses
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_masses_where_every_head_sees_other_keys(device: str) -> None:
    """Kernels take what a row sees from the summary of its own head, not from that of its proxy."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 160, 16, generator=generator).to(device) for heads in (4, 2))

    def by_head(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < 32 * (h + 1))

    plan = plan_estimate((q, k), by_head, None, (ProxyConfig(block_size=16, min_budget=0, num_proxies=2), None))
    masses = []
    for name in (implementations.picked(q.device), "torch"):
        with implementations.use(name):
            masses.append(read(q, k, read_mask(by_head, None, plan.frame, q.device), plan).masses)
    torch.testing.assert_close(*masses)


def unwritten(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a mistake: the last element of a launcher's last tensor is not written."""
    launch = module.launch

    def forgetful(*place: Any, **arguments: Any) -> None:
        out = [value for value in arguments.values() if isinstance(value, Tensor)][-1].view(-1)
        before = out[-1].clone()
        launch(*place, **arguments)
        if out.dtype != torch.int64:  # a garbage place in q would be read, and end the process
            out[-1] = before

    monkeypatch.setattr(module, "launch", forgetful)


@pytest.mark.parametrize("name", ["blocks", "budget", "lists", "proxy", "ranking", "scores", "sharing"])
def test_an_unwritten_element_is_seen(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above finds one element that a launcher leaves unwritten, whichever launcher it is."""
    module = importlib.import_module(f"flexproxy.ops.kernels.{name}")
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, length, 16, generator=generator).to(device) for length in (40, 90))
    sharing = "rows" if name == "sharing" else "heads"
    config = ProxyConfig.paper(block_size=16, min_budget=0, density=0.5, sharing=sharing)
    case = Case(
        q, k, k, config, "full", masks.shift(masks.full, 0), [0]
    )  # the last row is not dense, its end not forced
    clean = outputs(case)
    for which in (0, 1):
        with monkeypatch.context() as patch:
            poison(patch, which)
            assert_same(outputs(case), clean, name)
            unwritten(module, patch)
            try:
                assert_same(outputs(case), clean, name)
            except AssertionError:
                return
    pytest.fail(f"an element that {name} leaves unwritten was not seen")


def test_a_write_outside_is_seen(device: str) -> None:
    poisoned = Poisoned(0)
    for dtype in (torch.float32, torch.int32, torch.bool):
        x = poisoned.empty(2, 3, dtype=dtype, device=torch.device(device))
        poisoned.check_guards()
        x.as_strided((1,), (1,), x.storage_offset() + 6).fill_(0)
        with pytest.raises(AssertionError, match="outside"):
            poisoned.check_guards()
        poisoned.buffers.clear()


@pytest.mark.slow
def test_the_same_twice(device: str) -> None:
    for name, case in itertools.islice(cases(device), 2):
        assert_same(outputs(case), outputs(case), name)


@pytest.mark.parametrize("seed", [15, 143, 183, 190])
def test_nothing_is_read_beyond_the_inputs(seed: int, device: str) -> None:
    """q and k as parts of larger tensors full of NaN give what they give alone."""
    case = random_case(seed, device, bf16=False, lists=True)

    def guarded(x: Tensor) -> Tensor:
        batch, heads, length, dim = x.shape
        large = torch.full((batch + 1, heads + 1, length + 70, dim + 8), math.nan, dtype=x.dtype, device=device)
        large[:batch, :heads, :length, :dim] = x
        return large[:batch, :heads, :length, :dim]

    inside = dataclasses.replace(case, q=guarded(case.q), k=guarded(case.k))
    assert_same(outputs(inside), outputs(case), case.mask_name)


def assert_as_pytorch(case: Case, context: str, **options: Any) -> None:
    """The same but for what is behind the lists, where PyTorch leaves other blocks."""
    got = outputs(case, **options)
    with implementations.use("torch"):
        want = outputs(case, **options)
    for kind in ("partial", "full"):
        number, index = want[f"{kind} number"], want[f"{kind} index"]
        index[torch.arange(index.shape[-1], device=index.device) >= number[..., None]] = 0
    assert_same(got, want, context)


def plain_case(device: str, dtype: torch.dtype = torch.float32, mask_mod: MaskMod | None = None) -> Case:
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(1, heads, 120, 16, generator=generator).to(device, dtype) for heads in (2, 1))
    config = ProxyConfig(block_size=16, min_budget=0, gamma=0.83, stride=2)
    return Case(q, k, k, config, "default", mask_mod, [0])


def mask_on(name: str, device: str) -> MaskMod | None:
    window = or_masks(masks.sliding_window(40), masks.prefix_lm(torch.tensor([20], device=device)))
    made: dict[str, MaskMod | None] = {
        "default": None,
        "window or prefix": window,
        "closure": lambda b, h, q, kv: (q >= kv) & ((q - kv) % 5 != 1),
    }
    return made[name]


MASKS = ("default", "window or prefix", "closure")


@pytest.mark.parametrize(("value", "dtype"), [(math.nan, torch.float32), (math.inf, torch.float16)])
@pytest.mark.parametrize("name", MASKS)
def test_what_is_not_finite_counts_as_in_pytorch(name: str, value: float, dtype: torch.dtype, device: str) -> None:
    """Not-a-number and infinities in q or k, at one place, along a token, or everywhere: same ranks, counts, lists."""
    case = plain_case(device, dtype, mask_on(name, device))
    places: tuple[tuple[bool, tuple[Any, ...]], ...] = (
        (True, (0, 1, 100, 3)),  # a sampled query
        (True, (0, 1, 119, 3)),  # a probe
        (False, (0, 0, 70, 5)),
        (False, (0, slice(None), 34)),
        (True, (0,)),
    )
    for in_q, place in places:
        q, k = case.q.clone(), case.k.clone()
        (q if in_q else k)[place] = value
        broken = dataclasses.replace(case, q=q, k=k)
        assert_as_pytorch(broken, f"{value} at {place}")


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-30, 5.0])
def test_any_scale_selects_as_pytorch_does(scale: float, name: str, device: str) -> None:
    case = plain_case(device, mask_mod=mask_on(name, device))
    assert_as_pytorch(case, str(scale), scale=scale)


@pytest.mark.parametrize("stride", ["one", "whole block"])
@pytest.mark.parametrize("block_size", [16, 512])
def test_the_ends_of_block_size_and_stride(block_size: int, stride: str, device: str) -> None:
    """A block of many columns, or many blocks in a tile; all tokens of a block sampled, or one."""
    generator = torch.Generator().manual_seed(block_size)
    num_queries, num_keys = (70, 100) if block_size == 16 else (block_size + 30, 2 * block_size + 9)
    q, k = (torch.randn(1, 2, n, 32, generator=generator).to(device, torch.float16) for n in (num_queries, num_keys))
    step = 1 if stride == "one" else block_size
    config = ProxyConfig(num_proxies=1, block_size=block_size, stride=step, min_budget=0, gamma=0.6)
    case = Case(q, k, k, config, "default", None, [num_keys - num_queries])
    groups, k_groups = head_groups(ProxyConfig(num_proxies=1), 2, 2)
    expected = expect(case, pool_heads(q, groups, step), pool_heads(k, k_groups, step))
    selection = flexproxy.select(q, k, config=config)
    check_rank(selection.rank.cpu(), expected)
    check_count(selection.count.cpu(), expected, config)


@pytest.mark.parametrize("num_heads", [12, 40])
def test_counts_where_one_program_does_not_search_all(num_heads: int, device: str) -> None:
    """More candidates for gamma than a program tries, and more heads than it searches at once."""
    num_blocks, config = 30, ProxyConfig(block_size=16)
    assert num_heads * num_blocks > 2 * kernels.budget.SEARCHES // num_heads
    generator = torch.Generator().manual_seed(num_heads)
    masses = torch.rand(1, num_heads, num_blocks, generator=generator).softmax(-1).to(device)
    q = torch.zeros(1, num_heads, num_blocks * 16, 16, device=device)
    mask = read_mask(None, None, plan_estimate((q, q), None, None, (config, None)).frame, q.device)
    for density in (0.4219, 0.6173):  # no ties, which rounding would decide
        arguments = masses, mask.head_rows, mask.forced, config.gamma, density, 1, num_blocks
        got = count_blocks(*arguments)
        with implementations.use("torch"):
            assert torch.equal(got, count_blocks(*arguments)), density


def test_ranks_of_rows_too_long_for_one_program(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted in one program or by PyTorch, ranks are those of ``ranking.rank_blocks``: ties, signed zeros, no score."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(-3, 1, (2, 2, 5, 90), generator=generator).float()
    for value in (-0.0, -math.inf, math.nan, -3e38):
        scores[torch.rand(scores.shape, generator=generator) < 0.1] = value
    admissible = torch.rand(2, 1, 5, 90, generator=generator) < 0.8
    admissible[:, :, 1, 40:] = False  # ends in the first half of a program's places, which is sorted alone
    admissible[:, :, 2] = False
    scores, admissible = scores.to(device), admissible.to(device)
    sequence = torch.randint(0, 9, (2, 1, 5, 2), generator=generator, dtype=torch.int32).to(device)
    summary = summarize_rows(admissible, admissible, sequence)
    offset = torch.tensor([85 * 16, 3 * 16 - 5], device=device)
    arguments = scores, admissible, summary, ForcedRule(offset, 75, 16, 1, 2)
    with implementations.use("torch"):
        want = rank_blocks(*arguments)
    assert torch.equal(kernels.rank_blocks(*arguments), want)
    monkeypatch.setattr(kernels.ranking, "MAX_SORTED", 32)
    launched: list[Any] = []
    launch = kernels.ranking.launch

    def noted(kernel: Any, *place: Any, **arguments: Any) -> None:
        launched.append(kernel)
        launch(kernel, *place, **arguments)

    monkeypatch.setattr(kernels.ranking, "launch", noted)
    assert torch.equal(kernels.rank_blocks(*arguments), want)
    assert launched == [kernels.ranking._keys_kernel], "not the way of long rows"


def test_scores_do_not_depend_on_the_workspace(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of blocks at a time, or all at once: the same scores, but for the order of sums."""
    launcher = kernels.OPERATORS["block_scores"]
    compared = []

    def both_ways(*arguments: Any) -> Tensor:
        at_once: Tensor = launcher(*arguments)
        in_parts = launcher(*arguments[:-1], 1)
        torch.testing.assert_close(in_parts, at_once, rtol=1e-6, atol=1e-5, equal_nan=True)
        compared.append(at_once.shape[2])
        return at_once

    monkeypatch.setitem(kernels.OPERATORS, "block_scores", both_ways)
    for _, case in cases(device):
        flexproxy.select(case.q, case.k, **case.mask, config=case.config)
    assert len(compared) == len(SEEDS)
    assert max(compared) > 3


def test_parts_of_the_scores_share_their_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When one begins, that before it is gone, with what would launch it again."""
    launcher, module = kernels.OPERATORS["block_scores"], kernels.scores
    alive: list[weakref.ref[Any]] = []
    begin, parts = module.block_logits, []

    def noted(*arguments: Any, **options: Any) -> Any:
        parts.append(sum(tensor() is not None for tensor in alive))
        result = begin(*arguments, **options)
        alive.append(weakref.ref(result.values))
        return result

    monkeypatch.setattr(module, "block_logits", noted)
    monkeypatch.setitem(kernels.OPERATORS, "block_scores", lambda *arguments: launcher(*arguments[:-1], 1))
    for _ in range(2):  # the second time, what is compiled is launched again
        q = torch.randn(1, 2, 512, 16, device=device)
        flexproxy.select(q, q, config=ProxyConfig(min_budget=0, density=0.5))
    assert parts == [0] * 8


def operators() -> dict[str, Callable[..., Any]]:
    """The operators that may have a kernel, found in the text of the package."""
    found = {}
    package = Path(flexproxy.__file__).parent
    for path in sorted(package.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
            for decorator in decorators:
                text = ast.unparse(decorator)
                if text.startswith("operator(") and "has_kernel=False" not in text:
                    module = ".".join(("flexproxy", *path.relative_to(package).with_suffix("").parts))
                    name = node.name  # type: ignore[attr-defined]
                    found[name] = getattr(importlib.import_module(module), name)
    return found


def test_launchers_and_operators_are_alike() -> None:
    """Every operator has a launcher and the reverse, with the same parameters, in order."""
    found = operators()
    assert set(found) == set(kernels.OPERATORS)
    for name, launcher in kernels.OPERATORS.items():
        theirs, ours = (inspect.signature(f).parameters.values() for f in (launcher, found[name]))
        assert [(p.name, p.kind, p.default) for p in theirs] == [(p.name, p.kind, p.default) for p in ours], name
        assert launcher.__name__ == name
        assert f".{name}``" in launcher.__doc__
