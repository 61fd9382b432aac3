"""The README says nothing that does not work: its code runs, its links and make targets exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import flexproxy
from tests.accuracy import skip_unless_flex_compiles
from tests.release_address import LINK
from tests.tiny_model import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def code_of(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_length() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.slow
def test_code_runs_in_order() -> None:
    skip_unless_flex_compiles("cpu")
    torch._dynamo.reset()  # dynamo counts what other tests compiled towards its limit
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    blocks = code_of("python")
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    q, k, v = (names[name] for name in "qkv")
    assert flexproxy.select(q, k).density().mean() < 0.5  # the inputs have structure: some blocks are left out
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (names["out"] - dense).norm() < 0.1 * dense.norm()
    assert flexproxy.why_dense(q, k) is None
    documents = torch.arange(20480) // 8000
    assert names["selection"].density().max() <= 1
    across = documents[::128][:, None] > documents[127::128][None]  # blocks of which no pair shares a document
    assert not (names["selection"].block_map() & across).any()


def test_code_for_transformers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model in place of one from the hub: without the added lines it is dense, with them sparse."""
    transformers = pytest.importorskip("transformers")
    (diff,) = code_of("diff")
    program = "\n".join(line[1:] for line in diff.splitlines() if line[0] != "-")
    assert sum(line[0] == "+" for line in diff.splitlines()) == 2
    folder = save_tiny_model(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained

    class Prompt(dict[str, torch.Tensor]):
        def to(self, device: str) -> Prompt:
            return self

    def tokenizer(text: str, return_tensors: str) -> Prompt:
        return Prompt(input_ids=torch.tensor([list(text.encode())[:300]]))

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **wanted: load(folder, **wanted)
    )
    names: dict[str, Any] = {}
    exec(compile(program, "README.md", "exec"), names)
    assert names["model"].config._attn_implementation == "flexproxy"


def test_links_lead_somewhere() -> None:
    links = re.findall(LINK, README)
    local = [link for link in links if not link.startswith("https://")]
    assert len(local) >= 3
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_make_targets_exist() -> None:
    named = set(re.findall(r"`make ([a-z-]+)", " ".join(README.split())))
    assert {"demo", "test", "test-gpu", "bench"} <= named
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named - rules == set()
