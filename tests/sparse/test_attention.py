"""Sparse attention against dense attention under the same token mask."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_mask, flex_attention

import flexproxy
from flexproxy import ProxyConfig, masks
from flexproxy.masks.structure import MaskMod
from tests.accuracy import assert_accurate, cpu_kernel_exists
from tests.oracle import Case, random_case

needs_kernel = pytest.mark.skipif(
    not torch.cuda.is_available() and not cpu_kernel_exists(), reason="this torch has no compiled CPU kernel"
)


def check_output(case: Case, mask_mod: MaskMod, out: Tensor) -> None:
    """``out`` is dense attention under ``mask_mod``, to twice SDPA's own error in this dtype, and one rounding."""
    num_queries, num_keys = case.lengths
    device = case.q.device
    allowed = create_mask(mask_mod, case.q.shape[0], case.q.shape[1], num_queries, num_keys, device=device)
    assert out.dtype == case.q.dtype
    assert bool((out[~allowed.any(-1)] == 0).all()), "an empty row is not 0"
    assert_accurate(out, case.q, case.k, case.v, allowed, case.scale)


def mask_of(case: Case) -> MaskMod:
    """The token mask of a case's selection."""
    selection = flexproxy.select(case.q, case.k, mask_mod=case.mask_mod, config=case.config)
    mask_mod = case.mask_mod or masks.shift(masks.causal, case.offset[0])
    return and_masks(mask_mod, selection.mask_mod())


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_eager_output_is_dense_attention_under_the_selection(first: int) -> None:
    for seed in range(first, first + 20):
        case = random_case(7000 + seed)
        head_dim = case.q.shape[3]
        if not cpu_kernel_exists() and (case.q.dtype != torch.float32 or head_dim & (head_dim - 1)):
            continue  # torch 2.5 takes powers of two only, and its eager scores have the dtype of the inputs
        block_mask = flexproxy.build(case.q, case.k, mask_mod=case.mask_mod, config=case.config)
        out = flex_attention(case.q, case.k, case.v, block_mask=block_mask, enable_gqa=True)
        check_output(case, mask_of(case), out)


def case_of(
    batch: int,
    heads: int,
    kv_heads: int,
    lengths: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    device: str,
    **config: Any,
) -> Case:
    generator = torch.Generator().manual_seed(lengths[0])
    shapes = (batch, heads, lengths[0], dim), (batch, kv_heads, lengths[1], dim), (batch, kv_heads, lengths[1], dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    config = {"gamma": 0.8, "min_budget": 128, **config}
    return Case(q, k, v, ProxyConfig(**config), "default", None, [lengths[1] - lengths[0]] * batch)


COMPILED_CASES = {
    "gqa, ragged": (2, 4, 2, (1000, 1000), 64, torch.float32),
    "bf16, chunk of a prefill": (1, 4, 1, (300, 1100), 128, torch.bfloat16),
    "fp16, D 80, MHA": (1, 2, 2, (777, 777), 80, torch.float16),
}


@needs_kernel
@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED_CASES)
def test_compiled_output_is_dense_attention_under_the_selection(name: str, device: str) -> None:
    """``flexproxy.attention``, with the default mask and composed ones, on the compiled kernel."""
    batch, heads, kv_heads, lengths, dim, dtype = COMPILED_CASES[name]
    case = case_of(batch, heads, kv_heads, lengths, dim, dtype, device)
    real = (torch.arange(lengths[1]) >= torch.tensor([[0], [130]])[:batch]).to(device)
    documents = (torch.arange(lengths[1]) // 333).to(device)
    offset = torch.tensor(lengths[1] - lengths[0], device=device)
    for mask_mod in (
        None,
        masks.shift(and_masks(masks.causal, masks.padding(real), masks.document(documents)), offset),
    ):
        case = Case(case.q, case.k, case.v, case.config, "", mask_mod, case.offset)
        out = flexproxy.attention(case.q, case.k, case.v, mask_mod=mask_mod, config=case.config, when="always")
        check_output(case, mask_of(case), out)


GPU_CASES = [
    # head dimension, dtype, block size, Sq, Skv
    (16, torch.float32, 128, 500, 500),
    (256, torch.float32, 128, 500, 500),
    (256, torch.bfloat16, 128, 500, 700),
    (96, torch.bfloat16, 64, 500, 500),
    (80, torch.float16, 32, 300, 300),
    (64, torch.float32, 64, 300, 420),
    (128, torch.bfloat16, 16, 300, 300),
    (128, torch.float16, 256, 1000, 1100),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("dim", "dtype", "block_size", "num_queries", "num_keys"), GPU_CASES)
def test_every_shape_runs_on_a_gpu(
    dim: int, dtype: torch.dtype, block_size: int, num_queries: int, num_keys: int
) -> None:
    """Head dimensions, dtypes and block sizes from end to end of what is supported, compiled."""
    options = {"block_size": block_size, "min_budget": block_size, "gamma": 0.6}
    case = case_of(2, 6, 2, (num_queries, num_keys), dim, dtype, "cuda", **options)
    for _ in range(3):  # as it compiles, as it captures, and replayed
        out = flexproxy.attention(case.q, case.k, case.v, config=case.config, when="always")
        check_output(case, mask_of(case), out)


@needs_kernel
@pytest.mark.slow
def test_gamma_one_is_dense_attention(device: str) -> None:
    """The mask that keeps everything, and ``attention``'s dense route, both equal dense attention."""
    case = case_of(1, 4, 2, (640, 640), 64, torch.float32, device, gamma=1.0)
    out = flexproxy.attention(case.q, case.k, case.v, config=case.config)
    check_output(case, masks.causal, out)
    block_mask = flexproxy.build(case.q, case.k, config=case.config)
    check_output(case, masks.causal, flex_attention(case.q, case.k, case.v, block_mask=block_mask, enable_gqa=True))


@pytest.mark.parametrize(
    ("lengths", "config"),
    [
        ((1, 4096), ProxyConfig(min_budget=0)),  # decoding
        ((700, 700), ProxyConfig()),  # the budget of 2048 tokens covers every row
        ((700, 700), ProxyConfig(min_budget=0, gamma=1.0)),  # nothing to drop
        ((700, 700), ProxyConfig(min_budget=0, density=1.0)),
    ],
)
def test_attention_is_dense_where_sparse_cannot_pay(
    lengths: tuple[int, int], config: ProxyConfig, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default mask goes to SDPA: no estimate is made, and nothing is compiled."""
    monkeypatch.setattr("flexproxy.sparse.attention.estimate", _must_not_run)
    monkeypatch.setattr("flexproxy.sparse.kernel.compiled_flex_attention", _must_not_run)
    case = case_of(2, 4, 2, lengths, 64, torch.float32, device)
    out = flexproxy.attention(case.q, case.k, case.v, config=config)
    check_output(case, masks.shift(masks.causal, lengths[1] - lengths[0]), out)


def _must_not_run(*args: object, **kwargs: object) -> None:
    raise AssertionError("the sparse route was taken")


@needs_kernel
@pytest.mark.slow
def test_dense_route_keeps_the_mask(device: str) -> None:
    """Dense because short, but not without the caller's mask, its empty rows, and a score_mod."""
    case = case_of(2, 2, 2, (200, 200), 32, torch.float32, device)
    real = (torch.arange(200) >= torch.tensor([[0], [70]])).to(device)
    mask_mod = and_masks(masks.causal, masks.padding(real))
    out = flexproxy.attention(case.q, case.k, case.v, mask_mod=mask_mod)
    check_output(case, mask_mod, out)
    halved = flexproxy.attention(
        case.q, case.k, case.v, mask_mod=mask_mod, score_mod=lambda score, b, h, q, kv: score / 2
    )
    half = Case(case.q / 2, case.k, case.v, case.config, "", mask_mod, case.offset)
    check_output(half, mask_mod, halved)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("block_size", [128, 64])
def test_lse_and_gradients(block_size: int) -> None:
    """On a GPU: the log-sum-exp is that of the kept scores, and gradients are those of dense attention."""
    case = case_of(2, 4, 2, (700, 700), 64, torch.float32, "cuda", block_size=block_size)
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    out, lse = flexproxy.attention(q, k, v, config=case.config, return_lse=True, when="always")
    allowed = create_mask(mask_of(case), 2, 4, 700, 700, device="cuda")
    scores = case.q.double() @ case.k.double().repeat_interleave(2, 1).transpose(-1, -2) * case.scale
    torch.testing.assert_close(
        lse.double(), scores.masked_fill(~allowed, -math.inf).logsumexp(-1), rtol=1e-3, atol=1e-3
    )
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    exact = [x.double().detach().requires_grad_() for x in (case.q, case.k, case.v)]
    dense = F.scaled_dot_product_attention(exact[0], exact[1], exact[2], attn_mask=allowed, enable_gqa=True)
    (dense * weight).sum().backward()
    for got, want in zip((q, k, v), exact, strict=True):
        assert got.grad is not None
        assert want.grad is not None
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_memory_of_build() -> None:
    """At 32K tokens and 8 heads, ``build`` takes less than 1 GB beyond its inputs, on a CPU."""
    program = """
import resource, torch, flexproxy
q, k = torch.randn(1, 8, 32768, 64), torch.randn(1, 2, 32768, 64)
flexproxy.build(q[:, :, :256], k[:, :, :256])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
flexproxy.build(q, k, config=flexproxy.ProxyConfig(num_proxies=2))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 1e9
