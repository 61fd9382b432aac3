"""The benchmark of prefills without a GPU: its gate, its cases, and a whole run of a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("rich")

import transformers
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import causal_upper_left

import flexproxy
from benchmarks import bench_prefill, chunked, harness
from benchmarks.harness import Row
from flexproxy import ProxyConfig
from flexproxy.sparse.plan import KernelPlan
from tests.transformers_models import interpreted

if not hasattr(transformers.PreTrainedModel, "set_attn_implementation"):
    pytest.skip("this transformers cannot switch the attention of a model", allow_module_level=True)


def tiny_config(max_length: int) -> Any:
    """The benchmark's configuration, with less of everything but heads."""
    config = bench_prefill_config(max_length)
    config.update({"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64})
    config.head_dim = 16
    return config


bench_prefill_config = bench_prefill.model_config


def test_the_shape_is_that_of_the_8b_model() -> None:
    config = bench_prefill.model_config(4096)
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert heads == (32, 8, 128)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (4096, 14336, 32)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_time(run: Callable[[], Any], **_: Any) -> Row:
        run()
        return harness.quantiles([1.0])

    def fake_prefill(run: Callable[[], Any], repeats: int, warmup: int) -> Row:
        run()
        return harness.quantiles([float(warmup)] * repeats) | {"peak_mib": 1.0}

    replacements: dict[str, Any] = {
        "DEVICE": "cpu",
        "DTYPE": torch.float32,
        "SDPA": dict.fromkeys(bench_prefill.SDPA, SDPBackend.MATH),
        "require_gpu": lambda: None,
        "model_config": tiny_config,
        "time_ms": fake_time,
        "prefill_ms": fake_prefill,
        "flex": lambda q, k, v, block_mask, options: q,
    }
    for name, value in replacements.items():
        monkeypatch.setattr(bench_prefill, name, value)
    monkeypatch.setattr(harness, "environment", lambda: {"gpu": "a GPU"})


@pytest.mark.usefixtures("on_cpu")
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_prefill, "SLOW", 300)
    monkeypatch.setattr(bench_prefill, "ONCE", 300)
    monkeypatch.setattr(bench_prefill, "LONGEST_OF_FLASH", 300)
    monkeypatch.setattr(bench_prefill, "check_correctness", lambda model: None)
    arguments = ["--lengths", "600,256", "--densities", "0.5,0.3", "--at", "512", "--repeats", "3"]
    with interpreted("cpu"):
        bench_prefill.main(["--out", str(tmp_path / "prefill.json"), *arguments])
    data = json.loads((tmp_path / "prefill.json").read_text())
    assert data["complete"]
    assert data["settings"]["transformers"] == transformers.__version__
    layer, decode, *prefills = data["rows"]
    assert layer["error"] is decode["error"] is None
    assert (layer["added_to_call"], layer["added_to_parts"], decode["ratio"]) == (0.0, -0.5, 1.0)
    seen = [(r["length"], r["contender"], r["density"], r["median_ms"], r["repeats"]) for r in prefills]
    assert seen == [  # the time is the number of prefills before
        (256, "SDPA cuDNN", None, 1.0, 5),
        (256, "SDPA FlashAttention-2", None, 1.0, 5),
        (256, "flexproxy", 0.5, 1.0, 5),
        (256, "flexproxy", 0.3, 1.0, 5),
        (600, "SDPA cuDNN", None, 0.0, 1),
        (600, "flexproxy", 0.5, 0.0, 1),
        (600, "flexproxy", 0.3, 0.0, 1),
    ]


@pytest.mark.usefixtures("on_cpu")
def test_a_run_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slowest contenders last; what a chunk adds is by the whole prompt of the same contender."""
    monkeypatch.setattr(bench_prefill, "SHORT", (256,))
    monkeypatch.setattr(bench_prefill, "check_correctness", lambda model: None)
    monkeypatch.setattr(chunked, "cudnn_with_lse", with_lse)
    arguments = ["--chunks", "256,384", "--at", "768", "--repeats", "1", "--share", "2"]
    with interpreted("cpu"):
        bench_prefill.main(["--out", str(tmp_path / "chunks.json"), *arguments])
    every = json.loads((tmp_path / "chunks.json").read_text())["rows"]
    assert [row["error"] for row in every] == [None] * len(every)
    rows, sharing = ([row for row in every if row["share"] == share] for share in (1, 2))
    assert [r | {"share": 1} for r in sharing] == [r for r in rows if r["contender"] == "flexproxy"]
    two_parts, lower_right, masked = bench_prefill.IN_CHUNKS
    seen = [(r["part"], r["length"], r["chunk"], r["contender"], r["density"]) for r in rows]
    assert seen == [
        ("chunks", 768, 768, two_parts, None),
        ("chunks", 768, 768, "flexproxy", 0.16),
        ("chunks", 768, 256, two_parts, None),
        ("chunks", 768, 256, "flexproxy", 0.16),
        ("prefill", 256, None, "SDPA cuDNN", None),
        ("prefill", 256, None, "SDPA FlashAttention-2", None),
        ("prefill", 256, None, "flexproxy", 0.15),
        ("chunks", 768, 384, two_parts, None),
        ("chunks", 768, 384, "flexproxy", 0.16),
        ("chunks", 768, 256, lower_right, None),
        ("chunks", 768, 256, masked, None),
    ]
    assert [row["extra_ms_per_chunk"] for row in rows[:4]] == [None, None, 0.0, 0.0]
    assert rows[0]["kept"] is None
    assert 0.16 <= rows[1]["kept"] < rows[3]["kept"] < 1


def with_lse(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """As ``chunked.cudnn_with_lse``."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    out = scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return out, scores.float().logsumexp(-1, keepdim=True)


@pytest.mark.usefixtures("on_cpu")
def test_dense_contenders_in_chunks_are_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a cache with room too; and the gate sees a mask that is aligned wrongly."""
    monkeypatch.setattr(chunked, "cudnn_with_lse", with_lse)
    chunked.register()
    model = bench_prefill.make_model(tiny_config(512))
    tokens = torch.randint(64, (1, 300))
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = model(input_ids=tokens).logits
        for name in bench_prefill.IN_CHUNKS.values():
            model.set_attn_implementation(name)
            cache = chunked.roomy_cache(2, 300)
            parts = [model(input_ids=part, past_key_values=cache).logits for part in tokens.split(120, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)
    for attend in chunked.ATTENTIONS.values():
        bench_prefill.check_chunks(attend)

    def upper_left(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, scale=scale, enable_gqa=True, attn_mask=causal_upper_left(q.shape[2], k.shape[2])
        )

    with pytest.raises(SystemExit, match="correctness gate failed"):
        bench_prefill.check_chunks(upper_left)


@pytest.mark.usefixtures("on_cpu")
def test_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lets a right layer pass, and stops one that attends to what it did not keep."""
    monkeypatch.setattr(bench_prefill, "DTYPE", torch.bfloat16)
    model = bench_prefill.make_model(tiny_config(2048))
    with interpreted("cpu"):
        bench_prefill.check_correctness(model, 1024)

    run = KernelPlan.run

    def with_more(plan: KernelPlan, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
        return run(plan, q, k, v, flexproxy.build(q, k, config=ProxyConfig(gamma=1.0)))

    monkeypatch.setattr(KernelPlan, "run", with_more)
    with interpreted("cpu"), pytest.raises(SystemExit, match="correctness gate failed: error"):
        bench_prefill.check_correctness(model, 1024)
