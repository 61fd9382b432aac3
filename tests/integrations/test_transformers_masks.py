"""Masks of transformers become blocks without losing a part, counted where they are known, and once a forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

pytest.importorskip("transformers")

from transformers import AttentionMaskInterface, masking_utils

import flexproxy
from flexproxy import ProxyConfig
from flexproxy.integrations.transformers import attention as hf_attention
from flexproxy.integrations.transformers import configure, parts
from flexproxy.integrations.transformers import masks as hf_masks
from flexproxy.integrations.transformers.attention import attention_forward
from flexproxy.integrations.transformers.masks import forward_mask, forward_mask_of
from flexproxy.masks.structure import structure_of
from flexproxy.pipeline import dense_block_mask, read_mask
from flexproxy.plan import Frame
from tests.lists import full_blocks, partial_blocks
from tests.transformers_models import make_model, make_tokens

BATCH, QUERIES, KEYS = 2, 140, 300
utils: Any = masking_utils

Function = Callable[..., Any]


def packed_ids(length: int) -> Tensor:
    return torch.stack([torch.arange(length) // 90, (torch.arange(length) > 33).long()])


def image_blocks(length: int) -> Tensor:
    ids = torch.full((BATCH, length), -1)
    ids[0, 20:60], ids[0, 150:210], ids[1, 133:170] = 0, 1, 0
    return ids


def chunked() -> Function:
    parameters = utils.chunked_causal_mask_function.__code__.co_argcount
    made: Function = utils.chunked_causal_mask_function(*(64, torch.zeros(BATCH, dtype=torch.int64))[:parameters])
    return made


def every_third(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (kv_idx % 3 == 0) | (kv_idx == q_idx)


# Name: the function, and whether flexproxy is to know all of its parts.
FUNCTIONS: dict[str, tuple[Callable[[], Function], bool]] = {
    "causal": (lambda: utils.causal_mask_function, True),
    "window": (lambda: utils.sliding_window_causal_mask_function(70), True),
    "chunked": (chunked, True),
    "images": (
        lambda: utils.or_masks(utils.causal_mask_function, utils.blockwise_overlay(image_blocks(KEYS + 50))),
        True,
    ),
    "window and images": (
        lambda: utils.or_masks(
            utils.sliding_window_causal_mask_function(70), utils.blockwise_overlay(image_blocks(KEYS + 50))
        ),
        True,
    ),
    "packed": (
        lambda: utils.and_masks(utils.causal_mask_function, utils.packed_sequence_mask_function(packed_ids(KEYS + 50))),
        True,
    ),
    "a function of somebody else": (lambda: utils.and_masks(utils.causal_mask_function, every_third), False),
    "a window without causality": (lambda: utils.sliding_window_overlay(70), False),
}


def made(name: str) -> Function:
    try:
        return FUNCTIONS[name][0]()
    except AttributeError:
        pytest.skip("this transformers has no such mask")


def arguments_for(function: Function, q_offset: int | Tensor, kv_offset: int, padding: Tensor | None) -> dict[str, Any]:
    """What transformers passes, in the form of the release at hand."""
    arguments: dict[str, Any] = {
        "batch_size": BATCH,
        "kv_length": KEYS,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": padding,
        "allow_is_causal_skip": False,
    }
    if takes_cache_position():
        return arguments | {"cache_position": torch.arange(QUERIES) + q_offset}
    return arguments | {"q_length": QUERIES, "q_offset": q_offset, "device": torch.device("cpu")}


def made_mask(arguments: dict[str, Any]) -> BlockMask:
    result = forward_mask(**arguments)
    assert isinstance(result, BlockMask)
    return result


def takes_cache_position() -> bool:
    function: Any = AttentionMaskInterface()["sdpa"]
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return "cache_position" in names


def padded(side: str | None, length: int) -> Tensor | None:
    if side is None:
        return None
    real = torch.ones(BATCH, length, dtype=torch.bool)
    real[0, slice(0, 200) if side == "left" else slice(length - 37, None)] = False
    return real


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("offsets", [(160, 0), (195, 35), (20, 0)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_of_a_mask_is_lost(name: str, offsets: tuple[int, int], side: str | None) -> None:
    """Tokens and blocks are those of transformers' own mask; only a query that is padding sees nothing here."""
    q_offset, kv_offset = offsets
    # (20, 0): a static cache with free places behind; its 2D mask ends with the tokens seen so far.
    padding = padded(side, q_offset + QUERIES)
    arguments = arguments_for(made(name), q_offset, kv_offset, padding)
    theirs = AttentionMaskInterface()["sdpa"](**arguments)
    if padding is not None:
        theirs = theirs & padding[:, None, q_offset : q_offset + QUERIES, None]
    result = made_mask(arguments)
    ours = create_mask(result.mask_mod, BATCH, 1, QUERIES, KEYS, device="cpu")
    assert torch.equal(ours, theirs.expand_as(ours))

    expected = create_block_mask(lambda b, h, q, k: theirs[b, 0, q, k], BATCH, 1, QUERIES, KEYS, device="cpu")
    for read in (partial_blocks, full_blocks):
        assert torch.equal(read(result, 3).expand(BATCH, -1, -1, -1), read(expected, 3))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_known_masks_are_counted(name: str) -> None:
    """A mask that flexproxy knows has a structure, so its blocks are counted; another has none."""
    result = made_mask(arguments_for(made(name), 160, 0, padded("left", KEYS)))
    assert (structure_of(result.mask_mod).clauses is not None) is FUNCTIONS[name][1]


def test_packed_positions_of_later_releases() -> None:
    """Where positions within the sequences replace those in the whole, masks of differences stay what they are."""
    if not hasattr(utils, "packed_sequence_compatibility_function"):
        pytest.skip("this transformers does not do it")
    ids = packed_ids(KEYS)
    places = torch.stack([torch.arange(KEYS) % 90, torch.cat([torch.arange(34), torch.arange(KEYS - 34)])])
    window = utils.sliding_window_causal_mask_function(50)
    for inner, known in ((window, True), (every_third, False)):
        function = utils.packed_sequence_compatibility_function(inner, places, ids)
        arguments = arguments_for(function, 160, 0, None)
        result = made_mask(arguments)
        assert (structure_of(result.mask_mod).clauses is not None) is known
        ours = create_mask(result.mask_mod, BATCH, 1, QUERIES, KEYS, device="cpu")
        assert torch.equal(ours, AttentionMaskInterface()["sdpa"](**arguments))


@pytest.fixture
def forget_what_is_known() -> Iterator[None]:
    parts._known.cache_clear()
    yield
    parts._known.cache_clear()


@pytest.mark.usefixtures("forget_what_is_known")
def test_a_constructor_that_means_something_else_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a release counts its window otherwise, the mask is evaluated, and right."""

    def sliding_window_overlay(sliding_window: int) -> Function:
        def inner_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return kv_idx >= q_idx - sliding_window

        inner_mask.__module__ = masking_utils.__name__
        inner_mask.__qualname__ = "sliding_window_overlay.<locals>.inner_mask"
        return inner_mask

    monkeypatch.setattr(masking_utils, "sliding_window_overlay", sliding_window_overlay)
    arguments = arguments_for(utils.sliding_window_causal_mask_function(70), 160, 0, None)
    result = made_mask(arguments)
    assert structure_of(result.mask_mod).clauses is None
    ours = create_mask(result.mask_mod, BATCH, 1, QUERIES, KEYS, device="cpu")
    theirs = AttentionMaskInterface()["sdpa"](**arguments)
    assert theirs[0, 0, 0].sum() == 71
    assert torch.equal(ours, theirs.expand_as(ours))


def test_a_static_cache_may_count_on() -> None:
    """Its offset is a tensor that changes while the layers run; the mask stays what it was."""
    if takes_cache_position():
        pytest.skip("this transformers passes positions")
    offset = torch.tensor(160)
    arguments = arguments_for(utils.causal_mask_function, offset, 0, None)
    theirs = AttentionMaskInterface()["sdpa"](**arguments)
    result = made_mask(arguments)
    shared = forward_mask_of(result)
    assert shared is not None
    offset += QUERIES
    other_blocks = shared.block_mask(torch.device("cpu"), 32)
    for mask_mod in (result.mask_mod, other_blocks.mask_mod):
        assert torch.equal(
            create_mask(mask_mod, BATCH, 1, QUERIES, KEYS, device="cpu"), theirs.expand(BATCH, -1, -1, -1)
        )
    tokens = shared.token_mask()
    assert tokens is not None
    assert torch.equal(tokens, theirs)


def test_few_new_tokens_and_other_masks_are_left_to_sdpa() -> None:
    """A decode step makes no block mask; a mask that is not causal is not for sparse attention."""
    arguments = arguments_for(utils.causal_mask_function, 160, 0, None)
    theirs = AttentionMaskInterface()["sdpa"](**arguments)
    bidirectional = forward_mask(**arguments, allow_is_bidirectional_skip=False)
    assert isinstance(bidirectional, Tensor)
    assert torch.equal(bidirectional, theirs)
    if takes_cache_position():
        arguments["cache_position"] = arguments["cache_position"][-1:]
    else:
        arguments |= {"q_length": 1, "q_offset": KEYS - 1}
    step = forward_mask(**arguments)
    assert isinstance(step, Tensor)
    assert step.shape == (BATCH, 1, 1, KEYS) or step.shape == (1, 1, 1, KEYS)


def test_a_mask_on_a_second_device_is_made_again() -> None:
    """Known parts go to the device that a layer is on; a function of somebody else cannot."""
    meta = torch.device("meta")
    known = arguments_for(utils.sliding_window_causal_mask_function(70), 160, 0, padded("left", KEYS))
    shared = forward_mask_of(made_mask(known))
    assert shared is not None
    tables = structure_of(shared._mask_mod(meta)).tables
    assert {table.name: table.value.device for table in tables} == {"attention_mask": meta, "q_offset": meta}

    shared = forward_mask_of(made_mask(arguments_for(made("a function of somebody else"), 160, 0, None)))
    assert shared is not None
    with pytest.raises(ValueError, match=r"attention_mask: expected .* several devices, got .*stays on cpu; put"):
        shared.block_mask(meta, 128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_mask_on_a_gpu_is_the_mask_on_the_cpu() -> None:
    arguments = arguments_for(utils.sliding_window_causal_mask_function(70), 160, 0, padded("left", KEYS))
    mask = made_mask(arguments)
    shared = forward_mask_of(mask)
    assert shared is not None
    there = shared.block_mask(torch.device("cuda", 0), 128)
    assert shared.block_mask(torch.device("cuda", 0), 128) is there
    for read in (partial_blocks, full_blocks):
        assert torch.equal(read(there, 3), read(mask, 3))


def test_lists_for_gradients_are_made_where_gradients_are_wanted() -> None:
    """As they are when the mask is made: layers may ask for theirs without gradients, and be run again with them."""
    arguments = arguments_for(made("causal"), 160, 0, None)
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            mask = made_mask(arguments)
        shared = forward_mask_of(mask)
        assert shared is not None
        other = shared.block_mask(torch.device("cpu"), 32)
        assert (mask.q_indices is not None) is wanted
        assert (other.q_indices is not None) is wanted


def test_a_mask_is_freed_with_its_last_use() -> None:
    """No cycle of references keeps the lists of a forward pass until a garbage collection."""
    result = made_mask(arguments_for(made("window"), 160, 0, padded("left", KEYS)))
    shared = forward_mask_of(result)
    assert shared is not None
    shared.block_mask(torch.device("cpu"), 32)
    model = make_model("llama")
    q, k = (torch.randn(BATCH, heads, length, 16) for heads, length in ((4, QUERIES), (2, KEYS)))
    for block_size in (128, 32):
        configure(model, ProxyConfig(block_size=block_size, min_budget=0))
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            attention_forward(model.model.layers[0].self_attn, q, k, k, result)
    gone = weakref.ref(shared)
    del result, shared
    assert gone() is None


@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("gemma3", 2)])
def test_a_mask_is_classified_once_for_all_layers(monkeypatch: pytest.MonkeyPatch, family: str, kinds: int) -> None:
    calls = []

    def counted(*args: Any) -> BlockMask:
        calls.append(args[3])
        return dense_block_mask(*args)

    monkeypatch.setattr(hf_masks, "dense_block_mask", counted)
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma3" else {}
    model = make_model(family, num_hidden_layers=4, **layers, attn_implementation="flexproxy")
    configure(model, ProxyConfig(block_size=32, min_budget=32, gamma=0.5))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model(input_ids=make_tokens(1, 200))
    assert sorted(calls) == [32] * kinds + [128] * kinds


def test_a_mask_is_prepared_once_for_layers_of_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their proxies and budgets are: transformers' masks do not differ between heads."""
    frames = []

    def counted(mask_mod: Any, block_mask: BlockMask, frame: Frame, device: torch.device) -> Any:
        frames.append((frame.block_size, frame.strides))
        return read_mask(mask_mod, block_mask, frame, device)

    monkeypatch.setattr(hf_attention, "read_mask", counted)
    model = make_model("llama", num_hidden_layers=5, attn_implementation="flexproxy")
    common: dict[str, Any] = {"min_budget": 32, "block_size": 32}
    settings = [
        ProxyConfig(gamma=0.5, **common),
        ProxyConfig(gamma=0.9, num_proxies=1, **common),
        ProxyConfig(density=0.5, groups=(0, 1, 0, 1), **common),
        ProxyConfig(gamma=0.5, stride=8, **common),
        ProxyConfig(gamma=0.5, **common),
    ]
    configure(model, dict(enumerate(settings)))
    tokens = make_tokens(2, 200)
    mask = torch.ones_like(tokens)
    mask[1, :40] = 0

    def selections() -> dict[int, flexproxy.Selection]:
        eager = torch.compiler.set_stance("force_eager")
        with flexproxy.record(model, selections=True) as record, torch.no_grad(), eager:
            model(input_ids=tokens, attention_mask=mask)
        return record.selections

    for number in (1, 2):  # anew for each forward pass
        shared = selections()
        assert frames == [(32, (4, 4)), (32, (8, 8))] * number
    monkeypatch.setattr(hf_attention, "place_of", lambda device: None)
    alone = selections()
    assert len(frames) == 4 + 5
    assert sorted(shared) == list(range(5))
    for layer, selection in shared.items():
        assert torch.equal(selection.block_map(), alone[layer].block_map())


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, True),
        ({"q_offset": 0}, False),  # free space at the end of the keys
        ({"kv_offset": 10}, False),  # the first keys are gone
        ({"q_offset": torch.tensor(KEYS - QUERIES)}, False),  # a static cache, which counts on while layers run
        ({"mask_function": utils.sliding_window_causal_mask_function(70)}, False),
        ({"attention_mask": torch.ones(BATCH, KEYS, dtype=torch.bool)}, True),
        ({"attention_mask": torch.arange(KEYS).expand(BATCH, -1) > 5}, False),
    ],
)
def test_which_mask_is_the_default_one(changes: dict[str, Any], wanted: bool) -> None:
    """Causal, aligned at the end, for all that is known without looking at a device."""
    mask = hf_masks.ForwardMask(
        {
            "batch_size": BATCH,
            "q_length": QUERIES,
            "kv_length": KEYS,
            "q_offset": KEYS - QUERIES,
            "kv_offset": 0,
            "device": torch.device("cpu"),
            "mask_function": utils.causal_mask_function,
            "attention_mask": None,
        }
        | changes
    )
    assert mask.is_default is wanted
