"""A model on several devices: the heads over processes, the layers over devices; the logits are those of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # transformers wants it for tp_plan

import transformers

from flexproxy import ProxyConfig
from flexproxy.integrations.transformers import configure
from tests.transformers_models import interpreted, make_model, make_tokens, use

ROOT = Path(__file__).resolve().parents[2]
COMMON: dict[str, Any] = {"gamma": 0.6, "min_budget": 32, "block_size": 32}
FITTING: list[dict[str, Any]] = [
    COMMON | {"num_proxies": 2},
    COMMON | {"num_proxies": 4},
    COMMON | {"groups": [0, 1, 2, 2]},
    COMMON | {"gamma": 1.0, "num_proxies": 1},  # nothing is ranked
]
NOT_FITTING: list[dict[str, Any]] = [COMMON | {"num_proxies": 1}, COMMON | {"groups": [0, 1, 1, 2]}]


def torchrun(*command: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*launcher, *command], capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=300
    )


@pytest.mark.slow
def test_two_ranks_give_the_logits_of_one(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    model: Any = make_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "cases.json").write_text(json.dumps(FITTING + NOT_FITTING))
    done = torchrun(str(ROOT / "tests" / "tensor_parallel_worker.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]

    use(model, "flexproxy")
    for rank in range(2):
        results = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for settings, found in zip(FITTING, results, strict=False):
            configure(model, ProxyConfig(**settings))
            with torch.no_grad(), interpreted("cpu"):
                expected = model(input_ids=make_tokens(1, 300), use_cache=False).logits
            torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4)
        proxies, groups = results[len(FITTING) :]
        assert "num_proxies: expected a multiple of the 2 tensor-parallel ranks" in proxies
        assert "got 1; use ProxyConfig(num_proxies=2)" in proxies
        assert "groups: expected every proxy's heads on one of the 2 tensor-parallel ranks, got proxies [1]" in groups


def spread(family: str, folder: Path, devices: tuple[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a model on the first device, and of one whose last layer is on the second."""
    model: Any = make_model(family)
    model.save_pretrained(folder / "model")
    tokens = make_tokens(2, 300)
    padding = torch.ones_like(tokens)
    padding[0, :40] = 0
    first = (
        "model.embed_tokens",
        "model.rotary_emb",
        "model.rotary_emb_local",
        "model.layers.0",
        "model.norm",
        "lm_head",
    )
    places = dict.fromkeys(first, devices[0]) | {"model.layers.1": devices[1]}
    spread_out = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=places, offload_folder=folder / "offload", attn_implementation="flexproxy"
    )
    use(model, "flexproxy")
    found = []
    device = torch.device(devices[0])
    for each in (model.to(device), spread_out):
        configure(each, ProxyConfig(**COMMON))
        with torch.no_grad(), interpreted(device.type):
            logits = each(input_ids=tokens.to(device), attention_mask=padding.to(device), use_cache=False).logits
        found.append(logits.cpu()[padding.bool()])
    return found[0], found[1]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_offloaded_layers(family: str, tmp_path: Path) -> None:
    one, two = spread(family, tmp_path, ("cpu", "disk"))
    torch.testing.assert_close(two, one)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_layers_on_two_gpus(family: str, tmp_path: Path) -> None:
    one, two = spread(family, tmp_path, ("cuda:0", "cuda:1"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
