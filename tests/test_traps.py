"""The ten ways to get wrong numbers out of FlexAttention without an error.

For each: flexproxy is right where the trap lies, and the same check fails where the mistake is planted.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
    noop_mask,
)

import flexproxy
from flexproxy import ProxyConfig, Selection, masks
from flexproxy.masks.structure import MaskMod
from flexproxy.ops.compat import from_kv_blocks, many_lengths, seq_lengths_of
from flexproxy.selection import membership
from flexproxy.stages.lists import dense_maps
from tests.accuracy import allowed_pairs, assert_accurate, skip_unless_flex_compiles

# A length that is no multiple of the block, and heads that share keys. One shape for all: each new one is compiled.
BATCH, HEADS, KV_HEADS, LENGTH, HEAD_DIM, BLOCK = 2, 8, 2, 777, 64, 128
NUM_BLOCKS = -(-LENGTH // BLOCK)
CONFIG = ProxyConfig.paper(num_proxies=KV_HEADS, density=0.5, min_budget=0, block_size=BLOCK)

Lists = tuple[Tensor, Tensor, Tensor, Tensor]

compiled_flex_attention = torch.compile(flex_attention, fullgraph=True, dynamic=False)


def inputs(
    device: str,
    batch: int = BATCH,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    num_queries: int = LENGTH,
    num_keys: int = LENGTH,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, num_queries), (kv_heads, num_keys), (kv_heads, num_keys)]
    q, k, v = (torch.randn(batch, h, s, head_dim, generator=generator).to(device, dtype) for h, s in shapes)
    return q, k, v


@dataclass(frozen=True)
class Case:
    """One causal and packed problem, and what flexproxy makes of it."""

    device: str

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return inputs(self.device)

    @cached_property
    def document_ids(self) -> Tensor:
        position = torch.arange(LENGTH, device=self.device)
        return torch.stack([position // 300, position // 500])

    @cached_property
    def mask_mod(self) -> MaskMod:
        return and_masks(masks.causal, masks.document(self.document_ids))

    @cached_property
    def selection(self) -> Selection:
        return flexproxy.select(*self.qkv[:2], mask_mod=self.mask_mod, config=CONFIG)

    @cached_property
    def block_mask(self) -> BlockMask:
        return flexproxy.build(*self.qkv[:2], mask_mod=self.mask_mod, config=CONFIG)

    @cached_property
    def allowed(self) -> Tensor:
        return allowed_pairs(self.selection, self.mask_mod, LENGTH, LENGTH, BLOCK)

    def eager(self, block_mask: BlockMask) -> Tensor:
        out: Tensor = flex_attention(*self.qkv, block_mask=block_mask, enable_gqa=True)
        return out

    def compiled(self, block_mask: BlockMask) -> Tensor:
        skip_unless_flex_compiles(self.device)
        out: Tensor = compiled_flex_attention(*self.qkv, block_mask=block_mask, enable_gqa=True)
        return out

    def check(self, out: Tensor, allowed: Tensor | None = None) -> None:
        assert_accurate(out, *self.qkv, self.allowed if allowed is None else allowed)


@pytest.fixture(scope="module", autouse=True)
def many_variants() -> Iterator[None]:
    """``flex_attention`` is compiled for more masks here than dynamo allows by default."""
    torch._dynamo.reset()
    with many_lengths():
        yield


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {}


@pytest.fixture
def case(device: str, cases: dict[str, Case]) -> Case:
    return cases.setdefault(device, Case(device))


def lists_of(mask: BlockMask) -> Lists:
    """Numbers and indices of partial, then of full blocks."""
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    return mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices


def lists_from(kept: Tensor, full: Tensor) -> Lists:
    """The lists of some kept blocks ``[B, H, Nq, Nk]``, those in ``full`` as full ones."""

    def ascending(blocks: Tensor) -> tuple[Tensor, Tensor]:
        index = (~blocks).to(torch.uint8).sort(dim=-1, stable=True).indices
        return blocks.sum(-1, dtype=torch.int32), index.to(torch.int32)

    return *ascending(kept & ~full), *ascending(kept & full)


def by_hand(lists: Lists, mask_mod: MaskMod, length: int = LENGTH) -> BlockMask:
    """A BlockMask as somebody may write it who has not read about the traps."""
    return from_kv_blocks(
        *lists, block_size=(BLOCK, BLOCK), mask_mod=mask_mod, seq_lengths=(length, length), compute_q_blocks=False
    )


def causal_full_blocks(device: str) -> Tensor:
    """Blocks that are full under the causal mask alone: bool ``[1, 1, Nq, Nk]``."""
    mask = create_block_mask(masks.causal, None, None, LENGTH, LENGTH, device=device)
    return dense_maps(mask, NUM_BLOCKS, NUM_BLOCKS)[1]


def some_blocks(device: str, *shape: int) -> Tensor:
    """Random causal blocks, the diagonal among them: bool ``[*shape, Nq, Nk]``."""
    random = torch.rand(*shape, NUM_BLOCKS, NUM_BLOCKS, generator=torch.Generator().manual_seed(1)) < 0.4
    return ((random | torch.eye(NUM_BLOCKS, dtype=torch.bool)) & torch.ones(NUM_BLOCKS, NUM_BLOCKS).tril().bool()).to(
        device
    )


def spread(blocks: Tensor) -> Tensor:
    """Token pairs of some blocks, under the causal mask: bool ``[B, Hq, S, S]``."""
    tokens = blocks.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :LENGTH, :LENGTH]
    return tokens.expand(BATCH, HEADS, LENGTH, LENGTH).tril()


def fails_or_skips(check: Callable[[], None], what: str) -> None:
    """A mistake that newer kernels may forgive: it must show here, or the test is skipped, having shown nothing."""
    try:
        check()
    except (AssertionError, RuntimeError):
        return
    pytest.skip(f"this torch on this device reads {what} as they are meant")


def run_planted(function: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    """Run a function of this file in a process of its own, which it may bring down."""
    program = (
        f"from tests.test_traps import {function.__name__} as f; print('started', flush=True); f(); print('passed')"
    )
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=600, check=False
    )


# ------------------------------------------------------------------------- 1: eager ignores the lists


def test_1_mask_mod_carries_membership(case: Case) -> None:
    case.check(case.eager(case.block_mask))


def test_1_planted_mask_mod_without_membership(case: Case) -> None:
    planted = by_hand(lists_of(case.block_mask), case.mask_mod)
    with pytest.raises(AssertionError, match="error"):
        case.check(case.eager(planted))


# ------------------------------------------------------------------------- 2: full blocks skip mask_mod


def test_2_composing_makes_full_blocks_partial(case: Case) -> None:
    case.check(case.compiled(case.block_mask))


def test_2_and_block_masks_makes_full_blocks_partial(case: Case) -> None:
    q, k, _ = case.qkv
    document = masks.document(case.document_ids)
    both = flexproxy.and_block_masks(
        flexproxy.build(q, k, mask_mod=masks.causal, config=CONFIG),
        create_block_mask(document, BATCH, None, LENGTH, LENGTH, device=case.device),
    )
    selection = flexproxy.select(q, k, mask_mod=masks.causal, config=CONFIG)
    allowed = allowed_pairs(selection, and_masks(masks.causal, document), LENGTH, LENGTH, BLOCK)
    case.check(case.eager(both), allowed)
    case.check(case.compiled(both), allowed)


def test_2_planted_full_blocks_stay_full(case: Case) -> None:
    planted = by_hand(lists_from(case.selection.block_map(), causal_full_blocks(case.device)), case.block_mask.mask_mod)
    with pytest.raises(AssertionError, match="error"):
        case.check(case.compiled(planted))


# ------------------------------------------------------------------------- 3: FLASH drops lists under noop_mask


def flash_case(dtype: torch.dtype = torch.bfloat16) -> tuple[tuple[Tensor, Tensor, Tensor], Selection]:
    q, k, v = inputs("cuda", num_queries=1024, num_keys=1024, head_dim=128, dtype=dtype)
    return (q, k, v), flexproxy.select(q, k, mask_mod=masks.full, config=CONFIG)


@pytest.fixture
def needs_flash() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        pytest.skip("no flash_attn.cute (flash-attn-4)")
    qkv = inputs("cuda", num_queries=1024, num_keys=1024, head_dim=128, dtype=torch.bfloat16)
    try:
        compiled_flex_attention(*qkv, enable_gqa=True, kernel_options={"BACKEND": "FLASH"})
    except Exception as error:  # whatever the reason, this torch cannot run it
        pytest.skip(f"BACKEND=FLASH does not run here: {error}")


@pytest.mark.parametrize("backend", ["FLASH", "TRITON"])
def test_3_flash_gets_membership_where_a_mask_may_be_trivial(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``attention`` leaves membership to the lists, save where FLASH may drop them: under a function not its own."""
    given: list[BlockMask] = []

    def run(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, **options: Any) -> Tensor:
        given.append(block_mask)
        return q

    monkeypatch.setattr("flexproxy.sparse.kernel.run_compiled", run)
    qkv = inputs("cpu")
    for mask_mod in (noop_mask, masks.full):
        flexproxy.attention(*qkv, mask_mod=mask_mod, config=CONFIG, kernel_options={"BACKEND": backend})
    kept = flexproxy.select(*qkv[:2], mask_mod=masks.full, config=CONFIG).block_map()
    assert not kept.all()
    index = torch.zeros((), dtype=torch.int64)
    dropped = (~kept).nonzero()[0]
    b, h, row, column = (index + int(at) for at in dropped)
    allowed = [bool(mask.mask_mod(b, h, row * BLOCK, column * BLOCK)) for mask in given]
    assert allowed == [backend == "TRITON", True]


@pytest.mark.gpu
@pytest.mark.usefixtures("needs_flash")
@pytest.mark.parametrize("mask_mod", [masks.full, noop_mask])
def test_3_flash_reads_our_lists(mask_mod: MaskMod) -> None:
    qkv, selection = flash_case()
    flash = {"BACKEND": "FLASH"}
    out = flexproxy.attention(*qkv, mask_mod=mask_mod, config=CONFIG, kernel_options=flash, when="always")
    assert isinstance(out, Tensor)
    assert_accurate(out, *qkv, allowed_pairs(selection, masks.full, 1024, 1024, BLOCK))


@pytest.mark.gpu
@pytest.mark.usefixtures("needs_flash")
def test_3_planted_noop_mask() -> None:
    qkv, selection = flash_case()
    kept = selection.block_map()
    planted = by_hand(lists_from(kept, torch.ones_like(kept)), noop_mask, 1024)
    allowed = allowed_pairs(selection, masks.full, 1024, 1024, BLOCK)

    def check() -> None:
        options: Any = {"BACKEND": "FLASH"}
        out = compiled_flex_attention(*qkv, block_mask=planted, enable_gqa=True, kernel_options=options)
        assert_accurate(out, *qkv, allowed)

    fails_or_skips(check, "full lists under noop_mask")


# ------------------------------------------------------------------------- 4: one row of lists for each KV head


def test_4_lists_have_a_row_for_each_query_head(case: Case) -> None:
    assert all(t.shape[:2] == (BATCH, HEADS) for t in lists_of(case.block_mask))
    maps = case.selection.block_map()
    assert not torch.equal(maps[:, :1].expand_as(maps), maps), "heads that differ, or the check below shows nothing"
    case.check(case.compiled(case.block_mask))


def test_4_other_numbers_of_heads_are_refused(case: Case) -> None:
    q, k, v = case.qkv
    blocks = some_blocks(case.device, BATCH, KV_HEADS)
    planted = by_hand(lists_from(blocks, torch.zeros_like(blocks)), masks.causal)
    for call in (flexproxy.build, flexproxy.select):
        with pytest.raises(ValueError, match="block_mask: expected a head dimension of 1 or 8, got 2"):
            call(q, k, block_mask=planted, config=CONFIG)
    with pytest.raises(ValueError, match="block_mask: expected a head dimension of 1 or 8, got 2"):
        flexproxy.attention(q, k, v, block_mask=planted, config=CONFIG)
    with pytest.raises(ValueError, match="b: expected a head dimension of 8, as a, or 1, got 2"):
        flexproxy.and_block_masks(case.block_mask, planted)


@pytest.mark.slow
def test_4_planted_row_for_each_kv_head(case: Case) -> None:
    """The CPU kernel gives head h the row h // G, the GPU kernel the row h % Hkv; who means the other is not told."""
    blocks = some_blocks(case.device, BATCH, KV_HEADS)
    head = torch.arange(HEADS, device=case.device)
    row = head % KV_HEADS if case.device == "cpu" else head // (HEADS // KV_HEADS)
    meant = blocks[:, row]
    member = membership(meant, BLOCK)
    full = causal_full_blocks(case.device)
    case.check(case.compiled(by_hand(lists_from(meant, full), and_masks(member, masks.causal))), spread(meant))
    planted = by_hand(lists_from(blocks, full), and_masks(member, masks.causal))
    fails_or_skips(lambda: case.check(case.compiled(planted), spread(meant)), "Hkv rows of lists")


# ------------------------------------------------------------------------- 5: lists expanded with stride 0


def check_contiguous(mask: BlockMask) -> None:
    assert all(t.is_contiguous() and 0 not in t.stride() for t in lists_of(mask)), "expanded lists"


def shared_by_heads(case: Case) -> tuple[BlockMask, Tensor]:
    """A mask with one head for each sequence, and its token pairs."""
    blocks = some_blocks(case.device, BATCH, 1)
    mask_mod = and_masks(membership(blocks.expand(-1, HEADS, -1, -1), BLOCK), masks.causal)
    return by_hand(lists_from(blocks, causal_full_blocks(case.device)), mask_mod), spread(blocks)


def test_5_lists_are_contiguous(case: Case) -> None:
    shared, allowed = shared_by_heads(case)
    ours = [
        case.block_mask,
        flexproxy.build(*case.qkv[:2], block_mask=shared, config=CONFIG),
        flexproxy.and_block_masks(case.block_mask, shared),
        flexproxy.and_block_masks(shared, create_block_mask(masks.causal, 1, 1, LENGTH, LENGTH, device=case.device)),
    ]
    for mask in ours:
        check_contiguous(mask)
    everything = ProxyConfig(gamma=1.0)
    every_head = flexproxy.build(*case.qkv[:2], block_mask=shared, config=everything)
    case.check(case.compiled(every_head), allowed)


def test_5_planted_expanded_lists_are_caught(case: Case) -> None:
    shared, _ = shared_by_heads(case)
    a, b, c, d = (t.expand(-1, HEADS, *t.shape[2:]) for t in lists_of(shared))
    with pytest.raises(AssertionError, match="expanded"):
        check_contiguous(by_hand((a, b, c, d), shared.mask_mod))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; the CPU kernel uses the true strides")
def test_5_planted_expanded_lists_are_read_wrongly(case: Case) -> None:
    shared, allowed = shared_by_heads(case)
    a, b, c, d = (t.expand(-1, HEADS, *t.shape[2:]) for t in lists_of(shared))
    planted = by_hand((a, b, c, d), shared.mask_mod)
    fails_or_skips(lambda: case.check(case.compiled(planted), allowed), "expanded lists")


# ------------------------------------------------------------------------- 6: lists with different numbers of columns


def check_columns(mask: BlockMask) -> None:
    numbers, indices, full_numbers, full_indices = lists_of(mask)
    assert indices.shape == full_indices.shape == (*numbers.shape, NUM_BLOCKS), "columns differ"
    assert numbers.shape == full_numbers.shape


def without_spare_columns(mask: BlockMask) -> BlockMask:
    """The same mask; its partial list has no column that no row uses."""
    numbers, indices, *full = lists_of(mask)
    used = int(numbers.max())
    assert used < NUM_BLOCKS
    result = by_hand((numbers, indices, full[0], full[1]), mask.mask_mod)
    result.kv_indices = indices[..., :used].contiguous()  # set later: torch 2.5 refuses it, for the lists of gradients
    return result


@pytest.mark.slow
def test_6_partial_and_full_lists_have_the_same_columns(case: Case) -> None:
    check_columns(case.block_mask)
    check_columns(flexproxy.and_block_masks(case.block_mask, shared_by_heads(case)[0]))
    # A caller's mask may have such lists: ours is made anew from what they say.
    blocks = some_blocks(case.device, BATCH, HEADS)
    theirs = by_hand(
        lists_from(blocks, causal_full_blocks(case.device)), and_masks(membership(blocks, BLOCK), masks.causal)
    )
    if seq_lengths_of(theirs) is not None:  # else the columns are all that tells the length
        theirs = without_spare_columns(theirs)
    ours = flexproxy.build(*case.qkv[:2], block_mask=theirs, config=ProxyConfig(gamma=1.0))
    check_columns(ours)
    case.check(case.compiled(ours), spread(blocks))


def test_6_planted_different_columns_are_caught(case: Case) -> None:
    with pytest.raises(AssertionError, match="columns"):
        check_columns(without_spare_columns(case.block_mask))


def test_6_planted_different_columns_are_read_wrongly_or_refused(case: Case) -> None:
    planted = without_spare_columns(case.block_mask)
    fails_or_skips(lambda: case.check(case.compiled(planted)), "lists of different columns")


# ------------------------------------------------------------------------- 7: indices with 32 bits


def test_7_a_table_past_32_bits_is_refused(device: str) -> None:
    del device  # a table without memory, in both runs
    membership(torch.empty(1, 32, 8192, 8192, dtype=torch.bool, device="meta"), BLOCK)
    with pytest.raises(ValueError, match=r"block_size: expected at most 2\*\*31 block pairs"):
        membership(torch.empty(1, 32, 8192, 8193, dtype=torch.bool, device="meta"), BLOCK)


LONG = 50_000  # LONG**2 is past 2**31


def check_last_rows(out: Tensor, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> None:
    rows = slice(LONG - allowed.shape[2], LONG)
    assert_accurate(out[:, :, rows], q[:, :, rows], k, v, allowed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_7_long_sequences_are_right() -> None:
    q, k, v = inputs("cuda", 1, 2, 1, LONG, LONG)
    selection = flexproxy.select(q, k, config=CONFIG_LONG)
    out = compiled_flex_attention(q, k, v, block_mask=selection.block_mask(), enable_gqa=True)
    rows = 64
    last = selection.block_map()[:, :, -1:].repeat_interleave(rows, 2).repeat_interleave(BLOCK, 3)[..., :LONG]
    check_last_rows(out, q, k, v, last & torch.ones_like(last).tril(LONG - rows))


CONFIG_LONG = ProxyConfig(density=0.1, min_budget=0, block_size=BLOCK)


def planted_table_of_token_pairs() -> None:
    q, k, v = inputs("cuda", 1, 2, 1, LONG, LONG)
    table = torch.ones(LONG, LONG, dtype=torch.bool, device="cuda").tril_()

    def look_up(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return table[q_idx, kv_idx]

    size = NUM_BLOCKS_LONG
    kept = torch.ones(1, 1, size, size, dtype=torch.bool, device="cuda").tril_()
    mask = by_hand(lists_from(kept, torch.zeros_like(kept)), look_up, LONG)
    out = compiled_flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    torch.cuda.synchronize()
    rows = 64
    check_last_rows(out, q, k, v, table[None, None, -rows:].expand(1, 2, -1, -1))


NUM_BLOCKS_LONG = -(-LONG // BLOCK)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_7_planted_table_of_token_pairs() -> None:
    done = run_planted(planted_table_of_token_pairs)
    assert "started" in done.stdout, done.stderr
    if "passed" in done.stdout:
        pytest.skip("this torch on this device addresses tables with 64 bits")
    assert "AssertionError: error" in done.stderr or "CUDA error" in done.stderr, done.stderr


# ------------------------------------------------------------------------- 8: lists in ascending order


def check_ascending(mask: BlockMask) -> None:
    for number, index in (lists_of(mask)[:2], lists_of(mask)[2:]):
        both_listed = torch.arange(1, index.shape[-1], device=index.device) < number[..., None]
        assert bool((index[..., 1:] > index[..., :-1])[both_listed].all()), "lists not ascending"


def descending(number: Tensor, index: Tensor) -> Tensor:
    """Every row's listed blocks in reverse."""
    column = torch.arange(index.shape[-1], device=index.device)
    return torch.where(column < number[..., None], index, -1).sort(dim=-1, descending=True).values.clamp(min=0)


def ragged_case(case: Case) -> tuple[Lists, MaskMod]:
    """Every block kept, none of them called full, so that each row's one list runs over the ragged last block."""
    kept = torch.ones(BATCH, HEADS, NUM_BLOCKS, NUM_BLOCKS, dtype=torch.bool, device=case.device)
    lists = lists_from(kept, torch.zeros_like(kept))
    return lists, and_masks(membership(kept, BLOCK), masks.full)


@pytest.mark.slow
def test_8_lists_are_ascending(case: Case) -> None:
    q, k, _ = case.qkv
    everything = flexproxy.build(q, k, mask_mod=masks.full, config=ProxyConfig(gamma=1.0))
    for mask in (case.block_mask, flexproxy.and_block_masks(case.block_mask, shared_by_heads(case)[0]), everything):
        check_ascending(mask)
    # A caller's lists may have any order: ours are made anew.
    lists, mask_mod = ragged_case(case)
    theirs = by_hand((lists[0], descending(*lists[:2]), *lists[2:]), mask_mod)
    check_ascending(flexproxy.build(q, k, block_mask=theirs, config=CONFIG))
    ours = by_hand(lists, mask_mod)
    check_ascending(ours)
    case.check(case.compiled(ours), torch.ones_like(case.allowed))


def test_8_planted_descending_lists_are_caught(case: Case) -> None:
    blocks = some_blocks(case.device, BATCH, HEADS)
    even = torch.arange(NUM_BLOCKS, device=case.device) % 2 == 0
    a, b, c, d = lists_from(blocks, even.expand_as(blocks))
    check_ascending(by_hand((a, b, c, d), masks.causal))
    for planted in ((a, descending(a, b), c, d), (a, b, c, descending(c, d))):
        with pytest.raises(AssertionError, match="ascending"):
            check_ascending(by_hand(planted, masks.causal))


def test_8_planted_descending_lists_with_a_ragged_tail_are_read_wrongly(case: Case) -> None:
    lists, mask_mod = ragged_case(case)
    planted = by_hand((lists[0], descending(*lists[:2]), *lists[2:]), mask_mod)
    allowed = torch.ones_like(case.allowed)
    fails_or_skips(lambda: case.check(case.compiled(planted), allowed), "descending lists")


# ------------------------------------------------------------------------- 9: dynamic shapes on a CPU

Shape = tuple[int, int, int, int, int, int]  # B, Hq, Hkv, Sq, Skv, D

SEQUENCES: list[tuple[Shape, Shape]] = [
    ((3, 4, 2, 130, 1025, 32), (2, 8, 2, 777, 777, 64)),  # all of it changes
    ((2, 4, 2, 777, 777, 32), (2, 4, 2, 1000, 1000, 32)),  # the length
]


def check_shapes(attention: Callable[[Tensor, Tensor, Tensor], Tensor], shapes: tuple[Shape, ...]) -> None:
    """Attention over one shape and then another, each of them checked."""
    for batch, heads, kv_heads, num_queries, num_keys, head_dim in shapes:
        q, k, v = inputs("cpu", batch, heads, kv_heads, num_queries, num_keys, head_dim)
        selection = flexproxy.select(q, k, config=CONFIG)
        causal = masks.shift(masks.causal, num_keys - num_queries)
        allowed = allowed_pairs(selection, causal, num_queries, num_keys, BLOCK)
        assert_accurate(attention(q, k, v), q, k, v, allowed)


@pytest.mark.slow
def test_9_each_shape_is_compiled_for_itself_on_a_cpu() -> None:
    skip_unless_flex_compiles("cpu")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # A mask that looks tokens up: under the default one nothing may be compiled.
        real = masks.padding(torch.ones(k.shape[0], k.shape[2], dtype=torch.bool))
        mask_mod = masks.shift(masks.and_masks(masks.causal, real), k.shape[2] - q.shape[2])
        out = flexproxy.attention(q, k, v, mask_mod=mask_mod, config=CONFIG)
        assert isinstance(out, Tensor)
        return out

    for shapes in SEQUENCES:
        check_shapes(attention, shapes)


def planted_shapes(dynamic: bool | None, *sequences: tuple[Shape, ...]) -> None:
    for shapes in sequences:
        torch._dynamo.reset()
        flex = torch.compile(flex_attention, dynamic=dynamic)
        check_shapes(
            lambda q, k, v, flex=flex: flex(q, k, v, block_mask=flexproxy.build(q, k, config=CONFIG), enable_gqa=True),  # type: ignore[misc]
            shapes,
        )


def planted_automatic_shapes() -> None:
    planted_shapes(None, *reversed(SEQUENCES))


def planted_dynamic_shapes() -> None:
    planted_shapes(True, *((shape,) for shapes in reversed(SEQUENCES) for shape in shapes))


@pytest.mark.slow
@pytest.mark.parametrize("planted", [planted_automatic_shapes, planted_dynamic_shapes])
def test_9_planted_dynamic_shapes_fail_on_a_cpu(planted: Callable[[], None]) -> None:
    """Which sequences come out wrong, or do not compile, hangs on the names of the symbols in the C++ code."""
    skip_unless_flex_compiles("cpu")
    done = run_planted(planted)
    assert "started" in done.stdout, done.stderr
    if "passed" in done.stdout:
        pytest.skip("this torch compiles dynamic shapes rightly on a CPU")
    expected = ("AssertionError: error", "CppCompileError", "InductorError", "index out of bounds")
    assert done.returncode < 0 or any(reason in done.stderr for reason in expected), done.stderr


# ------------------------------------------------------------------------- 10: tables over tokens, ragged last tile


MOST = 1024  # the largest block


def check_padding_of_last_tile(mask_mod: MaskMod) -> None:
    """A mask can be asked for the tokens that a ragged last tile lacks, and allows none of them."""
    index = torch.arange(LENGTH, -(-LENGTH // MOST) * MOST)
    zero = torch.zeros((), dtype=torch.int64)
    inside = torch.arange(LENGTH)
    for b in range(BATCH):
        for q_idx, kv_idx in ((index, inside), (inside, index), (index, index)):
            assert not mask_mod(zero + b, zero, q_idx[:, None], kv_idx).any()


def real_tokens(device: str) -> Tensor:
    position = torch.arange(LENGTH, device=device)
    return torch.stack([position >= 99, position < 700]).long()  # padding left, and right


def test_10_tables_of_tokens_have_whole_tiles() -> None:
    ids = Case("cpu").document_ids
    for mask_mod in (masks.document(ids), masks.document(ids[0]), masks.padding(real_tokens("cpu"))):
        check_padding_of_last_tile(mask_mod)


@pytest.mark.slow
def test_10_ragged_lengths_are_right_compiled(case: Case) -> None:
    case.check(case.compiled(case.block_mask))
    q, k, _ = case.qkv
    padded = and_masks(masks.causal, masks.padding(real_tokens(case.device)))
    selection = flexproxy.select(q, k, mask_mod=padded, config=CONFIG)
    out = case.compiled(selection.block_mask())
    case.check(out, allowed_pairs(selection, padded, LENGTH, LENGTH, BLOCK))
    assert not out[0, :, :99].any()
    assert not out[1, :, 700:].any()


def unpadded_document(ids: Tensor) -> MaskMod:
    def look_up(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ids[b, q_idx] == ids[b, kv_idx]

    return look_up


def test_10_planted_unpadded_table_is_caught() -> None:
    with pytest.raises(IndexError):
        check_padding_of_last_tile(unpadded_document(Case("cpu").document_ids))


def planted_unpadded_table() -> None:
    case = Case("cpu")
    member = membership(case.selection.block_map(), BLOCK)
    mask_mod = and_masks(member, masks.causal, unpadded_document(case.document_ids))
    case.check(case.compiled(by_hand(lists_of(case.block_mask), mask_mod)))


@pytest.mark.slow
def test_10_planted_unpadded_table_stops_the_kernel() -> None:
    skip_unless_flex_compiles("cpu")
    done = run_planted(planted_unpadded_table)
    assert "started" in done.stdout, done.stderr
    if "passed" in done.stdout:
        pytest.skip("this torch looks up no padding of a last tile")
    assert done.returncode < 0 or "index out of bounds" in done.stderr or "AssertionError" in done.stderr, done.stderr
