"""Compiled ``flex_attention``: any number of lengths, and the unit of its log-sum-exp."""

from __future__ import annotations

import functools
import gc
import logging
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import flexproxy
from flexproxy import ProxyConfig, masks
from flexproxy.masks.structure import MaskMod
from flexproxy.ops import compat
from flexproxy.sparse import kernel
from flexproxy.stages.lists import block_lists
from tests.accuracy import allowed_pairs, assert_accurate, cpu_kernel_exists, skip_unless_flex_compiles

BLOCK = 32
CONFIG = ProxyConfig(block_size=BLOCK, min_budget=BLOCK, gamma=0.6)
FLASH: dict[str, Any] = {"BACKEND": "FLASH"}
TOO_SMALL = math.log(2)  # the factor of what some versions of torch return

needs_dynamo = pytest.mark.skipif(not cpu_kernel_exists(), reason="this torch's dynamo cannot trace masks")


def qkv(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    return q, k, v


def check_length(length: int) -> None:
    """``attention`` of some length, by ``flex_attention``, is dense attention to its selection."""
    q, k, v = qkv(length)
    out = flexproxy.attention(q, k, v, mask_mod=masks.causal, config=CONFIG)
    selection = flexproxy.select(q, k, config=CONFIG)
    assert_accurate(out, q, k, v, allowed_pairs(selection, masks.causal, length, length, BLOCK))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def few_variants(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three lengths are remembered; dynamo warns of a third variant."""
    torch._dynamo.reset()
    few = functools.lru_cache(3)(kernel.compiled_flex_attention.__wrapped__)
    monkeypatch.setattr(kernel, "compiled_flex_attention", few)
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: 2}):
        yield
    torch._dynamo.reset()


@needs_dynamo
@pytest.mark.usefixtures("few_variants")
def test_any_number_of_lengths(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """More than dynamo would compile of one function: no warning, and the oldest are let go."""
    functions: list[weakref.ref[Any]] = []

    def traced_alone(function: Any, **options: Any) -> Any:  # and not compiled, so the output is not that of a kernel
        functions.append(weakref.ref(function))
        return compile_(function, backend="eager", **options)

    compile_, forget = torch.compile, compat.forget_compiled
    forgotten: list[object] = []
    monkeypatch.setattr(torch, "compile", traced_alone)
    monkeypatch.setattr(compat, "forget_compiled", lambda code: forgotten.append(forget(code)))
    for length in (*range(70, 76), 70):
        flexproxy.attention(*qkv(length), mask_mod=masks.causal, config=CONFIG)
    assert warnings_of(caplog) == []
    gc.collect()
    alive = [function() is not None for function in functions]
    assert alive == [False] * 4 + [True] * 3, "the last three are remembered"
    assert len(forgotten) == 4
    flexproxy.attention(*qkv(70), mask_mod=masks.causal, config=CONFIG)
    assert len(functions) == 7, "remembered, and compiled again"


@needs_dynamo
@pytest.mark.usefixtures("few_variants")
def test_more_masks_of_one_length_than_dynamo_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are constants of a kernel. The limit is lifted where it is met, and is as before afterwards."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    q, k, v = qkv(100)
    for window in range(20, 25):
        flexproxy.attention(q, k, v, mask_mod=masks.sliding_window(window), config=CONFIG)
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    assert getattr(torch._dynamo.config, limit) == 2


@needs_dynamo
def test_chunks_of_any_prompt_compile_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU runs the default mask: one for the first chunk, one for more keys, one for chunks of another size."""
    traced: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        traced.append(1)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    kernel._compiled_causal.cache_clear()
    counts = []
    for size, lengths in ((64, (64, 128, 192, 256)), (96, (96, 192, 288)), (100, (100, 200, 250))):
        for length in lengths:
            q, k, v = qkv(length)
            q = q[:, :, -size:].transpose(1, 2).contiguous().transpose(1, 2)  # as models have it
            selection = flexproxy.select(q, k, config=CONFIG)
            offset = torch.full((1,), length - size, dtype=torch.int32)
            lists = block_lists(selection.block_map(), selection.full.expand(1, 4, -1, -1))
            kernel.run_causal(q, k, v, offset, lists, BLOCK, 0.25, {})
        counts.append(len(traced))
    kernel._compiled_causal.cache_clear()
    assert counts[0] <= 2
    assert counts[1] == counts[2] <= 3


LAYOUTS: dict[str, Any] = {
    "heads first": lambda x: x.transpose(1, 2).contiguous(),
    "tokens first": lambda x: x.transpose(1, 2),
    "beside others": lambda x: torch.cat([x, x], -1).transpose(1, 2)[..., x.shape[3] :],
    "of a fused projection": lambda x: torch.cat([x, x], 2)[:, :, x.shape[2] :].transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_keys_are_those_of_their_sizes(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel is made for any length, no stride is a number of its own: NOTE [Strides that are inferred]."""
    alone: list[Any] = []

    def symbols(numbers: Any) -> set[Any]:
        return {name for x in numbers if isinstance(x, torch.SymInt) for name in x.node.expr.free_symbols}

    def look(graph: Any, _: Any) -> Any:
        for node in graph.graph.nodes:
            if node.op == "placeholder" and node.target in ("L_k_", "L_v_"):
                example = node.meta["example_value"]
                alone.append(symbols(example.stride()) - symbols(example.shape))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=look))
    kernel._compiled_causal.cache_clear()
    for length in (64, 128, 192):
        q, k, v = (LAYOUTS[layout](x.transpose(1, 2).contiguous()) for x in qkv(length))
        lists = block_lists(*[torch.ones(1, 1, length // BLOCK, length // BLOCK, dtype=torch.bool).tril()] * 2)
        kernel.run_causal(q, k, v, torch.zeros(1, dtype=torch.int32), lists, BLOCK, 0.25, {})
    kernel._compiled_causal.cache_clear()
    assert len(alone) > 2
    assert not any(alone)


def test_what_is_expanded_is_not_copied() -> None:
    x = torch.zeros(1, 1, 64, 16).expand(1, 4, 64, 16)
    assert kernel.with_inferred_strides(x) is x


@pytest.mark.slow
def test_twelve_lengths_with_the_kernel_of_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    skip_unless_flex_compiles("cpu")
    torch._dynamo.reset()
    for length in range(70, 82):
        check_length(length)
    assert warnings_of(caplog) == []


# ------------------------------------------------------------------------------------------ the unit of FLASH's


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What a stand-in of the kernel multiplies the log-sum-exp by, the first of them; grows with each trial."""
    factors = [1.0]

    def compiled(name: str) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor, kernel_options: dict[str, Any], **_: Any) -> tuple[Tensor, Tensor]:
            assert (name, kernel_options) == ("flash", FLASH)
            assert not torch.is_grad_enabled()
            factors.append(factors[0])
            return q, (q.float() @ k.float().mT).logsumexp(-1) * factors[0]

        return run

    monkeypatch.setattr(kernel, "compiled_flex_attention", compiled)
    monkeypatch.setattr(kernel, "_flash_factors", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return factors


def natural(lse: Tensor, options: dict[str, Any]) -> Tensor:
    return kernel._natural(lse, options)


@pytest.mark.parametrize("factor", [1.0, TOO_SMALL])
def test_the_unit_is_found_once(factor: float, tried: list[float]) -> None:
    tried[0] = factor
    lse = torch.tensor([3.0, -torch.inf])
    for _ in range(2):
        torch.testing.assert_close(natural(lse * factor, FLASH), lse)
    for options in ({}, {"BACKEND": "TRITON"}):
        assert natural(lse, options) is lse
    assert len(tried) == 2


def test_an_unknown_unit_is_an_error(tried: list[float]) -> None:
    tried[0] = 1 / math.log(2)
    with pytest.raises(RuntimeError, match=r"return_lse: expected the log-sum-exp .* 5\.545 .*, got 8\.000; pass"):
        natural(torch.zeros(3), FLASH)


def test_the_unit_is_not_tried_where_that_is_impossible(tried: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the capture of a CUDA graph, in a mode, and in a trace, where it is a constant once it is known."""
    device = torch.device("cpu")
    traced = torch.compile(lambda lse: natural(lse, FLASH), fullgraph=True, backend="eager")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert kernel.flash_lse_factor(device) is None
        with pytest.raises(ValueError, match=r"return_lse: expected a call of .* with it before"):
            natural(torch.zeros(3), FLASH)
    with monkeypatch.context() as patch:
        patch.setattr(compat, "in_a_mode", lambda: True)
        assert kernel.flash_lse_factor(device) is None
    assert torch.compile(lambda x: x if kernel.flash_lse_factor(x.device) is None else x + 1, backend="eager")(
        torch.zeros(())
    ) == 0  # fmt: skip
    assert len(tried) == 1
    tried[0] = TOO_SMALL
    assert kernel.flash_lse_factor(device) == pytest.approx(1 / TOO_SMALL)
    torch._dynamo.reset()
    torch.testing.assert_close(traced(torch.full((3,), TOO_SMALL)), torch.ones(3))
    assert len(tried) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_unit_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log-sum-exp of FLASH is a natural logarithm, also where a graph is captured after a first call."""
    if not compat.flash_backend_exists() or not compat.is_hopper(torch.device("cuda")):
        pytest.skip("no FLASH")
    monkeypatch.setattr(kernel, "_flash_factors", {})
    q = torch.randn(1, 4, 512, 128, device="cuda", dtype=torch.bfloat16)
    config = ProxyConfig(min_budget=0, gamma=0.999)
    _, lse = flexproxy.attention(q, q, q, config=config, when="always", return_lse=True, kernel_options=FLASH)
    selection = flexproxy.select(q, q, config=config)
    allowed = allowed_pairs(selection, masks.causal, 512, 512, 128)
    scores = (q.double() @ q.double().mT * 128**-0.5).masked_fill(~allowed, -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-3, atol=1e-3)
    assert set(kernel._flash_factors) == {q.device}


def looked_up(batch: int, length: int, device: str) -> dict[str, MaskMod]:
    """Masks that look something up."""
    real = torch.ones(batch, length, dtype=torch.bool, device=device)
    real[-1, : length // 4] = False
    ids = torch.arange(length, device=device) // 300
    offset = torch.zeros(batch, dtype=torch.int32, device=device)
    return {
        "padding": masks.and_masks(masks.causal, masks.padding(real)),
        "documents": masks.and_masks(masks.causal, masks.document(ids)),
        "documents of each sequence": masks.and_masks(masks.causal, masks.document(ids.expand(batch, -1))),
        "shifted padding": masks.shift(masks.and_masks(masks.causal, masks.padding(real)), offset),
        "prefix": masks.prefix_lm(torch.full((batch,), 200, device=device)),
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", looked_up(1, 8, "cpu"))
def test_flash_compiles_masks_that_look_something_up(name: str, batch: int) -> None:
    if not compat.flash_backend_exists() or not compat.is_hopper(torch.device("cuda")):
        pytest.skip("no FLASH")
    q, k, v = (torch.randn(batch, heads, 1024, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    mask_mod, config = looked_up(batch, 1024, "cuda")[name], ProxyConfig(density=0.4, min_budget=128)
    out = flexproxy.attention(q, k, v, mask_mod=mask_mod, config=config, when="always", kernel_options=FLASH)
    selection = flexproxy.select(q, k, mask_mod=mask_mod, config=config)
    assert_accurate(out, q, k, v, allowed_pairs(selection, mask_mod, 1024, 1024, 128))
