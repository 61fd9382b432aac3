"""Layers that attend to the blocks of an earlier one: which may, what they compute, and what is kept for how long."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import flexproxy
from flexproxy import ProxyConfig, Selection
from flexproxy.integrations.transformers import attention as hf_attention
from flexproxy.integrations.transformers import configuration, configure, save_configuration
from flexproxy.integrations.vllm import settings as vllm_settings
from flexproxy.pipeline import estimate
from tests.transformers_models import interpreted, logits, make_model, make_tokens, use

BLOCK = 32
EVERY_BLOCK = ProxyConfig(gamma=1.0, max_budget=2**20, min_budget=BLOCK, block_size=BLOCK)
SOME_BLOCKS = ProxyConfig(gamma=0.6, min_budget=BLOCK, block_size=BLOCK)
PAIRS = {1: 0, 3: 2}
ALL = {1: 0, 2: 0, 3: 0}


def model_of(config: ProxyConfig, share: dict[int, int], device: str = "cpu", family: str = "llama") -> Any:
    model = make_model(family, num_hidden_layers=4).to(device)
    use(model, "flexproxy")
    configure(model, config, when="always", share=share)
    return model


def sources(model: Any) -> dict[int, int]:
    sharing = {layer.self_attn.layer_idx: layer.self_attn.flexproxy_sharing for layer in model.model.layers}
    return {index: x.source for index, x in sharing.items() if x is not None and x.source != index}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Selection]]]:
    """The selections that were made, for as long as somebody has them; without the cycle collector."""
    found: list[weakref.ref[Selection]] = []

    def noted(*arguments: Any) -> Selection:
        selection = estimate(*arguments)
        found.append(weakref.ref(selection))
        return selection

    monkeypatch.setattr(hf_attention, "estimate", noted)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


# ------------------------------------------------------------------------------------------------ settings


def test_layers_have_the_settings_of_those_they_share_with() -> None:
    model, other = model_of(SOME_BLOCKS, {}), ProxyConfig(gamma=0.7)
    assert sources(model) == {}
    configure(model, {0: other, 1: SOME_BLOCKS, 3: SOME_BLOCKS}, share=PAIRS)
    assert sources(model) == PAIRS
    assert configuration(model) == {0: other, 1: other, 2: SOME_BLOCKS, 3: SOME_BLOCKS}
    configure(model, {0: SOME_BLOCKS})
    assert sources(model) == PAIRS
    assert set(configuration(model).values()) == {SOME_BLOCKS}
    configure(model, {1: other})
    assert sources(model) == {3: 2}
    assert configuration(model)[1] == other
    configure(model, other)
    assert sources(model) == {}


def test_a_file_has_who_shares(tmp_path: Path) -> None:
    model, other = model_of(SOME_BLOCKS, PAIRS), model_of(SOME_BLOCKS, {})
    path = tmp_path / "settings.json"
    save_configuration(model, path)
    configure(other, path)
    assert sources(other) == PAIRS
    configure(other, path, share={})
    assert sources(other) == {}
    with pytest.raises(ValueError, match=r'\["calibration"\]: expected no "share" in .*settings\.json'):
        vllm_settings.parse({"flexproxy": {"calibration": str(path)}})
    path.write_text(path.read_text().replace('"share": {\n  "1"', '"share": {\n  "one"'))
    with pytest.raises(ValueError, match=r'settings: expected layers by number as "share" in .*, got \{.one.: 0'):
        configure(other, path)
    save_configuration(other, path)
    assert "share" not in path.read_text()


@pytest.mark.parametrize(
    ("share", "error", "message"),
    [
        ([(1, 0)], TypeError, r"share: expected layers by number, each with an earlier one, got \[\(1, 0\)\]; use"),
        ({"1": 0}, TypeError, r"share: expected layers by number, .* got \{'1': 0\}"),
        ({1: True}, TypeError, r"share: expected layers by number, .* got \{1: True\}"),
        ({9: 0}, ValueError, r"share: expected layers among those that are set, 0-2, .* got \{9: 0\}; give layer 9"),
        ({3: 0}, ValueError, r"share: expected layers among those that are set, 0-2, with some of 0-3, got \{3: 0\}"),
        ({1: 7}, ValueError, r"with some of 0-3, got \{1: 7\}"),
        ({1: 1}, ValueError, r"share: expected an earlier layer that selects its own blocks, got \{1: 1\}"),
        ({0: 1}, ValueError, r"share: expected an earlier layer that selects its own blocks, got \{0: 1\}"),
        ({0: 1, 1: 0}, ValueError, r"share: expected an earlier layer that selects its own"),
        ({1: 0, 2: 1}, ValueError, r"share: expected an earlier layer that selects its own blocks, got \{2: 1\}; let"),
    ],
)
def test_wrong_layers(share: Any, error: type[Exception], message: str) -> None:
    model = model_of(SOME_BLOCKS, {3: 2})
    with pytest.raises(error, match=message):
        configure(model, dict.fromkeys(range(3), EVERY_BLOCK), share=share)
    assert sources(model) == {3: 2}
    assert set(configuration(model).values()) == {SOME_BLOCKS}, "nothing was set"


def test_dense_layers_and_other_masks_cannot_share() -> None:
    model = model_of(SOME_BLOCKS, {})
    for dense in (0, 1):
        with pytest.raises(ValueError, match=r"share: expected layers that are sparse, got \{1: 0\}"):
            configure(model, {0: SOME_BLOCKS, 1: SOME_BLOCKS} | {dense: ProxyConfig(gamma=1.0)}, share={1: 0})
    configure(model, SOME_BLOCKS, share=PAIRS)
    with pytest.raises(ValueError, match=r"share: expected layers that are sparse, got \{3: 2\}"):
        configure(model, {2: ProxyConfig(gamma=1.0)})
    kinds = ["sliding_attention", "full_attention"] * 2
    hybrid = make_model("gemma3", num_hidden_layers=4, layer_types=kinds)
    with pytest.raises(ValueError, match=r"the same kind of mask, got \{1: 0\}, full_attention and sliding_attention"):
        configure(hybrid, SOME_BLOCKS, share={1: 0})
    configure(hybrid, SOME_BLOCKS, share={2: 0, 3: 1})


# ------------------------------------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("share", [PAIRS, ALL])
def test_the_blocks_are_those_of_the_earlier_layer(share: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = make_tokens(2, 300)
    model = model_of(SOME_BLOCKS, share)
    with flexproxy.record(model, selections=True) as record:
        shared = logits(model, tokens)
    for layer, source in share.items():
        assert record.selections[layer] is record.selections[source]
    assert all(passes[0].dense is None and passes[0].kept for passes in record.layers.values())

    # The same by hand, in a model whose layers select for themselves.
    own: list[Selection] = []

    def of_the_first(*arguments: Any) -> Selection:
        own.append(estimate(*arguments))
        return own[share.get(len(own) - 1, len(own) - 1)]

    monkeypatch.setattr(hf_attention, "estimate", of_the_first)
    assert torch.equal(logits(model_of(SOME_BLOCKS, {}), tokens), shared)
    monkeypatch.undo()
    assert (logits(model_of(SOME_BLOCKS, {}), tokens) - shared).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_with_every_block_it_is_dense_attention(family: str, device: str) -> None:
    """A padded batch, in one prefill and in chunks, and generated tokens; with softcap, windows and sinks."""
    if family != "llama" and not hasattr(transformers, "GptOssForCausalLM"):
        pytest.skip("this transformers has no gpt-oss")
    kinds: Any = {} if family == "llama" else {"layer_types": ["full_attention", "sliding_attention"] * 2}
    model = make_model(family, num_hidden_layers=4, **kinds).to(device)
    tokens = make_tokens(2, 300).to(device)
    padding = torch.ones_like(tokens)
    padding[0, :45] = 0
    found = []
    for name in ("eager", "flexproxy"):
        use(model, name)
        configure(model, EVERY_BLOCK, when="always", share={1: 0, 3: 0} if family == "llama" else {2: 0, 3: 1})
        with interpreted(device):
            for chunk in (None, 140):
                out: Any = model.generate(
                    tokens, attention_mask=padding, max_new_tokens=4, do_sample=False, disable_compile=True,
                    prefill_chunk_size=chunk, return_dict_in_generate=True, output_logits=True,
                )  # fmt: skip
                found.append((out.sequences, torch.stack(out.logits)))
    for sequences, steps in found[1:]:
        assert torch.equal(sequences, found[0][0])
        torch.testing.assert_close(steps, found[0][1], rtol=0, atol=1e-4)


def test_chunks_select_anew(made: list[weakref.ref[Selection]]) -> None:
    model, tokens = model_of(SOME_BLOCKS, PAIRS), make_tokens(1, 480)
    cache = transformers.DynamicCache()
    for part in tokens.split(160, 1):
        logits(model, part, past_key_values=cache, use_cache=True)
    assert len(made) == 6, "two groups of layers, three chunks"
    logits(model, tokens[:, :1], past_key_values=cache, use_cache=True)
    assert len(made) == 6, "a decode step is dense"


def test_gradients(device: str) -> None:
    """Also where checkpointing runs the layers a second time, the last ones first."""
    tokens = make_tokens(1, 200).to(device)
    found = []
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = model_of(SOME_BLOCKS, ALL, device).train()
        if checkpointing:
            model.gradient_checkpointing_enable(checkpointing)
            model.enable_input_require_grads()
        with interpreted(device):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for grads in found[1:]:
        for plain, checkpointed in zip(found[0], grads, strict=True):
            torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_lists_that_replays_made_are_shared() -> None:
    """Long prompts without an observer, whole and in chunks, attend as those that are observed and keep selections."""
    settings: Any = {"max_position_embeddings": 8192, "head_dim": 64}
    model = make_model("llama", num_hidden_layers=4, **settings).to("cuda", torch.bfloat16)
    use(model, "flexproxy")
    config = ProxyConfig(density=0.4, min_budget=256)
    tokens = make_tokens(2, 6000).to("cuda")
    for share in (PAIRS, ALL, {2: 0, 3: 1}):
        configure(model, config, when="always", share=share)
        found = []
        for observed in (True, False, False):
            cache = transformers.DynamicCache()
            with torch.no_grad(), flexproxy.record(model) if observed else contextlib.nullcontext():
                parts = [
                    model(input_ids=part, past_key_values=cache, use_cache=True).logits
                    for part in tokens.split([4352, 1648], 1)
                ]
            found.append(torch.cat(parts, 1).float())
        for other in found[1:]:
            assert ((other - found[0]).norm() / found[0].norm()).item() < 2e-2


# ------------------------------------------------------------------------------------------------ how long


def test_a_selection_is_let_go_after_its_last_layer(
    made: list[weakref.ref[Selection]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[list[bool]] = []
    select = hf_attention._selection

    def looked_at(*arguments: Any) -> Selection:
        alive.append([reference() is not None for reference in made])
        return select(*arguments)

    monkeypatch.setattr(hf_attention, "_selection", looked_at)
    model = model_of(SOME_BLOCKS, PAIRS)
    logits(model, make_tokens(1, 300))
    assert alive == [[], [True], [False], [False, True]]
    assert [reference() for reference in made] == [None, None]


def test_a_pass_that_fails_leaves_nothing_to_the_next(made: list[weakref.ref[Selection]]) -> None:
    model, tokens = model_of(SOME_BLOCKS, PAIRS), make_tokens(1, 300)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, tokens)
    handle.remove()
    gc.collect()
    assert [reference() for reference in made] == [None]
    logits(model, tokens)
    assert len(made) == 3


def test_a_block_mask_of_the_caller(made: list[weakref.ref[Selection]]) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    model, tokens = model_of(SOME_BLOCKS, PAIRS), make_tokens(1, 300)
    own = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 300, 300, device="cpu", BLOCK_SIZE=BLOCK)
    expected = logits(model, tokens)
    for _ in range(2):
        torch.testing.assert_close(logits(model, tokens, attention_mask=own), expected)
    assert len(made) == 6
    assert [reference() for reference in made] == [None] * 6


def test_a_mask_that_is_copied_for_every_layer(made: list[weakref.ref[Selection]]) -> None:
    """As accelerate copies it to the layer's device."""
    model, tokens = model_of(SOME_BLOCKS, PAIRS), make_tokens(1, 300)
    expected = logits(model, tokens)

    def copied(_: Any, arguments: Any, others: dict[str, Any]) -> Any:
        return arguments, others | {"attention_mask": others["attention_mask"].to("cpu")}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(copied, with_kwargs=True)
    assert torch.equal(logits(model, tokens), expected)
    assert [reference() for reference in made] == [None] * 4


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_layer_whose_source_did_not_select() -> None:
    model = model_of(SOME_BLOCKS, {1: 0})
    model.model.layers = model.model.layers[1:]
    with pytest.raises(ValueError, match="share: expected layer 0 to select the blocks of layer 1 earlier in the"):
        logits(model, make_tokens(1, 300))


def test_layers_with_other_heads() -> None:
    model = model_of(SOME_BLOCKS, {1: 0})
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    tokens, taken = make_tokens(1, 300), []
    handle = first.register_forward_pre_hook(lambda _m, _a, kwargs: taken.append(kwargs), with_kwargs=True)
    with torch.no_grad(), interpreted("cpu"):
        model.model.layers = model.model.layers[:1]
        model(input_ids=tokens, use_cache=False)
        handle.remove()
        block_mask = taken[0]["attention_mask"]
        q, k = torch.randn(1, 8, 300, 32), torch.randn(1, 2, 300, 32)
        with pytest.raises(ValueError, match=r"q, k: expected B, Hq, Sq, Skv = \(1, 4, 300, 300\), for which"):
            hf_attention.attention_forward(second, q, k, k, block_mask, scaling=1.0)


def test_a_compiled_model() -> None:
    model = model_of(SOME_BLOCKS, PAIRS)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad(), pytest.raises(ValueError, match="keeps no selection for layers to share; configure it"):
        compiled(input_ids=make_tokens(1, 200), use_cache=False)
