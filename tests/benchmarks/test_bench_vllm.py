"""The benchmark of serving, without a GPU and without vLLM."""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import bench_vllm, vllm_engine


def test_cases() -> None:
    """Steps always; engines where vLLM is: FlashAttention, and flexproxy at the density asked for."""
    steps = bench_vllm.cases_of([8192, 32768], 16384, 0.2, engines=False)
    assert {case.part for case in steps} == {"step"}
    assert [case.requests for case in steps[:3]] == [((8192, 8192),), ((16384, 32768),), ((2048, 16384),) * 8]
    engines = bench_vllm.cases_of([8192, 32768], 16384, 0.2, engines=True)[len(steps) :]
    assert engines == bench_vllm.cases_of([8192, 32768], 16384, 0.2, engines=True, steps=False)
    assert [(case.part, case.contender, case.density) for case in engines] == [
        ("equality", "flexproxy", None),
        ("engine", "FlashAttention", None),
        ("engine", "flexproxy", 0.2),
        ("real", "FlashAttention", None),
        ("real", "flexproxy", 0.25),
    ]


def test_the_shape_of_the_models() -> None:
    large, small = (vllm_engine.model_config(1024, small) for small in (False, True))
    assert large.keys() == small.keys()
    for config in (large, small):
        assert config["hidden_size"] == config["num_attention_heads"] * config["head_dim"]
        assert config["num_attention_heads"] % config["num_key_value_heads"] == 0


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_an_engine_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(vllm_engine.model_config(1024, small=True)))
    with pytest.raises(RuntimeError, match="No module named 'vllm'"):
        bench_vllm.run_engine(tmp_path, None, {})


def test_an_engine_that_is_stopped_leaves_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(command: list[str], check: bool, timeout: float) -> None:
        Path(command[-1]).write_text(json.dumps({"start_s": 1.5}))
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", stopped)
    assert bench_vllm.run_engine(tmp_path, None, {}, limit_s=2) == {"ended": "after 2 s", "start_s": 1.5}


def test_bits_of_a_real_model_are_by_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = SimpleNamespace(
        is_fast=True,
        bos_token_id=None,
        encode=lambda text, **_: [1] * len(text.split()),
        decode=lambda ids: "word " * len(ids),  # five bytes each
    )
    asked: list[Any] = []

    def engine(folder: Path, settings: Any, work: Any, limit_s: float, model: str) -> dict[str, Any]:
        asked.append((settings, model))
        return {"bits_per_token": [5.0 * (1 + n) for n in range(len(work["texts"]))], "start_s": 1.0}

    monkeypatch.setattr(bench_vllm, "corpus", lambda *_: SimpleNamespace(content=b"word " * 1000))
    monkeypatch.setattr(bench_vllm, "resolve", lambda name: f"models/{name}")
    monkeypatch.setattr(bench_vllm, "load_tokenizer", lambda _: words)
    monkeypatch.setattr(bench_vllm, "run_engine", engine)
    case = bench_vllm.Case("real", "flexproxy", ((64, 64),) * 2, 8192, 0.25)
    row = bench_vllm.measure_real(tmp_path, case, bench_vllm.Options())
    assert row == {"start_s": 1.0, "bits_per_byte": 1.5, "cases": [1.0, 2.0]}
    assert asked == [({"density": 0.25, "min_budget": 256, "when": "always"}, "models/smollm2")]
