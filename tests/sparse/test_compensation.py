"""What is dropped and given back as means: equal to the specification, and never telling of hidden tokens.

The two ways to compute it (in one softmax, and in two that are merged) run here on eager ``flex_attention``, and on a
dense stand-in of the compiled kernel, which, as that does, goes by the lists of a BlockMask and has a log-sum-exp.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask

import flexproxy
from benchmarks.baselines.flashprefill_v2 import mean_correction
from flexproxy import ProxyConfig, Selection, masks, reference
from flexproxy.masks.blocks import whole_blocks
from flexproxy.masks.structure import MaskMod
from flexproxy.ops import compat
from flexproxy.sparse import compensation
from flexproxy.sparse import kernel as sparse_kernel
from flexproxy.sparse.plan import KernelPlan
from flexproxy.stages.lists import dense_maps
from tests.accuracy import cpu_kernel_exists, skip_unless_flex_compiles
from tests.oracle import random_case

BLOCK = 16
LOW = ProxyConfig.paper(
    block_size=BLOCK, min_budget=2 * BLOCK, max_budget=2 * BLOCK
)  # two blocks a row, whatever the scores
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor


def inputs(
    shape: tuple[int, int, int], lengths: tuple[int, int], dim: int = 16, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Normal random; shape is B, Hq, Hkv."""
    batch, heads, kv_heads = shape
    generator = torch.Generator().manual_seed(lengths[0] + lengths[1])
    shapes = ((heads, lengths[0]), (kv_heads, lengths[1]), (kv_heads, lengths[1]))
    return Inputs(*(torch.randn(batch, h, s, dim, generator=generator).to(dtype) for h, s in shapes))


def tokens_of(blocks: Tensor, rows: int, columns: int, num_queries: int, num_keys: int) -> Tensor:
    """A map of blocks spread over their tokens."""
    return blocks.repeat_interleave(rows, -2)[..., :num_queries, :].repeat_interleave(columns, -1)[..., :num_keys]


def kernel(q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, score_mod: Any, **arguments: Any) -> Any:
    """What a compiled kernel does with these arguments, densely: it visits the listed blocks, and no others."""
    (rows, columns), (num_queries, num_keys) = block_mask.BLOCK_SIZE, (q.shape[2], k.shape[2])
    some, full = dense_maps(block_mask, -(-num_queries // rows), -(-num_keys // columns))
    some, full = (tokens_of(x, rows, columns, num_queries, num_keys) for x in (some, full))
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (*q.shape[:3], num_keys)), indexing="ij")
    allowed = full | (some & block_mask.mask_mod(b, h, i, j))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).float() for x in (k, v))
    scores = arguments["scale"] * q.float() @ k.mT
    if score_mod is not None:
        scores = score_mod(scores, b, h, i, j)
    scores = scores.masked_fill(~allowed, -torch.inf)
    empty = ~allowed.any(-1, keepdim=True)
    out = (scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) @ v).to(q.dtype)
    wants_lse = "return_lse" in arguments or "return_aux" in arguments
    return (out, scores.logsumexp(-1)) if wants_lse else out


def not_compiled(*args: Any, **kwargs: Any) -> Any:
    raise sparse_kernel.NotCompiledError


@pytest.fixture
def flex(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of the compiled kernel, by name."""
    monkeypatch.setattr(sparse_kernel, "run_compiled", kernel if request.param == "kernel" else not_compiled)


on_both = pytest.mark.parametrize("flex", ["kernel", "eager"], indirect=True)


@pytest.fixture
def dense_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_kernel, "run_compiled", kernel)


Way = Callable[[Tensor, Tensor, Tensor, Selection], Tensor]


def plan_of(q: Tensor, k: Tensor, lse: bool = True, gradients: bool = False, listed: bool = True) -> KernelPlan:
    gqa = q.shape[1] != k.shape[1]
    return KernelPlan(q.shape[3] ** -0.5, gqa, gradients, detach=False, listed=listed, lse=lse, kernel_options={})


def merged_with_lse(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    plan = plan_of(q, k, listed=not torch.compiler.is_compiling())
    return compensation.merged(q, k, v, selection, plan, plan)


def merged(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    return merged_with_lse(q, k, v, selection)[0]


def joined(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    return compensation.joined(q, k, v, selection, plan_of(q, k, lse=False))


both_ways = pytest.mark.parametrize("way", [merged, joined])


class Expected(NamedTuple):
    """compensated and plain: fp64 outputs for the tokens ``allowed``; lse of the former."""

    compensated: Tensor
    lse: Tensor
    plain: Tensor
    dense: Tensor


def expect(x: Inputs, mask_mod: MaskMod | None, selected: Tensor, block_size: int) -> Expected:
    q, k, v = (t.cpu() for t in x)
    (num_queries, num_keys), scale = (q.shape[2], k.shape[2]), q.shape[3] ** -0.5
    mask_mod = mask_mod or masks.shift(masks.causal, num_keys - num_queries)
    batch, heads = q.shape[:2]
    allowed = reference.token_mask(mask_mod, batch, heads, num_queries, num_keys, x.q.device.type).cpu()
    selected = selected.cpu()
    out, lse = reference.compensated_attention(q, k, v, allowed, selected, block_size, scale)
    kept = allowed & tokens_of(selected, block_size, block_size, num_queries, num_keys)
    plain, dense = (reference.attention(q, k, v, pairs, scale) for pairs in (kept, allowed))
    return Expected(out, lse, plain, dense)


def check(out: Tensor, want: Tensor, x: Inputs) -> None:
    """Scores are sums of D products, in fp32; outputs are rounded up to three times."""
    assert out.dtype == x.q.dtype
    largest = x.q.shape[3] ** -0.5 * float(x.q.double().norm(dim=-1).max() * x.k.double().norm(dim=-1).max())
    scores = torch.finfo(torch.float32).eps * 4 * (largest + 16)
    # Before its product with the values, the eager function rounds probabilities, and kernels the numerators of these.
    roundings = 3 if x.q.dtype == torch.float32 else 4
    error = (out.cpu().double() - want).abs().max().item()
    assert error <= (scores + roundings * torch.finfo(x.q.dtype).eps / 2) * float(x.v.abs().max()), error


def named_case(name: str) -> tuple[Inputs, MaskMod | None]:
    """Inputs of three sequences or one, with fewer queries than keys or not, ragged or not; the mask that is named."""
    x = inputs((1, 4, 2), (150, 197))
    if name in ("padding", "documents", "head-dependent"):
        x = inputs((3, 4, 2), (160, 160)) if name == "documents" else inputs((3, 6, 2), (150, 150))
    length, position = x.k.shape[2], torch.arange(x.k.shape[2])
    real = (position >= torch.tensor([[0], [37], [150]])).long()
    ids = torch.stack([position // size for size in (48, 61, 200)])
    return x, {
        "causal, a chunk": None,
        "full": masks.full,
        "window": masks.shift(and_masks(masks.causal, masks.sliding_window(101)), length - 150),
        "prefix": masks.shift(masks.prefix_lm(torch.tensor([90])), length - 150),
        "padding": and_masks(masks.causal, masks.padding(real)),
        "documents": and_masks(masks.causal, masks.document(ids)),
        "head-dependent": lambda b, h, q, kv: (q >= kv) & ((h % 2 == 0) | (q - kv < 70)) & (kv % 97 != 5),
    }[name]


NAMES = ["causal, a chunk", "full", "window", "prefix", "padding", "documents", "head-dependent"]


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize(
    ("flex", "name"), [*(("kernel", name) for name in NAMES), ("eager", "padding")], indirect=["flex"]
)
def test_both_ways_equal_the_reference(name: str) -> None:
    x, mask_mod = named_case(name)
    selection = flexproxy.select(x.q, x.k, mask_mod=mask_mod, config=LOW)
    want = expect(x, mask_mod, selection.block_map(), BLOCK)
    assert (want.compensated - want.plain).abs().max() > 0.2, "nothing was given back"
    out, lse = merged_with_lse(*x, selection)
    check(out, want.compensated, x)
    check(joined(*x, selection), want.compensated, x)
    torch.testing.assert_close(lse.double(), want.lse, rtol=1e-6, atol=1e-5)
    in_one_call = flexproxy.attention(*x, mask_mod=mask_mod, config=LOW, compensate=True)
    check(in_one_call, want.compensated, x)


@pytest.mark.usefixtures("dense_kernel")
def test_random_cases_equal_the_reference() -> None:
    """Any shape, dtype, block size, mask, number of proxies."""
    given_back = 0
    for seed in range(60):
        case = random_case(9000 + seed)
        few: dict[str, Any] = {"gamma": 0.3, "min_budget": 0, "sink_blocks": 0, "local_blocks": 1}
        case = replace(case, config=replace(case.config, dense_last_blocks=0, **few))
        x, size = Inputs(case.q, case.k, case.v), case.config.block_size
        selection = flexproxy.select(x.q, x.k, mask_mod=case.mask_mod, config=case.config)
        want = expect(x, case.mask_mod, selection.block_map(), size)
        given_back += bool((want.compensated - want.plain).abs().max() > 0.01)
        try:
            out, lse = merged_with_lse(*x, selection)
            torch.testing.assert_close(lse.double(), want.lse, rtol=1e-4, atol=1e-4)
            check(out, want.compensated, x)
            check(joined(*x, selection), want.compensated, x)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {case.mask_name}, {case.config}: {error}") from error
    assert given_back >= 15


@pytest.mark.usefixtures("dense_kernel")
def test_a_classified_mask() -> None:
    """Of a BlockMask, its blocks count: one that it leaves out is not given back, though its function allows it."""
    x = inputs((1, 4, 2), (140, 140))
    block_mask = create_block_mask(masks.causal, None, None, 140, 140, device="cpu", BLOCK_SIZE=BLOCK)
    if tuple(block_mask.BLOCK_SIZE) != (BLOCK, BLOCK):
        pytest.skip("this torch's create_block_mask makes no blocks of 16")
    want = expect(x, masks.causal, flexproxy.select(x.q, x.k, config=LOW).block_map(), BLOCK).compensated
    check(flexproxy.attention(*x, block_mask=block_mask, config=LOW, compensate=True), want, x)

    without_first = and_masks(masks.causal, lambda b, h, q, kv: kv >= BLOCK)
    half = create_block_mask(without_first, None, None, 140, 140, device="cpu", BLOCK_SIZE=BLOCK)
    half.mask_mod = masks.causal
    selected = flexproxy.select(x.q, x.k, block_mask=half, config=LOW)
    check(merged(*x, selected), expect(x, without_first, selected.block_map(), BLOCK).compensated, x)


@pytest.mark.usefixtures("dense_kernel")
def test_is_the_correction_of_the_baseline() -> None:
    """Our reading of FlashPrefill V2 (benchmarks/baselines), which is causal and eager, gives the same."""
    x = inputs((1, 4, 2), (150, 150))
    selection = flexproxy.select(x.q, x.k, config=LOW)
    out, lse = plan_of(x.q, x.k).run(*x, selection.listed_block_mask())
    corrected = mean_correction(*x, out, lse, selection.block_map(), BLOCK)
    assert not torch.allclose(out, corrected, atol=0.1)
    torch.testing.assert_close(merged(*x, selection), corrected)


def test_whole_blocks() -> None:
    """As if the mask allowed whatever lies behind the last query and the last key."""
    ragged = 0
    for seed in range(60):
        case = random_case(400 + seed)
        (num_queries, num_keys), size = case.lengths, case.config.block_size
        selection = flexproxy.select(case.q, case.k, mask_mod=case.mask_mod, config=case.config)
        got = whole_blocks(selection.allowed, selection.admissible, selection.full, (num_queries, num_keys), size)
        pad = (0, -num_keys % size, 0, -num_queries % size)
        filled = F.pad(case.token_mask(), pad, value=True)
        _, want = reference.classify(filled, size)
        assert torch.equal(got.expand_as(want), want), case.mask_name
        ragged += int((want & ~reference.classify(case.token_mask(), size)[1]).any())
    assert ragged > 10


# ------------------------------------------------------------------------------------------------- hidden tokens


HIDING = ["causal", "window", "documents", "padding", "closure"]


def hidden_case(name: str) -> tuple[Inputs, Selection, list[int], Tensor]:
    """One sequence seven times, a query of each, and the tokens hidden from it: bool ``[7, 1, Skv, 1]``."""
    queries = [3, 40, 63, 64, 97, 120, 149]
    one = inputs((1, 4, 2), (150, 150))
    x = Inputs(*(t.expand(len(queries), -1, -1, -1).contiguous() for t in one))
    position = torch.arange(150)
    mask_mod = {
        "causal": masks.causal,
        "window": and_masks(masks.causal, masks.sliding_window(75)),
        "documents": masks.document(position // 55),
        "padding": and_masks(masks.full, masks.padding(((position > 20) & (position != 77))[None].expand(7, -1))),
        "closure": lambda b, h, q, kv: ((q >= kv) | (kv < 40)) & (kv != 50),
    }[name]
    selection = flexproxy.select(x.q, x.k, mask_mod=mask_mod, config=LOW)
    allowed = reference.token_mask(mask_mod, 1, 1, 150, 150, "cpu")[0, 0, queries]
    return x, selection, queries, ~allowed[:, None, :, None]


def changes_of_hidden(way: Way, name: str, change: float) -> Tensor:
    """How much the outputs of the queries change when all that is hidden from them changes: ``[7, Hq, D]``."""
    x, selection, queries, hidden = hidden_case(name)
    before = way(*x, selection)
    after = way(x.q, torch.where(hidden, x.k - change, x.k), torch.where(hidden, x.v + change, x.v), selection)
    rows = torch.arange(len(queries))
    return (after - before).abs()[rows, :, queries]


@pytest.mark.usefixtures("flex")
@both_ways
@pytest.mark.parametrize(
    ("flex", "name"), [*(("kernel", name) for name in HIDING), ("eager", "documents")], indirect=["flex"]
)
def test_hidden_tokens_stay_hidden(name: str, way: Way) -> None:
    """The selection given, an output depends on no key and no value that the mask hides from its query."""
    assert float(changes_of_hidden(way, name, 100.0).max()) == 0.0


@pytest.mark.usefixtures("dense_kernel")
@both_ways
@pytest.mark.parametrize("name", HIDING)
def test_a_leak_would_show(name: str, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mistake planted that blocks count of which any pair is allowed, the test above fails."""

    def leaking(mask_mod: MaskMod, admissible: Tensor, *_: Any) -> Tensor:
        return admissible

    monkeypatch.setattr(compensation, "whole_blocks", leaking)
    leaked = changes_of_hidden(way, name, 100.0)
    if name == "causal":  # cut blocks are the diagonal ones, which are kept
        assert float(leaked.max()) == 0.0
    else:
        assert float(leaked.max()) > 1e-3


@on_both
@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize(("part", "value"), [("keys", torch.inf), ("values", torch.nan)])
def test_what_is_not_finite_stays_hidden(part: str, value: float) -> None:
    """Of attention to the means: NaN reaches the queries that may see it, and no others."""
    x = inputs((1, 4, 2), (150, 150))
    selection = flexproxy.select(x.q, x.k, config=LOW)
    seen = compensation.means_of(x.k, x.v, selection).dropped[..., 4]  # [B, Hq, Nq]
    bad = x._replace(**{"k" if part == "keys" else "v": (x.k if part == "keys" else x.v).clone()})
    (bad.k if part == "keys" else bad.v)[:, :, 70, 3] = value

    def to_means(x: Inputs) -> Tensor:
        means = compensation.means_of(x.k, x.v, selection)
        block_mask = means.block_mask(BLOCK, 150, False)
        out = plan_of(x.q, x.k, lse=False).run(x.q, means.keys, means.values, block_mask, means.score_mod())
        assert isinstance(out, Tensor)
        return out

    clean, got = to_means(x), to_means(bad)
    rows = seen.repeat_interleave(BLOCK, 2)[..., :150]
    assert rows.any()
    assert not rows.all()
    assert torch.equal(got[~rows], clean[~rows])
    assert bool(got[rows].isnan().all())


# -------------------------------------------------------------------------------------------------- properties


@pytest.mark.usefixtures("dense_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_dropped_is_plain_attention(dtype: torch.dtype) -> None:
    """To the bit where the two are merged; and ``attention`` takes the dense route."""
    x = inputs((1, 4, 2), (150, 197), dtype=dtype)
    everything = ProxyConfig(block_size=BLOCK, gamma=1.0)
    selection = flexproxy.select(x.q, x.k, config=everything)
    plain = plan_of(x.q, x.k, lse=False).run(*x, selection.listed_block_mask())
    assert isinstance(plain, Tensor)
    assert torch.equal(merged(*x, selection), plain)
    torch.testing.assert_close(joined(*x, selection), plain)
    dense = flexproxy.attention(*x, config=everything)
    assert torch.equal(flexproxy.attention(*x, config=everything, compensate=True), dense)


@pytest.mark.usefixtures("dense_kernel")
@both_ways
@pytest.mark.parametrize("name", ["causal, a chunk", "full", "documents"])
def test_exact_where_blocks_are_constant(name: str, way: Way) -> None:
    """A block of equal keys and equal values is no other than its mean, so the result is dense attention."""
    x, mask_mod = named_case(name)
    if name == "documents":
        mask_mod = masks.document(torch.arange(160) // 48)
    length = x.k.shape[2]
    k, v = (t[:, :, ::BLOCK].repeat_interleave(BLOCK, 2)[:, :, :length] for t in (x.k, x.v))
    # Small sums of powers of two have exact means.
    x = Inputs(x.q, *((t * 64).round() / 64 for t in (k, v)))
    selection = flexproxy.select(x.q, x.k, mask_mod=mask_mod, config=LOW)
    want = expect(x, mask_mod, selection.block_map(), BLOCK)
    assert (want.dense - want.plain).abs().max() > 0.2
    check(way(*x, selection), want.dense, x)


@pytest.mark.usefixtures("dense_kernel")
@both_ways
def test_nearer_to_dense_attention_than_without(way: Way) -> None:
    """Few keys matter, and the many others are alike, as in long texts: most of what was lost comes back."""
    x = inputs((1, 4, 2), (384, 384), dim=32)
    generator = torch.Generator().manual_seed(1)
    k, v = 0.2 * x.k, x.v + torch.randn(1, 2, 1, 32, generator=generator)
    k[:, :, ::100] *= 10
    x = x._replace(k=k, v=v)
    selection = flexproxy.select(x.q, x.k, config=LOW)
    assert float(selection.density().mean()) < 0.2
    want = expect(x, None, selection.block_map(), BLOCK)
    lost, left = ((y.double() - want.dense).square().mean().sqrt() for y in (want.plain, way(*x, selection)))
    assert float(left) < 0.5 * float(lost)


# ------------------------------------------------------------------------------------------- merging, gradients


def test_merge() -> None:
    """One softmax over both sets of keys; exactly the one where the other is empty; 0 and -inf where both are."""
    generator = torch.Generator().manual_seed(0)
    scores, values = torch.randn(2, 3, 4, 30, generator=generator), torch.randn(2, 3, 30, 8, generator=generator)
    scores[0, 0, :2, :20] = -torch.inf
    scores[0, 0, 1:3, 20:] = -torch.inf  # row 1 has nothing at all
    empty = torch.tensor([0, 0, 1])

    def parts(scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        result = []
        for keys in (slice(0, 20), slice(20, 30)):
            lse = scores[..., keys].logsumexp(-1)
            shares = (scores[..., keys] - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
            result += [shares @ values[..., keys, :], lse]
        return result[0], result[1], result[2], result[3]

    out, lse = compensation.merge(*parts(scores))
    want = scores.softmax(-1).nan_to_num(0.0) @ values
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    first, first_lse, second, second_lse = parts(scores)
    assert torch.equal(out[0, 0, 0], second[0, 0, 0])
    assert torch.equal(out[0, 0, 2], first[0, 0, 2])
    assert (lse[0, 0, 0], lse[0, 0, 2]) == (second_lse[0, 0, 0], first_lse[0, 0, 2])
    assert out[tuple(empty)].eq(0).all()
    half = compensation.merge(first.half(), first_lse, second.half(), second_lse)[0]
    assert half.dtype == torch.float16


def test_gradients_of_merge_are_finite() -> None:
    """Also in rows where one set is empty, or both."""
    lse = torch.tensor([[[0.5, -torch.inf, 2.0, -torch.inf]]], requires_grad=True)
    other_lse = torch.tensor([[[1.5, 1.0, -torch.inf, -torch.inf]]], requires_grad=True)
    out, other = (torch.ones(1, 1, 4, 2, requires_grad=True) for _ in range(2))
    merged_out, merged_lse = compensation.merge(out, lse, 3 * other, other_lse)
    (merged_out.sum() + merged_lse.masked_fill(merged_lse == -torch.inf, 0.0).sum()).backward()
    for x in (lse, other_lse, out, other):
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
    assert lse.grad is not None
    assert lse.grad[0, 0, 3] == 0


@pytest.mark.usefixtures("dense_kernel")
def test_gradients_flow_through_both_parts() -> None:
    """Through kept tokens and through the means, to q, k and v: those of the specification."""
    x, mask_mod = named_case("window")
    selection = flexproxy.select(x.q, x.k, mask_mod=mask_mod, config=LOW)
    weight = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(1))
    mine, theirs = (Inputs(*(t.clone().requires_grad_() for t in x)) for _ in range(2))
    out, lse = merged_with_lse(*mine, selection)
    ((out * weight).sum() + lse.sum()).backward()
    allowed = reference.token_mask(selection.allowed, 1, 4, 150, 197, "cpu")
    want = reference.compensated_attention(*theirs, allowed, selection.block_map(), BLOCK, x.q.shape[3] ** -0.5)
    ((want[0] * weight).sum() + want[1].sum()).backward()
    for got, exact in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got.grad, exact.grad, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- compiled


def test_lists_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both masks of the merged way have the transposed lists where gradients are needed, and only there."""
    seen: list[BlockMask] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["block_mask"])
        return kernel(*args, **kwargs)

    monkeypatch.setattr(sparse_kernel, "run_compiled", watched)
    x = inputs((1, 2, 1), (64, 64))
    for gradients in (False, True):
        selection = dataclasses.replace(flexproxy.select(x.q, x.k, config=LOW), gradients=gradients)
        plan = plan_of(x.q, x.k, gradients=gradients)
        compensation.merged(*x, selection, plan, plan)
    if "compute_q_blocks" in compat._FROM_KV_BLOCKS:  # else they are always made
        assert [mask.q_indices is not None for mask in seen] == [False, False, True, True]
    assert all(mask.BLOCK_SIZE == (BLOCK, BLOCK) for mask in seen)


@pytest.mark.skipif(not cpu_kernel_exists(), reason="this torch's dynamo cannot trace masks")
def test_under_a_trace() -> None:
    """``torch.compile(fullgraph=True)`` around it: what a CPU runs, and what a GPU runs."""
    x, mask_mod = named_case("padding")
    selection = flexproxy.select(x.q, x.k, mask_mod=mask_mod, config=LOW)
    want = expect(x, mask_mod, selection.block_map(), BLOCK)

    def on_gpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        selection = flexproxy.select(q, k, mask_mod=mask_mod, config=LOW)
        return merged_with_lse(q, k, v, selection)

    on_cpu = functools.partial(flexproxy.attention, mask_mod=mask_mod, config=LOW, compensate=True)
    torch._dynamo.reset()
    check(torch.compile(on_cpu, fullgraph=True, backend="eager")(*x), want.compensated, x)
    out, lse = torch.compile(on_gpu, fullgraph=True, backend="eager")(*x)
    check(out, want.compensated, x)
    torch.testing.assert_close(lse.double(), want.lse, rtol=1e-6, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("traced", [False, True])
def test_compiled_for_a_cpu(traced: bool) -> None:
    """The kernel of torch.compile, alone and within a compiled function; NaN of later tokens stays where it is."""
    skip_unless_flex_compiles("cpu")
    x, mask_mod = named_case("window")
    run: Callable[..., Tensor] = functools.partial(flexproxy.attention, mask_mod=mask_mod, config=LOW, compensate=True)
    if traced:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, dynamic=False)
    selection = flexproxy.select(x.q, x.k, mask_mod=mask_mod, config=LOW)
    check(run(*x), expect(x, mask_mod, selection.block_map(), BLOCK).compensated, x)
    later = x.v.clone()
    later[:, :, 180:] = torch.nan  # of queries from 133 on
    got, clean = run(x.q, x.k, later), run(*x)
    assert torch.equal(got[:, :, :128], clean[:, :, :128])
    assert bool(got[:, :, 140:].isnan().any())


# ------------------------------------------------------------------------------------------------------ on a GPU


def on_gpu(x: Inputs) -> Inputs:
    return Inputs(*(t.cuda() for t in x))


GPU_CASES = [
    # head dimension, dtype, block size, Sq, Skv
    (128, torch.bfloat16, 128, 1024, 1024),
    (128, torch.bfloat16, 128, 1000, 1133),
    (64, torch.float16, 64, 500, 500),
    (256, torch.bfloat16, 128, 500, 700),
    (64, torch.float32, 128, 700, 700),
    (16, torch.float32, 16, 150, 197),
    (128, torch.float16, 256, 1500, 1500),
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("dim", "dtype", "block_size", "num_queries", "num_keys"), GPU_CASES)
def test_every_shape_runs_on_a_gpu(
    dim: int, dtype: torch.dtype, block_size: int, num_queries: int, num_keys: int, padded: bool
) -> None:
    """Output and log-sum-exp, of the kernels that are chosen there, FLASH where it is installed."""
    x = on_gpu(inputs((2, 6, 2), (num_queries, num_keys), dim, dtype))
    config = ProxyConfig.paper(block_size=block_size, min_budget=2 * block_size, max_budget=2 * block_size)
    real = torch.arange(num_keys) >= torch.tensor([[0], [num_keys // 4]])
    causal_and_real = and_masks(masks.causal, masks.padding(real.cuda()))
    mask_mod = masks.shift(causal_and_real, num_keys - num_queries) if padded else None
    selection = flexproxy.select(x.q, x.k, mask_mod=mask_mod, config=config)
    want = expect(x, mask_mod, selection.block_map(), block_size)
    assert (want.compensated - want.plain).abs().max() > 0.05, "nothing was given back"
    out, lse = flexproxy.attention(
        *x, mask_mod=mask_mod, config=config, when="always", compensate=True, return_lse=True
    )
    torch.testing.assert_close(lse.cpu().double(), want.lse, rtol=1e-3, atol=1e-3)
    if dtype == torch.float32:
        torch.testing.assert_close(out.cpu().double(), want.compensated, rtol=1e-3, atol=1e-3)
    else:
        check(out, want.compensated, x)
    again = flexproxy.attention(*x, mask_mod=mask_mod, config=config, when="always", compensate=True)
    assert torch.equal(again, out)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_log_sum_exp_on_a_gpu(dtype: torch.dtype) -> None:
    """Without compensation too: of whatever kernel is chosen for the dtype, in natural logarithms."""
    x = on_gpu(inputs((1, 4, 2), (1024, 1024), 128, dtype))
    config = ProxyConfig.paper(min_budget=256, max_budget=256)
    blocks = flexproxy.select(x.q, x.k, config=config).block_map().cpu()
    allowed = reference.token_mask(masks.causal, 1, 4, 1024, 1024, "cpu") & tokens_of(blocks, 128, 128, 1024, 1024)
    scores = x.q.cpu().double() @ x.k.cpu().double().repeat_interleave(2, 1).mT / 128**0.5
    _, lse = flexproxy.attention(*x, config=config, return_lse=True, when="always")
    want = scores.masked_fill(~allowed, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.cpu().double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("block_size", [128, 64])
def test_gradients_on_a_gpu(block_size: int) -> None:
    x = inputs((2, 4, 2), (700, 700), 64)
    config = ProxyConfig.paper(block_size=block_size, min_budget=2 * block_size, max_budget=2 * block_size)
    mine = Inputs(*(t.cuda().requires_grad_() for t in x))
    theirs = Inputs(*(t.double().requires_grad_() for t in x))
    blocks = flexproxy.select(mine.q, mine.k, config=config).block_map().cpu()
    weight = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(1))
    out = flexproxy.attention(*mine, config=config, when="always", compensate=True)
    (out * weight.cuda()).sum().backward()
    allowed = reference.token_mask(masks.causal, 2, 4, 700, 700, "cpu")
    want, _ = reference.compensated_attention(*theirs, allowed, blocks, block_size, 64**-0.5)
    (want * weight).sum().backward()
    for got, exact in zip(mine, theirs, strict=True):
        assert got.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(got.grad.cpu().double(), exact.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@needs_gpu
def test_a_new_length_does_not_recompile() -> None:
    """Nor does a new mask of one kind: lengths, lists and tables are tensors."""
    torch._dynamo.reset()
    lengths = [640, 896, 1152, 1408, 1664]
    for number, length in enumerate(lengths):
        x = on_gpu(inputs((2, 4, 2), (length, length), 64, torch.bfloat16))
        documents = torch.arange(length, device="cuda") // (100 + number)
        mask_mod = and_masks(masks.causal, masks.document(documents))
        with torch._dynamo.config.patch(error_on_recompile=number > 2):
            flexproxy.attention(*x, mask_mod=mask_mod, config=LOW, when="always", compensate=True)


@pytest.mark.gpu
@needs_gpu
def test_within_a_compiled_function_on_a_gpu() -> None:
    x = on_gpu(inputs((2, 4, 2), (700, 700), 64, torch.bfloat16))
    config = ProxyConfig.paper(min_budget=256, max_budget=256)
    blocks = flexproxy.select(x.q, x.k, config=config).block_map()
    run = functools.partial(flexproxy.attention, config=config, when="always", compensate=True)
    check(torch.compile(run, fullgraph=True)(*x), expect(x, None, blocks, 128).compensated, x)
