"""Whole vLLM engines on a CPU, in fp32: `make test-vllm`. Each is a process of its own, half a minute long.

What a backend for CPUs shares with that for GPUs is everything but the parent and its cache.
"""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
import transformers
import vllm
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

import flexproxy.integrations.transformers
from flexproxy import ProxyConfig
from flexproxy.integrations import vllm as integration
from flexproxy.integrations.vllm import dense, flash_attention
from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
ENGINE: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 8,
    "enable_prefix_caching": True,
    "block_size": 32,
}
COMMON: dict[str, Any] = {"block_size": 32, "num_proxies": 1}
ALL = COMMON | {"gamma": 1.0, "when": "always"}
BUDGET = COMMON | {"gamma": 0.5, "min_budget": 64}
SHARDED = BUDGET | {"num_proxies": 2}

random.seed(0)
LENGTHS = (700, 300, 40, 500, 120, 120, 120, 120)
LONG, MIDDLE, SHORT, OTHER, *CROWD = ([random.randrange(256) for _ in range(length)] for length in LENGTHS)
SHARED = LONG[:512] + MIDDLE[:160]  # begins as LONG, whose pages are kept
MIXED = [(MIDDLE, 12), (SHORT, 12), (OTHER, 6), (LONG[::-1], 6)]
BATCHES = [[(LONG, 6)], [(SHARED, 6)], MIXED, [(prompt, 60) for prompt in CROWD]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    sizes = {"hidden_size": 64, "head_dim": 32, "max_position_embeddings": 4096}
    save_tiny_model(folder / "model", **sizes)
    window = json.loads((folder / "model" / "config.json").read_text())
    window |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    save_tiny_model(folder / "window", **sizes)
    (folder / "window" / "config.json").write_text(json.dumps(window))
    return folder


def start(folder: Path, settings: Any, batches: Any = BATCHES, model: str = "model", **engine: Any) -> tuple[Any, str]:
    """The result of an engine, None where it did not start; and what it said."""
    threads = engine.pop("threads", "nobind")
    case = {"model": str(folder / model), "settings": settings, "engine": ENGINE | engine, "batches": batches}
    name = f"case{random.getrandbits(32)}"
    (folder / f"{name}.json").write_text(json.dumps(case))
    result = folder / f"{name}.result"
    paths = os.pathsep.join(map(str, (ROOT, plug_in(folder))))
    environment = os.environ | {"PYTHONPATH": paths, "VLLM_CPU_OMP_THREADS_BIND": threads}
    command = [sys.executable, "-m", "tests.integrations.serving.worker", str(folder / f"{name}.json"), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=900)
    said = done.stdout + done.stderr
    assert (done.returncode == 0) == result.exists(), said[-3000:]
    return (json.loads(result.read_text()) if result.exists() else None), said


def plug_in(folder: Path) -> Path:
    """A folder on the path in which vLLM finds a plug-in that registers the backend for CPUs, in every process."""
    about = folder / "plug-in" / "flexproxy_cpu-0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: flexproxy-cpu\nVersion: 0\n")
    entry = "flexproxy_cpu = tests.integrations.serving.cpu_backend:register_if_asked"
    (about / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{entry}\n")
    return about.parent


@functools.cache
def stock(folder: Path) -> Any:
    return start(folder, None)[0]["tokens"]


def test_every_block_gives_the_tokens_of_vllm(folder: Path) -> None:
    """One prompt, in chunks; a prefix in the cache; a mixed batch, prefills beside decodes; many at once."""
    result, said = start(folder, ALL)
    assert result["tokens"] == stock(folder)
    attended = result["attended"]
    assert attended[:6] == [[256, 256]] * 2 + [[256, 512]] * 2 + [[188, 700]] * 2  # chunks of LONG, two layers
    assert attended[6:8] == [[160, 672]] * 2  # SHARED, of which 512 tokens were there
    assert any(queries + keys < 512 and queries < keys for queries, keys in attended[8:])
    assert (
        said.count(
            "flexproxy: layers 0-1 prefill sparsely where a prompt has 2 tokens or more: num_proxies=1, gamma=1.0"
        )
        == 1
    )


def test_preemption(folder: Path) -> None:
    """Too few pages for all: some requests give theirs back, and are prefilled again."""
    engine: dict[str, Any] = {"max_model_len": 256, "num_gpu_blocks_override": 16, "enable_prefix_caching": False}
    result, _ = start(folder, ALL, BATCHES[3:], **engine)
    assert result["tokens"] == stock(folder)[3:]
    assert sum(queries for queries, _ in result["attended"]) > 2 * 4 * 120  # more than every prompt once


def test_a_budget_gives_the_tokens_of_transformers(folder: Path) -> None:
    """In the same chunks; there, those of fewer than 128 tokens are dense."""
    result, said = start(folder, BUDGET, BATCHES[:2])
    assert result["tokens"][0] == [in_transformers(folder, BUDGET, LONG, [256, 256, 188])]
    assert result["tokens"][1] == [in_transformers(folder, BUDGET, SHARED, [256, 256, 160])]
    assert result["tokens"] != stock(folder)[:2]
    assert (
        "flexproxy: layers 0-1 prefill sparsely where a prompt has 144 tokens or more: num_proxies=1, gamma=0.5" in said
    )


def test_two_ranks(folder: Path) -> None:
    """Each with half of the heads, and of the proxies."""
    result, said = start(folder, SHARDED, BATCHES[:2], tensor_parallel_size=2, threads="0|1")
    assert result["tokens"][0] == [in_transformers(folder, SHARDED, LONG, [256, 256, 188])]
    assert result["tokens"][1] == [in_transformers(folder, SHARDED, SHARED, [256, 256, 160])]
    assert "num_proxies=2" in said


def in_transformers(folder: Path, settings: dict[str, Any], prompt: list[int], chunks: list[int]) -> list[int]:
    """Six tokens of the model in transformers, greedily, after a prompt that is prefilled in chunks."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", attn_implementation="flexproxy", dtype=torch.float32
    )
    flexproxy.integrations.transformers.configure(model, ProxyConfig(**settings))
    cache = transformers.DynamicCache()
    steps = list(torch.tensor([prompt]).split(chunks, 1))
    tokens: list[int] = []
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        while len(tokens) < 6:
            logits = model(input_ids=steps.pop(0), past_key_values=cache, use_cache=True).logits
            if not steps:
                tokens.append(int(logits[0, -1].argmax()))
                steps.append(torch.tensor([tokens[-1:]]))
    return tokens


def test_layers_that_stay_dense(folder: Path) -> None:
    """A model of sliding windows starts, and says that nothing is sparse."""
    result, said = start(folder, ALL, [[(MIDDLE, 2)]], model="window")
    assert result["attended"] == []
    assert "flexproxy: layers 0-1 stay dense: it has a sliding window" in said


def test_bad_settings_stop_the_engine(folder: Path) -> None:
    result, said = start(folder, {"densty": 0.1}, [[(SHORT, 2)]])
    assert result is None
    line = "additional_config[\"flexproxy\"]: expected names of settings, got 'densty'; did you mean 'density'?"
    assert f"flexproxy: {line}" in said  # in the log
    assert said.rstrip().endswith(f"ValueError: {line}")


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    """May be repeated; the class is there, and dense here, where there is no GPU, as in versions to come."""
    for version, module in (("0.26.0", flash_attention), ("9.9.9", dense)):
        monkeypatch.setattr(vllm, "__version__", version)
        for _ in range(2):
            integration.register()
        backend = AttentionBackendEnum.CUSTOM.get_class()
        assert backend is module.Backend
        assert AttentionBackendEnum[backend.get_name()]
        assert backend.get_impl_cls() is FlashAttentionImpl
    assert issubclass(flash_attention.Layer, FlashAttentionImpl)


def test_another_backend_takes_the_place() -> None:
    """Where FlashAttention cannot serve a layer, the one that vLLM chooses by itself does."""
    asked: dict[str, Any] = dict.fromkeys(AttentionSelectorConfig._fields, False)
    asked |= {"head_size": 64, "dtype": torch.float32, "kv_cache_dtype": None, "block_size": None}
    asked |= {"attn_type": "decoder", "device_capability": DeviceCapability(9, 0)}
    own = (flash_attention.__name__, "Backend")
    assert flash_attention.Backend.validate_configuration(**asked | {"dtype": torch.bfloat16}) == []
    assert flash_attention.Backend.full_cls_name() == own
    assert flash_attention.Backend.validate_configuration(**asked) == []
    assert flash_attention.Backend.full_cls_name() == CPUAttentionBackend.full_cls_name()
    assert flash_attention.Backend.full_cls_name() == own
