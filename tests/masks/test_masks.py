"""Masks that know their blocks: what each allows, and that its blocks are told exactly without evaluating tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask, flex_attention, noop_mask

import flexproxy
from flexproxy import ProxyConfig, masks, reference
from flexproxy.masks import and_masks, blocks, or_masks, sampled
from flexproxy.masks.blocks import classify_by_evaluation, classify_clauses, depends_on
from flexproxy.masks.clauses import Clause, stack
from flexproxy.masks.sampled import SampledMask, pack_bits, uncertain
from flexproxy.masks.structure import MaskMod, attach, clauses_of, structure_of
from flexproxy.ops.compat import seq_lengths_of
from tests.accuracy import assert_accurate
from tests.lists import full_blocks, partial_blocks
from tests.trees import HEADS, Tree

NUM_CASES, CASES_PER_TEST = 80, 20


# ----------------------------------------------------------------------------------------------- what a mask allows

DOCUMENTS = [3, 3, 0, -1, 0, 3, 7, -1]
REAL = [[1, 0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 1]]
PREFIX = [3, 0]
OFFSET = [2, 1]
Meaning = Callable[[int, int, int], bool]


def meanings(device: str) -> dict[str, tuple[MaskMod, Meaning]]:
    """Every mask, and its definition over (sequence, query, key) in plain Python."""
    ids, real = torch.tensor(DOCUMENTS, device=device), torch.tensor(REAL, device=device)
    prefix, offset = torch.tensor(PREFIX, device=device), torch.tensor(OFFSET, device=device)
    both = torch.stack([ids, ids.flip(0)])
    window = masks.sliding_window(3)
    return {
        "causal": (masks.causal, lambda b, q, k: q >= k),
        "full": (masks.full, lambda b, q, k: True),
        "window": (window, lambda b, q, k: 0 <= q - k < 3),
        "window tensor": (masks.sliding_window(torch.tensor(1, device=device)), lambda b, q, k: q == k),
        "document": (masks.document(ids), lambda b, q, k: DOCUMENTS[q] == DOCUMENTS[k] >= 0),
        "documents": (
            masks.document(both),
            lambda b, q, k: DOCUMENTS[:: [1, -1][b]][q] == DOCUMENTS[:: [1, -1][b]][k] >= 0,
        ),
        "padding": (masks.padding(real), lambda b, q, k: REAL[b][q] == REAL[b][k] == 1),
        "padding bool": (masks.padding(real.bool()), lambda b, q, k: REAL[b][q] == REAL[b][k] == 1),
        "padding of other values": (masks.padding(-5 * real), lambda b, q, k: REAL[b][q] == REAL[b][k] == 1),
        "prefix": (masks.prefix_lm(prefix), lambda b, q, k: q >= k or k < PREFIX[b]),
        "shift": (masks.shift(window, 2), lambda b, q, k: 0 <= q + 2 - k < 3),
        "shift back": (masks.shift(masks.causal, -2), lambda b, q, k: q - 2 >= k),
        "shift tensor": (masks.shift(window, torch.tensor(2, device=device)), lambda b, q, k: 0 <= q + 2 - k < 3),
        "shift of each": (masks.shift(masks.causal, offset), lambda b, q, k: q + OFFSET[b] >= k),
        "shift twice": (masks.shift(masks.shift(masks.causal, offset), 1), lambda b, q, k: q + OFFSET[b] + 1 >= k),
        "shift of a closure": (masks.shift(lambda b, h, q, k: q == k, offset), lambda b, q, k: q + OFFSET[b] == k),
        "and": (
            and_masks(masks.causal, masks.document(ids)),
            lambda b, q, k: q >= k and DOCUMENTS[q] == DOCUMENTS[k] >= 0,
        ),
        "or": (or_masks(window, masks.prefix_lm(prefix)), lambda b, q, k: q >= k or k < PREFIX[b]),
    }


@pytest.mark.parametrize("name", meanings("cpu"))
def test_what_a_mask_allows(name: str, device: str) -> None:
    """Token by token, each mask is its definition in API.md, evaluated and by its clauses."""
    mask_mod, meaning = meanings(device)[name]
    num_queries, num_keys = (6 if "shift" in name else 8), 8
    want = torch.tensor([[[[meaning(b, q, k) for k in range(num_keys)] for q in range(num_queries)]] for b in range(2)])
    assert torch.equal(reference.token_mask(mask_mod, 2, 1, num_queries, num_keys, device).cpu(), want)
    clauses = clauses_of(structure_of(mask_mod), num_queries, num_keys, torch.device(device))
    assert (clauses is None) == ("closure" in name)
    if clauses is not None:
        got = from_clauses(clauses, num_queries, num_keys)
        assert torch.equal(got.expand_as(want), want)


# ------------------------------------------------------------------------------------------- classification, random


def from_clauses(clauses: tuple[Clause, ...], num_queries: int, num_keys: int) -> Tensor:
    """The token pairs that clauses allow, bool ``[b, 1, Sq, Skv]``, on the CPU."""
    return SampledMask(*stack(clauses)).chunk(slice(0, num_queries), slice(0, num_keys)).cpu()


def check_clauses(
    mask_mod: MaskMod, clauses: tuple[Clause, ...], batch: int, lengths: tuple[int, int], size: int
) -> None:
    """Blocks and rows told by clauses are those of the mask at token level, exactly."""
    device = clauses[0].lo.device
    allowed = reference.token_mask(mask_mod, batch, 1, *lengths, str(device)).cpu()
    assert torch.equal(from_clauses(clauses, *lengths).expand_as(allowed), allowed), "tokens"
    some, full = reference.classify(allowed, size)
    got = classify_clauses(stack(clauses), lengths[1], size)
    assert torch.equal(got.any.cpu().expand_as(some), some), "any"
    assert torch.equal(got.full.cpu().expand_as(full), full), "full"
    valid = allowed.any(-1)
    assert torch.equal(got.valid.cpu().expand_as(valid), valid), "valid"


def check_evaluation(
    mask_mod: MaskMod,
    batch: int,
    heads: int,
    lengths: tuple[int, int],
    size: int,
    strides: tuple[int, int],
    device: str,
) -> None:
    """The same for evaluation, and the bits it keeps are the sampled token pairs."""
    allowed = reference.token_mask(mask_mod, batch, heads, *lengths, device).cpu()
    on_batch, on_head = depends_on(mask_mod, torch.device(device))
    shape = batch if on_batch else 1, heads if on_head else 1, *lengths
    got, bits = classify_by_evaluation(mask_mod, shape, size, strides, lambda x: x, torch.device(device))
    some, full = reference.classify(allowed, size)
    assert torch.equal(got.any.cpu().expand_as(some), some), "any"
    assert torch.equal(got.full.cpu().expand_as(full), full), "full"
    valid = allowed.any(-1)
    assert torch.equal(got.valid.cpu().expand_as(valid), valid), "valid"
    sampled = allowed[:, :, :: strides[0], :: strides[1]]
    every = slice(0, sampled.shape[2]), slice(0, sampled.shape[3])
    assert torch.equal(bits.chunk(*every, strides[1]).cpu().expand_as(sampled), sampled), "bits"


@pytest.mark.parametrize("first", range(0, NUM_CASES, CASES_PER_TEST))
def test_random_trees(first: int, device: str) -> None:
    """Counted where it has few clauses, else evaluated: the blocks and rows of a tree are those of its tokens."""
    for seed in range(first, first + CASES_PER_TEST):
        tree = Tree(seed, device)
        mask_mod, lengths = tree.root.mask_mod, tree.lengths
        clauses = clauses_of(structure_of(mask_mod), *lengths, torch.device(device))
        try:
            if clauses is not None:
                check_clauses(mask_mod, clauses, tree.batch, lengths, tree.block_size)
            if clauses is None or seed % 4 == 0:
                check_evaluation(mask_mod, tree.batch, HEADS, lengths, tree.block_size, (8, 4), device)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {tree.root.text}: {error}") from error


@pytest.mark.parametrize("step", [0, 5, 25])
def test_documents_that_no_key_is_in(step: int, device: str) -> None:
    """Queries behind the keys may lie in documents of their own, and then see nothing."""
    place = torch.arange(70, device=device)
    first, second = masks.document(place // 3 * 10), masks.document(place // 7)
    for inner in (first, and_masks(first, second), or_masks(first, second), and_masks(first, masks.causal, second)):
        mask_mod = masks.shift(inner, step)
        clauses = clauses_of(structure_of(mask_mod), 40, 40, torch.device(device))
        assert clauses is not None
        check_clauses(mask_mod, clauses, 1, (40, 40), 16)


@pytest.mark.parametrize("seed", range(6))
def test_chunks_make_no_difference(seed: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted and evaluated one row of blocks at a time, the blocks are the same."""
    batch, size = seed % 3 + 1, [16, 32][seed % 2]
    lengths = 9 * size + 3, 9 * size + 20
    ids = torch.randint(-1, 3, (batch, 900), generator=torch.Generator().manual_seed(seed)).to(device)
    mask_mod = and_masks(masks.shift(masks.causal, 17), masks.shift(masks.document(ids), 17))
    monkeypatch.setattr(blocks, "CHUNK_ELEMENTS", 1)
    for module in (blocks, sampled):
        monkeypatch.setattr(module, "evaluated_elements", lambda device: 1)
    clauses = clauses_of(structure_of(mask_mod), *lengths, torch.device(device))
    assert clauses is not None
    check_clauses(mask_mod, clauses, batch, lengths, size)
    check_evaluation(mask_mod, batch, 1, lengths, size, (8, 4), device)


@pytest.mark.parametrize("window", [1, 40, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_large_windows(window: int, as_tensor: bool, device: str) -> None:
    """A window that means "no window" (sys.maxsize) is one, and does not wrap around."""
    mask_mod = masks.sliding_window(torch.tensor(window, device=device) if as_tensor else window)
    clauses = clauses_of(structure_of(mask_mod), 70, 70, torch.device(device))
    assert clauses is not None
    want = torch.tensor([[[[0 <= q - k < window for k in range(70)] for q in range(70)]]])
    assert torch.equal(from_clauses(clauses, 70, 70), want)
    check_clauses(mask_mod, clauses, 1, (70, 70), 16)


@pytest.mark.parametrize("length", [0, 69, 70, 2**31 - 1, 2**31, 2**40])
def test_large_prefixes(length: int, device: str) -> None:
    """A prefix that covers every key covers every key, however long it is said to be."""
    mask_mod = masks.prefix_lm(torch.tensor([length, 5], device=device))
    clauses = clauses_of(structure_of(mask_mod), 70, 70, torch.device(device))
    assert clauses is not None
    check_clauses(mask_mod, clauses, 2, (70, 70), 16)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes_of_tables(dtype: torch.dtype, device: str) -> None:
    """Tables may come in any integer dtype."""
    place = torch.arange(70, device=device)
    cases = [
        masks.document((place // 20).to(dtype)),
        masks.padding((place[None] > torch.tensor([[3], [50]], device=device)).to(dtype)),
        masks.prefix_lm(torch.tensor([5, 100], device=device).to(dtype)),
        masks.sliding_window(torch.tensor(9, device=device).to(dtype)),
        masks.shift(masks.causal, torch.tensor([3, 7], device=device).to(dtype)),
    ]
    for mask_mod in cases:
        clauses = clauses_of(structure_of(mask_mod), 60, 70, torch.device(device))
        assert clauses is not None
        check_clauses(mask_mod, clauses, 2, (60, 70), 16)


# ----------------------------------------------------------------------------------------------- within build

CONFIG = ProxyConfig.paper(block_size=16, min_budget=0, gamma=0.7)
EVERYTHING = ProxyConfig(block_size=16, gamma=1.0)
LENGTHS = 130, 157


def inputs(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q = 2 * torch.randn(2, 4, LENGTHS[0], 16, generator=generator)
    return q.to(device), torch.randn(2, 2, LENGTHS[1], 16, generator=generator).to(device)


def known_masks(device: str) -> dict[str, MaskMod]:
    place = torch.arange(LENGTHS[1], device=device)
    left = (place >= torch.tensor([[0], [37]], device=device)).long()
    right = place < torch.tensor([[157], [101]], device=device)
    ids = torch.stack([place // 40, place % 3])
    prefix = torch.tensor([0, 60], device=device)
    inner = {
        "causal": masks.causal,
        "full": masks.full,
        "window": masks.sliding_window(33),
        "document": masks.document(ids),
        "one document": masks.document(ids[0]),
        "left padding": masks.padding(left),
        "right padding": masks.padding(right),
        "prefix": masks.prefix_lm(prefix),
        "and": and_masks(masks.causal, masks.document(ids), masks.padding(left)),
        "or": or_masks(masks.sliding_window(20), masks.prefix_lm(prefix), masks.document(ids)),
        "or in and": and_masks(masks.padding(right), or_masks(masks.sliding_window(9), masks.prefix_lm(prefix // 2))),
        "shift in and": and_masks(masks.shift(masks.causal, -5), masks.padding(left)),
    }
    offset = LENGTHS[1] - LENGTHS[0]
    shifted = {name: masks.shift(mask_mod, offset) for name, mask_mod in inner.items()}
    return shifted | {"shift of each": masks.shift(masks.causal, torch.tensor([offset, 3], device=device))}


def closures(device: str) -> dict[str, MaskMod]:
    table = torch.arange(LENGTHS[1], device=device) % 7 > 2
    heads = torch.tensor([True, False, False, True], device=device)
    start = torch.tensor([0, 50], device=device)
    window = masks.sliding_window
    return {
        "closure": lambda b, h, q, k: (q + 27 >= k) & table[k],
        "closure of the batch": lambda b, h, q, k: (q + 27 >= k) & (k >= start[b]),
        "closure of the head": lambda b, h, q, k: (q + 27 >= k) & (heads[h] | (q + 27 - k < 20)),
        "closure of both": lambda b, h, q, k: (q + 27 >= k) & (heads[h] | (k >= start[b])),
        "closure that ignores its arguments": lambda b, h, q, k: torch.ones((), dtype=torch.bool, device=device),
        "closure of nothing": lambda b, h, q, k: q < 0,
        "and of a closure": and_masks(masks.shift(masks.causal, 27), lambda b, h, q, k: table[k] & heads[h]),
        "or of a closure": or_masks(masks.shift(window(9), 27), lambda b, h, q, k: k < start[b]),
        "shift of a closure": masks.shift(lambda b, h, q, k: (q >= k) & table[q], 27),
        "union of four": masks.shift(
            or_masks(window(5), masks.prefix_lm(start), masks.document(table.long()), window(40)), 27
        ),
        "no mask at all": flex.or_masks(),
        "every mask": flex.and_masks(),
        "noop": noop_mask,
    }


def check_build(mask_mod: MaskMod, device: str) -> None:
    """With the whole budget, ``build`` keeps the mask's blocks: partial and full as its tokens make them."""
    q, k = inputs(device)
    allowed = reference.token_mask(mask_mod, 2, 4, *LENGTHS, device).cpu()
    some, full = reference.classify(allowed, 16)
    block_mask = flexproxy.build(q, k, mask_mod=mask_mod, config=EVERYTHING)
    assert torch.equal(partial_blocks(block_mask, 10), some & ~full)
    assert torch.equal(full_blocks(block_mask, 10), full)
    tokens = reference.token_mask(block_mask.mask_mod, 2, 4, *LENGTHS, device).cpu()
    assert torch.equal(tokens, allowed)


@pytest.mark.parametrize("name", known_masks("cpu"))
def test_known_masks_in_build(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A known mask is never evaluated token by token, and gives what evaluating it gives."""
    mask_mod = known_masks(device)[name]
    check_build(mask_mod, device)
    q, k = inputs(device)
    # Behind a closure it is evaluated; the shift there and back keeps where the queries stand.
    offset = structure_of(mask_mod).offset(LENGTHS[1] - LENGTHS[0], torch.device(device)).expand(2)
    hidden = masks.shift(lambda b, h, q, k: mask_mod(b, h, q - offset[b], k), offset)
    if structure_of(mask_mod).packed:  # a closure is one sequence
        of_documents = structure_of(mask_mod).documents
        attach(hidden, dataclasses.replace(structure_of(hidden), documents=of_documents, packed=True))
    assert structure_of(hidden).clauses is None
    evaluated = flexproxy.select(q, k, mask_mod=hidden, config=CONFIG)

    def never(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("a token was evaluated")

    monkeypatch.setattr(sampled, "create_mask", never)
    counted = flexproxy.select(q, k, mask_mod=mask_mod, config=CONFIG)
    assert torch.equal(counted.rank, evaluated.rank)
    assert torch.equal(counted.count, evaluated.count)
    assert torch.equal(counted.block_map(), evaluated.block_map())
    assert torch.equal(counted.density(), evaluated.density())
    flexproxy.build(q, k, mask_mod=mask_mod, config=CONFIG)
    with pytest.raises(AssertionError, match="a token was evaluated"):
        flexproxy.select(q, k, mask_mod=hidden, config=CONFIG)


def test_where_the_queries_stand(device: str) -> None:
    """A mask says at which key query 0 stands, through shifts and nests, and ``build`` keeps the blocks there."""
    q, k = inputs(device)
    each, one = torch.tensor([16, 2], device=device), torch.tensor(9, device=device)
    shift, document = masks.shift, masks.document(torch.zeros(157, dtype=torch.int64, device=device))
    cases: list[tuple[MaskMod, list[int]]] = [
        (masks.causal, [0, 0]),
        (masks.full, [27, 27]),  # not said: aligned at the end
        (document, [27, 27]),
        (lambda b, h, q, k: q >= -1, [27, 27]),
        (shift(masks.full, 5), [5, 5]),
        (shift(lambda b, h, q, k: q >= -1, 5), [5, 5]),
        (shift(shift(masks.causal, 3), 4), [7, 7]),
        (shift(shift(masks.causal, each), one), [25, 11]),
        (shift(shift(masks.causal, 3), each), [19, 5]),
    ]
    # Of a conjunction that of the parts that have one, where they agree; ours and torch's.
    for both in (and_masks, flex.and_masks):
        cases += [
            (both(document, shift(masks.full, 7)), [7, 7]),
            (both(document, lambda b, h, q, k: q >= 0), [27, 27]),
            (both(shift(masks.full, 7), lambda b, h, q, k: q >= 0), [7, 7]),
            (both(shift(masks.full, 7), shift(masks.full, 7)), [7, 7]),
            (both(shift(masks.full, 7), shift(masks.full, one)), [27, 27]),
            (both(shift(masks.full, 9), shift(masks.full, one)), [9, 9]),
            (both(shift(masks.full, one), shift(masks.full, one.clone())), [9, 9]),
            (both(shift(masks.full, each), shift(document, 2)), [27, 2]),
            (both(both(shift(masks.full, each), masks.full), shift(document, each.long())), [16, 2]),
            (both(both(shift(masks.full, 1), shift(masks.full, 2)), shift(document, 1)), [27, 27]),
            (shift(both(document, shift(masks.full, one)), 5), [14, 14]),
            (shift(both(shift(masks.full, 4), shift(masks.full, one)), 5), [5, 5]),
        ]
    # A disjunction does not say.
    for either in (or_masks, flex.or_masks):
        cases += [
            (either(shift(masks.full, 4), shift(masks.full, 4)), [27, 27]),
            (shift(either(shift(masks.full, 4), document), 3), [3, 3]),
        ]
    config = ProxyConfig.paper(block_size=16, min_budget=0, gamma=1e-6)
    for i, (mask_mod, offset) in enumerate(cases):
        stand = torch.arange(LENGTHS[0]) + torch.tensor(offset)[:, None]
        wanted = torch.zeros(2, 9, 10, dtype=torch.bool)
        for b in range(2):
            wanted[b, torch.arange(LENGTHS[0]) // 16, stand[b].clamp(max=LENGTHS[1] - 1) // 16] = True
        admitted, _ = reference.classify(reference.token_mask(mask_mod, 2, 1, *LENGTHS, device).cpu(), 16)
        selection = flexproxy.select(q, k, mask_mod=mask_mod, config=config)
        kept = selection.block_map().cpu()
        missing = (wanted[:, None] & admitted) & ~kept
        assert not bool(missing.any()), f"case {i}"
        # So small a budget holds nothing else: as many blocks as the fullest row is forced to keep.
        most = (wanted[:, None] & admitted).sum(-1).amax(-1).clamp(min=1)
        assert torch.equal(selection.count.cpu(), most.int()[..., None].expand(2, 4, 9)), f"case {i}"


@pytest.mark.parametrize("name", closures("cpu"))
def test_closures_in_build(name: str, device: str) -> None:
    """Whatever is not known is evaluated, and right: closures, of batch and head, and unions of too many clauses."""
    mask_mod = closures(device)[name]
    assert clauses_of(structure_of(mask_mod), *LENGTHS, torch.device(device)) is None
    check_build(mask_mod, device)


def test_what_a_mask_depends_on(device: str) -> None:
    """Batch and head dependence are found, through tables, arithmetic, nests and shifts, and not made up."""
    two, table = torch.tensor([True, False], device=device), torch.ones(2, 9, dtype=torch.bool, device=device)
    ints = torch.tensor([1, 2], device=device)
    batched, single = masks.document(torch.zeros(2, 9, dtype=torch.int64, device=device)), masks.causal
    cases: list[tuple[MaskMod, tuple[bool, bool]]] = [
        (single, (False, False)),
        (masks.full, (False, False)),
        (masks.document(torch.zeros(9, dtype=torch.int64, device=device)), (False, False)),
        (masks.sliding_window(torch.tensor(3, device=device)), (False, False)),
        (masks.shift(single, torch.tensor(3, device=device)), (False, False)),
        (batched, (True, False)),
        (masks.padding(table), (True, False)),
        (masks.prefix_lm(ints), (True, False)),
        (masks.shift(single, ints), (True, False)),
        (masks.shift(batched, 1), (True, False)),
        (lambda b, h, q, k: q >= k, (False, False)),
        (lambda b, h, q, k: two[h], (False, True)),
        (lambda b, h, q, k: two[b], (True, False)),
        (lambda b, h, q, k: table[h, k], (False, True)),
        (lambda b, h, q, k: table[b, q] & table[h, k], (True, True)),
        (lambda b, h, q, k: table[b][q], (True, False)),
        (lambda b, h, q, k: (q + 0 * h) >= k, (False, True)),
        (lambda b, h, q, k: torch.where(h > 1, q >= k, q > k), (False, True)),
        (lambda b, h, q, k: q >= k + ints.index_select(0, b.reshape(1))[0], (True, False)),
        (and_masks(single, lambda b, h, q, k: table[h, q]), (False, True)),
        (or_masks(single, lambda b, h, q, k: table[b, q]), (True, False)),
        (masks.shift(lambda b, h, q, k: two[h] | (q >= k), 3), (False, True)),
        (masks.shift(lambda b, h, q, k: q >= k, ints), (True, False)),
    ]
    for i, (mask_mod, want) in enumerate(cases):
        got = depends_on(mask_mod, torch.device(device))
        assert got == want, f"case {i}: {got}, expected {want}"
    # torch's starts from the batch index (b.new_ones), so it always seems to depend on it: the safe side.
    assert depends_on(flex.and_masks(single, single), torch.device(device)) == (True, False)


def test_a_mask_that_fails_on_a_probe_counts_as_dependent(device: str) -> None:
    """A mask that cannot be called on single indices is evaluated for all batches and heads."""

    def fails(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        raise ZeroDivisionError

    assert depends_on(fails, torch.device(device)) == (True, True)


# ----------------------------------------------------------------------------------------------- with torch


def torch_masks(device: str, num_queries: int, num_keys: int) -> dict[str, MaskMod]:
    place = torch.arange(num_keys, device=device)
    real = place >= torch.tensor([[0], [70]], device=device)
    ids = torch.stack([1 - place // 100, place % 3])
    offset = num_keys - num_queries
    inner = {
        "causal": masks.causal,
        "full": masks.full,
        "window": masks.sliding_window(100),
        "document": masks.document(ids),
        "padding": masks.padding(real),
        "prefix": masks.prefix_lm(torch.tensor([0, 200], device=device)),
        "and": and_masks(masks.causal, masks.padding(real), masks.document(ids)),
        "or": or_masks(masks.sliding_window(30), masks.prefix_lm(torch.tensor([20, 0], device=device))),
    }
    return {name: masks.shift(mask_mod, offset) if offset else mask_mod for name, mask_mod in inner.items()}


@pytest.mark.parametrize("lengths", [(256, 256), (128, 384), (200, 333)])
def test_masks_in_create_block_mask(lengths: tuple[int, int], device: str) -> None:
    """Each is an ordinary mask_mod for torch's ``create_block_mask``, which finds the blocks that flexproxy finds."""
    num_blocks = -(-lengths[1] // 128)
    for name, mask_mod in torch_masks(device, *lengths).items():
        block_mask = create_block_mask(mask_mod, 2, 1, *lengths, device=device)
        if lengths[0] % 128 and seq_lengths_of(block_mask) is None:
            continue  # this torch rounds the lengths up: that it evaluates there without failing is all there is
        clauses = clauses_of(structure_of(mask_mod), *lengths, torch.device(device))
        assert clauses is not None
        got = classify_clauses(stack(clauses), lengths[1], 128)
        want = full_blocks(block_mask, num_blocks)
        assert torch.equal(got.full.cpu().expand_as(want), want), name
        want |= partial_blocks(block_mask, num_blocks)
        assert torch.equal(got.any.cpu().expand_as(want), want), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", torch_masks("cpu", 1, 1))
def test_masks_in_eager_flex_attention(name: str, device: str) -> None:
    """Each works in eager ``flex_attention``, which reads nothing but the mask_mod; rows without a key give 0."""
    lengths = 128, 256
    mask_mod = torch_masks(device, *lengths)[name]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 32, generator=generator).to(device) for n in (lengths[0], lengths[1], lengths[1]))
    out = flex_attention(q, k, v, block_mask=create_block_mask(mask_mod, 2, 2, *lengths, device=device))
    assert isinstance(out, Tensor)
    allowed = reference.token_mask(mask_mod, 2, 2, *lengths, device)
    assert_accurate(out, q, k, v, allowed)
    empty = ~allowed.any(-1)
    assert bool((out[empty] == 0).all())
    assert bool(empty.any()) == (name in ("document", "and"))


@pytest.mark.parametrize("length", [1, 1000, 1023, 1024, 1025])
def test_tables_are_padded(length: int) -> None:
    """Kernels look up the padding of a ragged last tile: up to the next multiple of 1024, where no token is allowed.

    Queries that a shift moves to the end of the keys have their own ragged tile, which reaches further.
    On a CPU alone: a look-up behind a table on a GPU ends the process.
    """
    b, h = torch.tensor(1), torch.tensor(0)
    end = -(-length // 1024) * 1024
    place = torch.arange(end)
    ones = torch.ones(2, length, dtype=torch.int64)
    for mask_mod in (masks.document(ones), masks.document(ones[0]), masks.padding(ones), masks.padding(ones.bool())):
        got = mask_mod(b, h, place[:, None], place[None, :])
        want = (place[:, None] < length) & (place[None, :] < length)
        assert torch.equal(got, want)

        num_queries = min(length, 5)  # the last tile of 1024 has 1019 more, all behind the keys
        query = torch.arange(1024)
        got = masks.shift(mask_mod, length - num_queries)(b, h, query[:, None], place[None, :])
        want = (query[:, None] < num_queries) & (place[None, :] < length)
        assert torch.equal(got, want)


# ----------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("num_keys", [1, 7, 8, 9, 15, 16, 63, 64, 65, 100])
def test_bits_keep_a_mask(num_keys: int, device: str) -> None:
    """Packed and read back in any rows and any run of keys from a multiple of 8, a mask is what it was."""
    generator = torch.Generator().manual_seed(num_keys)
    mask = (torch.rand(2, 3, 11, num_keys, generator=generator) > 0.5).to(device)
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == (2, 3, 11, -(-num_keys // 8))
    for start in range(0, num_keys, 8):
        for stop in {start + 1, min(start + 13, num_keys), num_keys}:
            got = SampledMask(bits=bits).chunk(slice(2, 9), slice(start, stop), 4)
            assert torch.equal(got, mask[:, :, 2:9, start:stop])


def test_bits_are_little_end_first(device: str) -> None:
    """Key n is bit n % 8 of byte n // 8, as other implementations of the operators must read it."""
    mask = torch.zeros(1, 1, 1, 20, dtype=torch.bool, device=device)
    mask[..., [0, 3, 9, 19]] = True
    assert pack_bits(mask).flatten().tolist() == [0b00001001, 0b00000010, 0b00001000]


def test_clauses_at_sampled_keys(device: str) -> None:
    """By clauses, key n of a chunk stands at position n * step, with its own label."""
    ids = torch.arange(40, device=device) % 5 - 1
    mask_mod = and_masks(masks.causal, masks.document(ids))
    clauses = clauses_of(structure_of(mask_mod), 40, 40, torch.device(device))
    assert clauses is not None
    dense = reference.token_mask(mask_mod, 1, 1, 40, 40, device)
    for step, start in ((1, 0), (2, 8), (4, 0)):
        part = SampledMask(*stack(clauses)).every(3, step)
        got = part.chunk(slice(1, 11), slice(start, -(-40 // step)), step)
        assert torch.equal(got, dense[:, :, ::3, ::step][:, :, 1:11, start:])


def test_clauses_at_queries_of_each_head(device: str) -> None:
    ids = torch.arange(40, device=device) % 5 - 1
    mask_mod = and_masks(masks.causal, masks.document(ids))
    clauses = clauses_of(structure_of(mask_mod), 40, 40, torch.device(device))
    assert clauses is not None
    queries = torch.tensor([[[3, 39, 7], [0, 1, 20]], [[5, 6, 7], [39, 38, 2]]], device=device)
    got = SampledMask(*stack(clauses)).at(queries).chunk(slice(0, 3), slice(8, 40))
    dense = reference.token_mask(mask_mod, 1, 1, 40, 40, device)[0, 0]
    assert torch.equal(got, dense[queries][..., 8:])


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize(
    "mask_mod",
    [
        masks.causal,
        masks.sliding_window(9),
        masks.shift(masks.causal, torch.tensor([5, -20], dtype=torch.int32)),
        or_masks(masks.sliding_window(4), masks.prefix_lm(torch.tensor([10]))),
        and_masks(masks.causal, masks.document(torch.arange(40) // 15)),
    ],
    ids=["causal", "window", "shifted", "union", "documents"],
)
def test_reach_bounds_a_mask(mask_mod: MaskMod, step: int) -> None:
    """No query sees a key outside of what is seen, and all see all that is certain; causal ones with nothing to spare.

    Between them, and beside them, ``uncertain`` leaves out what is certain alone.
    """
    clauses = clauses_of(structure_of(mask_mod), 40, 40, torch.device("cpu"))
    assert clauses is not None
    mask, number = SampledMask(*stack(clauses)).every(None, step), 40 // step
    for rows in (slice(0, 3), slice(10, 30), slice(39, 40)):
        seen, certain = mask.reach(rows, number, step)
        dense = mask.chunk(rows, slice(0, number), step)
        outside = torch.ones(number, dtype=torch.bool)
        outside[seen] = False
        assert not dense[..., outside].any()
        assert dense[..., certain].all()
        if mask_mod is masks.causal:
            assert (seen.stop, certain.stop) == (-(-rows.stop // step), rows.start // step + 1)
        for keys in (slice(0, number), slice(4, 8), slice(8, number)):
            rest = [key for side in uncertain(keys, certain) for key in range(side.start, side.stop)]
            every = range(certain.start, certain.stop)
            assert rest == [key for key in range(keys.start, keys.stop) if key not in every]


def test_a_mask_by_nothing_is_an_error() -> None:
    with pytest.raises(AttributeError, match="neither clauses nor bits"):
        SampledMask().chunk(slice(0, 1), slice(0, 8))
