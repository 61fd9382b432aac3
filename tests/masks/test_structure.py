"""What masks know of themselves: positions, labels, recipes; what far and negative positions mean; bad arguments."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flexproxy
from flexproxy import ProxyConfig, masks, reference
from flexproxy.masks.mods import MAX_OFFSET
from flexproxy.masks.structure import MaskMod, Recipe, documents_of, recipe_of, structure_of
from tests.accuracy import assert_accurate, skip_unless_flex_compiles
from tests.lists import full_blocks, partial_blocks

BATCH, LENGTH, BLOCK = 2, 100, 16


def all_masks(device: str) -> dict[str, MaskMod]:
    """Every mask; of each some row allows some key."""
    place = torch.arange(LENGTH, device=device)
    ids = torch.stack([place // 30, place % 3])
    real = place >= torch.tensor([[0], [7]], device=device)
    prefix = torch.tensor([50, 3], device=device)
    return {
        "causal": masks.causal,
        "full": masks.full,
        "window": masks.sliding_window(9),
        "window tensor": masks.sliding_window(torch.tensor(9, device=device)),
        "document": masks.document(ids[0]),
        "documents": masks.document(ids),
        "padding": masks.padding(real),
        "prefix": masks.prefix_lm(prefix),
        "shift": masks.shift(masks.full, torch.tensor([1, 0], device=device)),
        "and": masks.and_masks(masks.document(ids), masks.prefix_lm(prefix)),
        "or": masks.or_masks(masks.padding(real), masks.sliding_window(3)),
        "torch's and": flex.and_masks(masks.full, masks.document(ids)),
    }


def check_build(mask_mod: MaskMod, allowed: Tensor, device: str) -> None:
    """``build`` lists the blocks of the tokens ``[B, 1, Sq, Skv]``."""
    q, k = torch.zeros(BATCH, 1, allowed.shape[2], 16, device=device), torch.zeros(BATCH, 1, LENGTH, 16, device=device)
    block_mask = flexproxy.build(q, k, mask_mod=mask_mod, config=ProxyConfig(block_size=BLOCK, gamma=1.0))
    some, full = reference.classify(allowed.cpu(), BLOCK)
    assert torch.equal(partial_blocks(block_mask, some.shape[-1]), some & ~full)
    assert torch.equal(full_blocks(block_mask, some.shape[-1]), full)


# ------------------------------------------------------------------------------------------------ positions


def test_a_conjunction_stands_where_its_parts_stand(device: str) -> None:
    """A row of ``and_masks(m, m)`` keeps its own blocks, as one of ``m`` does, whatever the mask allows behind them."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, n, 32, generator=generator).to(device) for n in (256, 2048))
    config = ProxyConfig(gamma=1e-6, min_budget=0, sink_blocks=0, local_blocks=1)
    one = masks.shift(masks.prefix_lm(torch.tensor([1536], device=device)), 128)
    alone = flexproxy.select(q, k, mask_mod=one, config=config)
    assert alone.block_map()[0, 0, [0, 1], [1, 2]].tolist() == [True, True]
    for both in (masks.and_masks(one, one), flex.and_masks(one, one), masks.and_masks(one, masks.full)):
        selection = flexproxy.select(q, k, mask_mod=both, config=config)
        assert torch.equal(selection.rank, alone.rank)
        assert torch.equal(selection.block_map(), alone.block_map())


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", all_masks("cpu"))
def test_before_the_first_key_nothing_is_seen(name: str, as_tensor: bool, device: str) -> None:
    """In the function and in the lists; no table is read from its end."""
    inner = all_masks(device)[name]
    back = torch.tensor([40, 40], device=device) if as_tensor else 40
    mask_mod = masks.shift(inner, -back)
    allowed = reference.token_mask(mask_mod, BATCH, 1, LENGTH, LENGTH, device)
    assert not bool(allowed[:, :, : 39 if name == "shift" else 40].any())
    unshifted = reference.token_mask(inner, BATCH, 1, LENGTH, LENGTH, device)
    assert bool(unshifted.any())
    assert torch.equal(allowed[:, :, 40:], unshifted[:, :, :60])
    check_build(mask_mod, allowed, device)
    there_and_back = reference.token_mask(masks.shift(mask_mod, back), BATCH, 1, LENGTH, LENGTH, device)
    assert torch.equal(there_and_back, unshifted)


FAR = [2**31 - 1, 2**31, 2**63 - 1, MAX_OFFSET, 2 * LENGTH, LENGTH + 1024]


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("by", [*FAR, *(-by for by in FAR), -(2**63)])
def test_far_positions(by: int, as_tensor: bool, device: str) -> None:
    """A shift beyond all tables is one, by the 32 bits of a compiled kernel as by 64; twice as well."""
    index = torch.arange(LENGTH, dtype=torch.int32, device=device)
    b, h = torch.arange(BATCH, dtype=torch.int32, device=device)[:, None, None], index[:1]
    for name, inner in all_masks(device).items():
        offset = torch.full((BATCH,), by, device=device) if as_tensor else by
        once = masks.shift(inner, offset)
        twice = masks.shift(masks.and_masks(once, once), offset)
        for mask_mod in (once, twice):
            allowed = reference.token_mask(mask_mod, BATCH, 1, LENGTH, LENGTH, device)
            if by > 0:  # behind everything
                sees_all = name in ("causal", "full", "prefix", "shift")
                assert bool((allowed == sees_all).all()), name
            else:
                assert not bool(allowed.any()), name
            narrow = mask_mod(b, h, index[:, None], index)
            assert torch.equal(narrow.expand(BATCH, LENGTH, LENGTH), allowed[:, 0]), name
            check_build(mask_mod, allowed, device)


def test_the_largest_uint64_is_no_negative_offset(device: str) -> None:
    offset = torch.tensor([2**64 - 1, 3], dtype=torch.uint64, device=device)
    mask_mod = masks.shift(masks.causal, offset)
    allowed = reference.token_mask(mask_mod, BATCH, 1, 20, LENGTH, device)
    assert bool(allowed[0].all())
    assert torch.equal(allowed[1, 0], torch.ones_like(allowed[1, 0]).tril(3))
    check_build(mask_mod, allowed, device)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_ids(dtype: torch.dtype, device: str) -> None:
    """Any two ids differ, the largest ones too, and none of them is padding."""
    largest = torch.iinfo(dtype).max
    numbers = [0, largest, largest - 1, largest // 2, largest // 2 + 1, 0, largest] * 5
    ids = torch.tensor(numbers, dtype=dtype, device=device)
    same = torch.tensor([[x == y for y in numbers] for x in numbers])
    for table in (ids, torch.stack([ids, ids])):
        mask_mod = masks.document(table)
        allowed = reference.token_mask(mask_mod, BATCH, 1, len(numbers), len(numbers), device)
        assert torch.equal(allowed.cpu(), same.expand_as(allowed))
        q = torch.zeros(BATCH, 1, len(numbers), 16, device=device)
        block_mask = flexproxy.build(q, q, mask_mod=mask_mod, config=ProxyConfig(block_size=16, gamma=1.0))
        some, full = reference.classify(allowed.cpu(), 16)
        assert torch.equal(partial_blocks(block_mask, 3) | full_blocks(block_mask, 3), some)
        assert torch.equal(full_blocks(block_mask, 3), full)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_attention_at_negative_positions(compiled: bool, device: str) -> None:
    """Rows before the first key have the output 0, eager and compiled."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 256, 32, generator=generator).to(device) for _ in range(3))
    both = torch.tensor([-128], device=device)
    mask_mod = masks.and_masks(
        masks.shift(masks.document(torch.arange(256, device=device) // 200), -128), masks.shift(masks.full, both)
    )
    allowed = reference.token_mask(mask_mod, 1, 2, 256, 256, device)
    assert bool(allowed[:, :, 128:].any(-1).all())
    block_mask = flexproxy.build(q, k, mask_mod=mask_mod, config=ProxyConfig(gamma=1.0))
    assert isinstance(block_mask.kv_num_blocks, Tensor)
    if compiled:
        skip_unless_flex_compiles(device)
        out = torch.compile(flex_attention, dynamic=False)(q, k, v, block_mask=block_mask)
    else:
        out = flex_attention(q, k, v, block_mask=block_mask)
    assert bool((out[:, :, :128] == 0).all())
    assert_accurate(out, q, k, v, allowed)


# ------------------------------------------------------------------------------------------------ labels, recipes


def test_documents(device: str) -> None:
    """A conjunction has the labels of its parts, a shift those of its positions, a disjunction none."""
    place = torch.arange(LENGTH, device=device)
    first, second = masks.document(place // 30), masks.document(torch.stack([place % 2, place % 3 - 1]))
    unknown = masks.or_masks(first, masks.causal)
    cases: list[tuple[MaskMod, MaskMod | None]] = [
        (masks.causal, None),
        (unknown, None),
        (first, first),
        (masks.and_masks(masks.causal, first), first),
        (masks.and_masks(unknown, second, masks.sliding_window(3)), second),
        (masks.and_masks(first, lambda b, h, q, k: q >= k), first),
        (
            masks.shift(masks.and_masks(masks.causal, first, second), -7),
            masks.shift(masks.and_masks(first, second), -7),
        ),
    ]
    for i, (mask_mod, wanted) in enumerate(cases):
        labels = documents_of(structure_of(mask_mod), LENGTH, LENGTH, torch.device(device))
        assert (labels is None) == (wanted is None), f"case {i}"
        if labels is not None and wanted is not None:
            of_query, of_key = labels
            assert of_query.dim() == of_key.dim() == 2
            same = (of_query[:, :, None] == of_key[:, None]) & (of_query >= 0)[:, :, None]
            allowed = reference.token_mask(wanted, BATCH, 1, LENGTH, LENGTH, device)[:, 0]
            assert torch.equal(same.expand_as(allowed), allowed), f"case {i}"


def everything_third(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return kv_idx % 3 == 0


@pytest.mark.parametrize("name", [*all_masks("cpu"), "a function of a module"])
def test_recipes(name: str, device: str) -> None:
    """A mask is made again from its recipe, which can be pickled: the same tokens, clauses and position."""
    known = all_masks(device) | {"a function of a module": masks.and_masks(masks.causal, everything_third)}
    mask_mod = masks.shift(known[name], torch.tensor([5, 0], device=device))
    recipe = pickle.loads(pickle.dumps(recipe_of(mask_mod)))
    assert isinstance(recipe, Recipe)
    again = recipe.make()
    tokens = [reference.token_mask(m, BATCH, 1, 60, LENGTH, device) for m in (mask_mod, again)]
    assert torch.equal(*tokens)
    structures = structure_of(mask_mod), structure_of(again)
    assert (structures[0].clauses is None) == (structures[1].clauses is None)
    assert torch.equal(*(structure.offset(40, torch.device(device)) for structure in structures))


def test_what_has_no_recipe() -> None:
    for mask_mod in (lambda b, h, q, k: q >= k, masks.and_masks(masks.causal, lambda b, h, q, k: q >= k)):
        with pytest.raises(TypeError, match=r"^mask_mod: expected a mask that can be pickled, got .*<lambda>; use"):
            recipe_of(mask_mod)


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("combine", [masks.and_masks, masks.or_masks])
def test_bad_arguments(combine: Callable[..., MaskMod]) -> None:
    name = combine.__name__
    block_mask = create_block_mask(masks.causal, None, None, 128, 128, device="cpu")
    bad: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        (
            (),
            ValueError,
            f"{name}: expected at least one mask, got none; for a mask that allows everything use masks.full",
        ),
        (
            (masks.causal, block_mask),
            TypeError,
            f"{name}, argument 1: expected a function, got a BlockMask; pass its mask_mod, or combine BlockMasks with "
            "flexproxy.and_block_masks",
        ),
        (
            ([masks.causal, masks.full],),
            TypeError,
            f"{name}, argument 0: expected a function of (b, h, q_idx, kv_idx), got list; pass masks one by one, for "
            f"example {name}(masks.causal, masks.sliding_window(1024))",
        ),
        (
            (masks.causal, masks.sliding_window),
            TypeError,
            f"{name}, argument 1: expected a function of (b, h, q_idx, kv_idx), got sliding_window(window: 'int | "
            "Tensor') -> 'MaskMod'; masks with parameters are made by a call, for example masks.sliding_window(1024)",
        ),
    ]
    for arguments, kind, message in bad:
        with pytest.raises(kind) as caught:
            combine(*arguments)
        assert str(caught.value) == message


def test_one_mask_is_that_mask(device: str) -> None:
    for combine in (masks.and_masks, masks.or_masks):
        for name, mask_mod in all_masks(device).items():
            tokens = [reference.token_mask(m, BATCH, 1, 30, LENGTH, device) for m in (mask_mod, combine(mask_mod))]
            assert torch.equal(*tokens), name
