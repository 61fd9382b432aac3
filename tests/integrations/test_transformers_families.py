"""The decoder families of transformers, by their real classes: dense where everything is kept, else the selection."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

pytest.importorskip("transformers")

import transformers
from transformers import AttentionInterface, AttentionMaskInterface

import flexproxy
from flexproxy import ProxyConfig
from flexproxy.integrations.transformers.attention import attention_forward
from flexproxy.integrations.transformers.masks import forward_mask, forward_mask_of
from flexproxy.integrations.transformers.settings import config_of
from tests.transformers_models import (
    FAMILIES,
    IMAGE,
    IMAGE_TOKENS,
    configure_sparse,
    in_double,
    interpreted,
    make_model,
    make_tokens,
    make_vision_language_model,
    use,
)

LENGTH, BLOCK = 300, 32  # a ragged last block
# max_budget leaves the budget at all blocks, but not the dense way out that gamma=1.0 alone takes.
EVERY_BLOCK = ProxyConfig(gamma=1.0, max_budget=2**20, min_budget=BLOCK, block_size=BLOCK)
SOME_BLOCKS = ProxyConfig(gamma=0.6, min_budget=BLOCK, block_size=BLOCK, num_proxies=2)


def model_of(family: str, device: str) -> Any:
    if not hasattr(transformers, FAMILIES[family][0]):
        pytest.skip(f"this transformers has no {FAMILIES[family][0]}")
    return make_model(family).to(device)


@torch.no_grad()
def logits(model: Any, name: str, **inputs: Any) -> Tensor:
    """In double precision, whatever the model's is."""
    use(model, name)
    result: Tensor = model(use_cache=False, **inputs).logits
    return result.double()


def assert_as_good_as(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Our error is at most twice theirs, plus one rounding of the largest logit in single precision."""
    error, own_error = ((x - exact).abs().max().item() for x in (ours, theirs))
    rounding = torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert error <= 2 * own_error + rounding, f"error {error:.3g}, theirs {own_error:.3g}"


class Recorder:
    """``recording`` is flexproxy, and notes which blocks each layer keeps. Two dense ways see, of what the mask of
    transformers allows, what was noted: ``replaying`` is the model's own eager attention, ``exact`` a plain one in the
    dtype of its inputs."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}  # bool [B, Hq, Sq, Skv] of each layer; nothing is dropped of others

    def record(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: BlockMask, **arguments: Any
    ) -> Any:
        shared, config = forward_mask_of(attention_mask), config_of(module)
        assert shared is not None
        block_mask = shared.block_mask(query.device, config.block_size)
        scale = arguments["scaling"]
        blocks = flexproxy.select(query, key, block_mask=block_mask, config=config, scale=scale).block_map()
        tokens = blocks.repeat_interleave(config.block_size, 2).repeat_interleave(config.block_size, 3)
        self.kept[module.layer_idx] = tokens[:, :, : query.shape[2], : key.shape[2]]
        return attention_forward(module, query, key, value, attention_mask, **arguments)

    def replay(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **arguments: Any
    ) -> Any:
        own: Any = sys.modules[type(module).__module__]
        if getattr(module, "layer_idx", None) in self.kept:
            attention_mask = attention_mask.masked_fill(~self.kept[module.layer_idx], torch.finfo(query.dtype).min)
        return own.eager_attention_forward(module, query, key, value, attention_mask, **arguments)

    def exact(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).mT * scaling
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask < 0, -1e6)
        if getattr(module, "layer_idx", None) in self.kept:
            scores = scores.masked_fill(~self.kept[module.layer_idx], -1e6)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux[:, None, None].expand(*scores.shape[:3], 1)], -1)
        weights = scores.softmax(-1)[..., : key.shape[2]]
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    eager_mask = AttentionMaskInterface()["eager"]
    ways: dict[str, tuple[Any, Any]] = {
        "recording": (recorder.record, forward_mask),
        "replaying": (recorder.replay, eager_mask),
        "exact": (recorder.exact, eager_mask),
    }
    for name, (attention, mask) in ways.items():
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
    yield recorder
    for name in ways:
        for interface in (AttentionInterface, AttentionMaskInterface):
            del interface._global_mapping[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_is_dense_attention(family: str, device: str, recorder: Recorder) -> None:
    """With all blocks kept, and by default on a prompt shorter than the least budget, the logits are the dense ones."""
    model = model_of(family, device)
    tokens = make_tokens(1, LENGTH).to(device)
    exact = logits(in_double(model), "exact", input_ids=tokens)
    eager = logits(model, "eager", input_ids=tokens)
    with interpreted(device):
        assert_as_good_as(logits(model, "flexproxy", input_ids=tokens), eager, exact)
        configure_sparse(model, EVERY_BLOCK)
        assert_as_good_as(logits(model, "flexproxy", input_ids=tokens), eager, exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_is_dense_attention_under_its_blocks(family: str, device: str, recorder: Recorder) -> None:
    model = model_of(family, device)
    tokens = make_tokens(2, LENGTH).to(device)
    padding = torch.ones_like(tokens)
    padding[0, :40] = 0
    configure_sparse(model, SOME_BLOCKS)
    with interpreted(device):
        ours = logits(model, "recording", input_ids=tokens, attention_mask=padding)
    assert len(recorder.kept) == model.config.num_hidden_layers
    for kept in recorder.kept.values():  # something is dropped, and not the same for all heads
        assert 0.2 < kept.tril().float().mean().item() * 2 < 0.95
        assert not torch.equal(kept, kept[:, :1].expand_as(kept))
    theirs = logits(model, "replaying", input_ids=tokens, attention_mask=padding)
    exact = logits(in_double(model), "exact", input_ids=tokens, attention_mask=padding)
    real = padding.bool()
    assert_as_good_as(ours[real], theirs[real], exact[real])


def prompt_with_images(device: str) -> dict[str, Tensor]:
    """Two images among text."""
    text = 60
    tokens = make_tokens(1, 2 * (text + IMAGE_TOKENS) + 100) % 40 + 8
    for start in (text, 2 * text + IMAGE_TOKENS):
        tokens[:, start : start + IMAGE_TOKENS] = IMAGE
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "pixel_values": pixels, "token_type_ids": (tokens == IMAGE).long()}
    return {name: value.to(device) for name, value in inputs.items()}


def test_vision_language_model(device: str, recorder: Recorder) -> None:
    """Image tokens keep seeing one another; the vision tower, which is not causal, stays dense."""
    model, inputs = make_vision_language_model().to(device), prompt_with_images(device)
    eager, exact = logits(model, "eager", **inputs), logits(in_double(model), "exact", **in_doubles(inputs))
    without_types = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    with interpreted(device):
        configure_sparse(model, EVERY_BLOCK)
        assert_as_good_as(logits(model, "flexproxy", **inputs), eager, exact)
        causal = logits(model, "flexproxy", **without_types)
    assert (causal - exact).abs().max() > 0.01  # the test would see images that have become causal


def in_doubles(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
