"""From maps of blocks to the lists that the kernels read, and back; intersections; membership."""

from __future__ import annotations

import inspect
from itertools import combinations_with_replacement
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask

import flexproxy
from flexproxy import ProxyConfig, and_block_masks, masks, reference
from flexproxy.masks.structure import MaskMod
from flexproxy.ops.compat import seq_lengths_of
from flexproxy.selection import membership
from flexproxy.sparse import kernel as sparse_kernel
from flexproxy.sparse.plan import plan_attention
from flexproxy.stages.lists import compile_block_mask, dense_maps
from tests.lists import full_blocks, partial_blocks

HEADS = 4
CONFIG = ProxyConfig.paper(gamma=0.7, min_budget=0)
CAN_LEAVE_OUT_Q_LISTS = "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters
CAN_LEAVE_OUT_FULL_LISTS = "separate_full_blocks" in inspect.signature(create_block_mask).parameters


def keeps_lengths() -> bool:
    """Whether this torch keeps the lengths and any block size: torch 2.5 rounds lengths up and says 128 always."""
    return seq_lengths_of(create_block_mask(masks.causal, 1, 1, 130, 130, device="cpu", BLOCK_SIZE=64)) is not None


def needs_lengths(lengths: tuple[int, int], block_size: int) -> None:
    if (block_size != 128 or lengths[0] % 128 or lengths[1] % 128) and not keeps_lengths():
        pytest.skip("the create_block_mask of this torch knows neither ragged lengths nor blocks but of 128")


def tensors(device: str, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(2, HEADS, num_queries, 32, generator=generator)
    return q.to(device), torch.randn(2, 2, num_keys, 32, generator=generator).to(device)


def head_mask(device: str) -> MaskMod:
    """Depends on the head, at the scale of blocks."""
    reach = torch.tensor([100, 1000, 250, 400], device=device)
    return lambda b, h, q, k: (q >= k) & (q - k < reach[h])


def batch_mask(device: str) -> MaskMod:
    """Depends on the sequence."""
    start = torch.tensor([0, 200], device=device)
    return lambda b, h, q, k: k >= start[b]


def assert_same(got: BlockMask, want: BlockMask, num_blocks: int) -> None:
    """Two masks have the same blocks, partial and full, where one may have dimensions of size 1."""
    for blocks in (partial_blocks, full_blocks):
        x, y = torch.broadcast_tensors(blocks(got, num_blocks), blocks(want, num_blocks))
        assert torch.equal(x, y), blocks.__name__
    x, y = torch.broadcast_tensors(got.to_dense().bool(), want.to_dense().bool())
    assert torch.equal(x, y), "dense form"


def assert_lists(block_mask: BlockMask, shape: tuple[int, ...]) -> None:
    """NOTE [Lists]: int32, contiguous, ascending, partial and full of the same shape."""
    for number, index in (
        (block_mask.kv_num_blocks, block_mask.kv_indices),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    ):
        assert number is not None
        assert index is not None
        assert (tuple(number.shape), tuple(index.shape)) == (shape[:-1], shape)
        assert number.dtype == index.dtype == torch.int32
        assert number.is_contiguous()
        assert index.is_contiguous()
        listed = torch.arange(shape[-1], device=index.device) < number[..., None]
        rises = index[..., 1:] > index[..., :-1]
        assert bool((rises | ~listed[..., 1:]).all()), "not ascending"
        assert bool(((index >= 0) & (index < shape[-1])).all()), "out of range"


# ------------------------------------------------------------------------------------------------------ lists


@pytest.mark.parametrize("lengths", [(256, 256), (128, 512), (300, 300), (129, 515)])
@pytest.mark.parametrize("kind", ["default", "padding", "window", "head", "batch"])
def test_lists_of_build(kind: str, lengths: tuple[int, int], device: str) -> None:
    """What ``build`` gives keeps to NOTE [Lists], with as many heads as q, and covers the true lengths."""
    q, k = tensors(device, *lengths)
    offset = lengths[1] - lengths[0]
    real = torch.arange(lengths[1], device=device) >= torch.tensor([[0], [140]], device=device)
    mask_mods: dict[str, MaskMod | None] = {
        "default": None,
        "padding": masks.shift(and_masks(masks.causal, masks.padding(real)), offset),
        "window": masks.shift(masks.sliding_window(100), offset),
        "head": masks.shift(head_mask(device), offset),
        "batch": batch_mask(device),
    }
    num_q_blocks, num_blocks = -(-lengths[0] // 128), -(-lengths[1] // 128)
    for config in (CONFIG, ProxyConfig()):
        block_mask = flexproxy.build(q, k, mask_mod=mask_mods[kind], config=config)
        assert_lists(block_mask, (2, HEADS, num_q_blocks, num_blocks))
        assert seq_lengths_of(block_mask) in (None, lengths)
        assert tuple(block_mask.BLOCK_SIZE) == (128, 128)
        assert not bool((partial_blocks(block_mask, num_blocks) & full_blocks(block_mask, num_blocks)).any())


@pytest.mark.parametrize("dims", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_maps_to_lists_and_back(dims: tuple[int, int], device: str) -> None:
    """Any map of blocks survives the lists; a block that is full but not kept is dropped; rows may be empty."""
    generator = torch.Generator().manual_seed(sum(dims))
    kept = torch.rand(*dims, 5, 7, generator=generator).to(device) > 0.5
    kept[:, :, 2] = False
    for full_dims in {dims, (1, 1)}:
        full = torch.rand(*full_dims, 5, 7, generator=generator).to(device) > 0.5
        block_mask = compile_block_mask(kept, full, masks.full, 64, (300, 401), True)
        assert_lists(block_mask, (*dims, 5, 7))
        assert torch.equal(partial_blocks(block_mask, 7), (kept & ~full).cpu())
        assert torch.equal(full_blocks(block_mask, 7), (kept & full).cpu())
        some, whole = dense_maps(block_mask, 5, 7)
        assert torch.equal(some, kept)
        assert torch.equal(whole, kept & full)
        assert torch.equal(block_mask.to_dense().bool(), kept)


def q_lists(block_mask: BlockMask) -> list[Any]:
    names = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
    return [getattr(block_mask, name) for name in names]


@pytest.mark.parametrize("trained", ["none", "q", "k", "both"])
@pytest.mark.parametrize("grad", [True, False])
def test_lists_for_gradients(trained: str, grad: bool, device: str) -> None:
    """The transposed lists are made exactly when q or k requires a gradient, and are those that torch makes."""
    q, k = tensors(device, 256, 256)
    q.requires_grad_(trained in ("q", "both"))
    k.requires_grad_(trained in ("k", "both"))
    with torch.set_grad_enabled(grad):
        block_mask = flexproxy.build(q, k, config=CONFIG)
    wanted = (trained != "none" and grad) or not CAN_LEAVE_OUT_Q_LISTS
    assert [x is not None for x in q_lists(block_mask)] == [wanted] * 4
    if wanted:
        torch_made = BlockMask.from_kv_blocks(
            block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.full_kv_num_blocks, block_mask.full_kv_indices
        )
        for got, want in zip(q_lists(block_mask), q_lists(torch_made), strict=True):
            assert torch.equal(got, want)
    assert not any(x.requires_grad for x in (block_mask.kv_indices, block_mask.kv_num_blocks))


@pytest.mark.skipif(not CAN_LEAVE_OUT_Q_LISTS, reason="this torch always makes the lists for gradients")
@pytest.mark.parametrize("trained", ["q", "k", "v", "none"])
def test_lists_for_gradients_in_attention(trained: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``attention`` gives torch the transposed lists whenever it must have them: also where v alone is trained."""
    seen: list[BlockMask] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, **options: object) -> Tensor:
        seen.append(block_mask)
        return q

    monkeypatch.setattr(sparse_kernel, "compiled_flex_attention", lambda *variant: kernel)
    monkeypatch.setattr("flexproxy.sparse.plan.check_attention_options", lambda *args: None)
    monkeypatch.setattr("flexproxy.sparse.attention.plan_attention", inspect.unwrap(plan_attention))  # keeps nothing
    (q, k), (_, v) = tensors(device, 256, 256), tensors(device, 256, 256)
    if trained != "none":
        {"q": q, "k": k, "v": v}[trained].requires_grad_()
    for mask_mod, config in ((masks.causal, CONFIG), (masks.full, ProxyConfig(gamma=1.0))):  # sparse, and dense
        flexproxy.attention(q, k, v, mask_mod=mask_mod, config=config, when="always")
    assert [block_mask.q_indices is not None for block_mask in seen] == [trained != "none"] * 2


def test_dense_maps_of_garbage(device: str) -> None:
    """Entries behind a row's count mean nothing, be they repeated, negative or out of range."""
    number = torch.tensor([[[2, 0, 3]]], dtype=torch.int32, device=device)
    index = torch.tensor([[[[0, 2, -7, 99], [1, 1, 1, 1], [3, 0, 1, 2**31 - 1]]]], dtype=torch.int32, device=device)
    block_mask = BlockMask.from_kv_blocks(number.clone(), index.clamp(0, 3), mask_mod=masks.full)
    block_mask.kv_indices = index
    some, full = dense_maps(block_mask, 3, 4)
    want = [[[[True, False, True, False], [False] * 4, [True, True, False, True]]]]
    assert some.tolist() == want
    assert not bool(full.any())


def test_dense_maps_of_more_rows_and_columns(device: str) -> None:
    """Lists may have more rows than there are query blocks, and fewer or more columns than key blocks."""
    number = torch.tensor([[[1, 2, 1, 1]]], dtype=torch.int32, device=device)
    index = torch.tensor([[[[2, 0], [0, 1], [0, 0], [0, 0]]]], dtype=torch.int32, device=device)
    block_mask = BlockMask.from_kv_blocks(number, index.clamp(max=1), number, index.clamp(max=1), mask_mod=masks.full)
    block_mask.kv_indices = index
    some, full = dense_maps(block_mask, 2, 3)
    assert some.tolist() == [[[[False, True, True], [True, True, False]]]]
    assert full.tolist() == [[[[False, True, False], [True, True, False]]]]


@pytest.mark.skipif(not CAN_LEAVE_OUT_FULL_LISTS, reason="this torch always separates full blocks")
def test_a_mask_without_full_lists(device: str) -> None:
    """A BlockMask made with ``separate_full_blocks=False`` has no full blocks, and is read so everywhere."""
    q, k = tensors(device, 300, 300)
    make: Any = create_block_mask
    whole = make(masks.causal, None, None, 300, 300, device=device, separate_full_blocks=False)
    assert whole.full_kv_num_blocks is None
    some, full = dense_maps(whole, 3, 3)
    assert some.tolist() == [[[[True, False, False], [True, True, False], [True, True, True]]]]
    assert not bool(full.any())

    both = and_block_masks(whole, create_block_mask(masks.full, None, None, 300, 300, device=device))
    assert torch.equal(partial_blocks(both, 3), some.cpu())
    assert not bool(full_blocks(both, 3).any())

    given, default = flexproxy.build(q, k, block_mask=whole, config=CONFIG), flexproxy.build(q, k, config=CONFIG)
    assert torch.equal(given.to_dense(), default.to_dense())
    assert torch.equal(partial_blocks(given, 3), partial_blocks(default, 3))
    assert torch.equal(full_blocks(given, 3), full_blocks(default, 3))  # as its function says


# -------------------------------------------------------------------------------------------- and_block_masks


@pytest.mark.parametrize(("lengths", "block_size"), [((256, 384), 128), ((300, 300), 128), ((130, 515), 64)])
@pytest.mark.parametrize(
    ("dims_a", "dims_b"), list(combinations_with_replacement([(1, 1), (2, 1), (1, HEADS), (2, HEADS)], 2))
)
def test_and_block_masks(
    dims_a: tuple[int, int], dims_b: tuple[int, int], lengths: tuple[int, int], block_size: int, device: str
) -> None:
    """The intersection is the mask that torch makes of the conjunction: dense form, partial and full blocks, tokens.

    A block can be partial in the intersection that is empty at token level: two masks may meet in a block and share
    no token of it. Torch drops such a block. Here only whole blocks are compared, so the masks below share no such one.
    """
    needs_lengths(lengths, block_size)
    offset = lengths[1] - lengths[0]
    a_mod = masks.shift(head_mask(device) if dims_a[1] > 1 else masks.causal, offset)
    b_mod = batch_mask(device) if dims_b[0] > 1 else masks.full
    if dims_a[0] > 1:
        a_mod = and_masks(a_mod, batch_mask(device))
    if dims_b[1] > 1:
        b_mod = and_masks(b_mod, masks.shift(head_mask(device), offset))

    def make(mask_mod: MaskMod, dims: tuple[int, int]) -> BlockMask:
        return create_block_mask(mask_mod, *dims, *lengths, device=device, BLOCK_SIZE=block_size)

    dims = max(dims_a[0], dims_b[0]), max(dims_a[1], dims_b[1])
    want = make(and_masks(a_mod, b_mod), dims)
    num_q_blocks, num_blocks = -(-lengths[0] // block_size), -(-lengths[1] // block_size)
    a, b = make(a_mod, dims_a), make(b_mod, dims_b)
    for got in (and_block_masks(a, b), and_block_masks(b, a)):
        assert_lists(got, (*dims, num_q_blocks, num_blocks))
        assert tuple(got.BLOCK_SIZE) == (block_size, block_size)
        assert seq_lengths_of(got) == seq_lengths_of(want)
        assert_same(got, want, num_blocks)
    tokens = [reference.token_mask(x.mask_mod, *dims, *lengths, device) for x in (got, want)]
    assert torch.equal(*tokens)


def test_and_block_masks_of_blocks_without_common_tokens(device: str) -> None:
    """Block by block: a block in which both have tokens stays, though none is common, and its tokens are none."""
    block_mask = and_block_masks(
        create_block_mask(lambda b, h, q, k: (q + k) % 2 == 0, None, None, 128, 128, device=device),
        create_block_mask(lambda b, h, q, k: (q + k) % 2 == 1, None, None, 128, 128, device=device),
    )
    assert partial_blocks(block_mask, 1).tolist() == [[[[True]]]]
    assert not bool(full_blocks(block_mask, 1).any())
    assert not bool(reference.token_mask(block_mask.mask_mod, 1, 1, 128, 128, device).any())


@pytest.mark.parametrize("lengths", [(256, 256), (300, 300), (128, 384)])
def test_and_block_masks_with_build(lengths: tuple[int, int], device: str) -> None:
    """A selection of ``build`` meets another mask: kept where both are, full where both are full, as the tokens say."""
    needs_lengths(lengths, 128)
    q, k = tensors(device, *lengths)
    offset, num_blocks = lengths[1] - lengths[0], -(-lengths[1] // 128)
    built = flexproxy.build(q, k, config=CONFIG)
    assert not bool(built.to_dense().bool().all())
    real = torch.arange(lengths[1], device=device) >= torch.tensor([[0], [200]], device=device)
    other_mod = masks.shift(masks.padding(real), offset)
    other = create_block_mask(other_mod, 2, None, *lengths, device=device)
    both = and_block_masks(built, other)
    assert_lists(both, tuple(built.kv_indices.shape))
    assert torch.equal(full_blocks(both, num_blocks), full_blocks(built, num_blocks) & full_blocks(other, num_blocks))
    assert torch.equal(both.to_dense().bool(), built.to_dense().bool() & other.to_dense().bool())
    allowed = reference.token_mask(and_masks(built.mask_mod, other_mod), 2, HEADS, *lengths, device)
    assert torch.equal(reference.token_mask(both.mask_mod, 2, HEADS, *lengths, device), allowed)
    some, full = reference.classify(allowed.cpu(), 128)
    assert not bool((some & ~both.to_dense().bool().cpu()).any()), "a block with tokens is missing"
    assert torch.equal(full_blocks(both, num_blocks), full)


@pytest.mark.skipif(not CAN_LEAVE_OUT_Q_LISTS, reason="this torch always makes the lists for gradients")
def test_and_block_masks_and_gradients(device: str) -> None:
    """The intersection has lists for gradients if one of the two has them."""
    q, k = tensors(device, 256, 256)
    without = flexproxy.build(q, k, config=CONFIG)
    assert without.q_indices is None
    having = create_block_mask(masks.causal, None, None, 256, 256, device=device)
    assert and_block_masks(without, without).q_indices is None
    for both in (and_block_masks(without, having), and_block_masks(having, without)):
        assert all(x is not None for x in q_lists(both))


# -------------------------------------------------------------------------------------------------- membership


def test_membership_is_the_block_map(device: str) -> None:
    """Membership allows exactly the token pairs in kept blocks."""
    generator = torch.Generator().manual_seed(5)
    blocks = (torch.rand(2, 3, 4, 5, generator=generator) > 0.5).to(device)
    got = reference.token_mask(membership(blocks, 16), 2, 3, 4 * 16, 5 * 16, device)
    assert torch.equal(got, blocks.repeat_interleave(16, 2).repeat_interleave(16, 3))


def test_membership_refuses_what_32_bits_cannot_address() -> None:
    """Compiled kernels address the map with 32 bits: 2**31 block pairs (32 heads, 1M tokens) are the most that fit."""
    with pytest.raises(ValueError) as caught:
        membership(torch.empty(1, 32, 8192, 8193, dtype=torch.bool, device="meta"), 128)
    assert str(caught.value) == (
        "block_size: expected at most 2**31 block pairs in all, got [1, 32, 8192, 8193] = 2147745792 with blocks of "
        "128; use a larger block_size, or fewer sequences a call"
    )
    member = membership(torch.empty(1, 32, 8192, 8192, dtype=torch.bool, device="meta"), 128)
    index = torch.zeros(3, dtype=torch.int64, device="meta")
    assert member(index, index, index, index).shape == (3,)


# ------------------------------------------------------------------------------------------ what a caller has set


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_makes_no_difference(dtype: torch.dtype, device: str) -> None:
    """Scores and budgets are computed in fp32, also where a training loop has autocast on."""
    q, k = tensors(device, 1500, 1500)
    config = ProxyConfig(gamma=0.8, min_budget=0, block_size=32)
    plain = flexproxy.select(q, k, config=config)
    with torch.autocast(device, dtype=dtype):
        under_autocast = flexproxy.select(q, k, config=config)
    assert torch.equal(under_autocast.rank, plain.rank)
    assert torch.equal(under_autocast.count, plain.count)


def test_defaults_make_no_difference(device: str) -> None:
    """A default dtype or device of the caller's changes nothing."""
    q, k = tensors(device, 500, 500)
    config = ProxyConfig(density=0.6, min_budget=0, block_size=32)
    plain = flexproxy.select(q, k, config=config)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            other = flexproxy.select(q, k, config=config)
            density = other.density()
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(other.rank, plain.rank)
    assert torch.equal(other.count, plain.count)
    assert density.dtype == torch.float32
    assert torch.equal(density, plain.density())
