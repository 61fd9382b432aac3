"""What a layer does in vLLM, and in words: without vLLM."""

from __future__ import annotations

import pytest
import torch

from flexproxy import ProxyConfig
from flexproxy.integrations.vllm.layers import Heads, Plan, description, layer_index, rehearsals
from flexproxy.integrations.vllm.versions import why_unsupported

HEADS = Heads(8, 2, 64, torch.float32, torch.device("cpu"))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if an estimate and a kept block cost nothing: settings and lengths alone decide."""
    monkeypatch.setattr("flexproxy.sparse.plan.SPARSE_COST", 0.0)
    monkeypatch.setattr("flexproxy.sparse.plan.CPU_BUILD", 0.0)


@pytest.mark.usefixtures("free")
def test_whether_it_pays() -> None:
    config = ProxyConfig(min_budget=1024)
    plan = Plan(config, config)
    assert HEADS.pays(plan, 512, 2048)
    assert not HEADS.pays(plan, 64, 2048)  # fewer than a block
    assert not HEADS.pays(plan, 512, 1024)  # covered by the budget
    always = Plan(config, config, "always")
    assert HEADS.pays(always, 64, 64)
    dense = Plan(config, None, "always", "it has a sliding window")
    assert not HEADS.pays(dense, 512, 2048)


@pytest.mark.usefixtures("free")
def test_shortest_prompt() -> None:
    config = ProxyConfig(min_budget=1024)
    assert HEADS.shortest(Plan(config, config), 4096, 32768) == 1025
    assert HEADS.shortest(Plan(config, config), 64, 32768) is None  # steps of less than a block
    assert HEADS.shortest(Plan(config, config), 4096, 1024) is None
    assert HEADS.shortest(Plan(config, None), 4096, 32768) is None


def test_description() -> None:
    config, other = ProxyConfig(gamma=0.9), ProxyConfig()
    sparse, never = Plan(config, config), Plan(other, other)
    dense = Plan(config, None, "auto", "it has a sliding window")
    plans = {0: sparse, 1: dense, 2: sparse, 3: dense, 4: never}
    assert description(plans, {sparse: 9000, dense: None, never: None}) == [
        "layers 0, 2 prefill sparsely where a prompt has 9000 tokens or more: gamma=0.9",
        "layers 1, 3 stay dense: it has a sliding window",
        "layers 4 stay dense: with the defaults no prompt of this server is long enough",
    ]


@pytest.mark.parametrize(("queries", "keys"), [(16384, 131136), (8192, 4000), (256, 300), (16, 8)])
def test_rehearsals(queries: int, keys: int) -> None:
    pairs = rehearsals(queries, keys)
    assert all(1 < q <= k <= keys and q <= queries for q, k in pairs)
    assert pairs[-1] == (min(queries, keys), keys)  # the longest


def test_rehearsals_compile_for_any_length() -> None:
    """Rows of every power of two of blocks, whole blocks and not, and prompts that are one step."""
    pairs = rehearsals(16384, 131136)
    for whole, most in ((True, 1024), (False, 2048)):
        alike = [(q, k) for q, k in pairs if (q % 128 == 0 and k % 128 == 0) == whole]
        widths = {1 << (-(-k // 128) - 1).bit_length() for _, k in alike}
        assert widths == {8, 16, 32, 64, 128, 256, 512, 1024, most}
        assert {q == k for q, k in alike} == {True, False}
        for same in (True, False):  # two numbers of query blocks where it is sparse, or kernels are for one alone
            assert len({-(-q // 128) for q, k in alike if k > 8192 and (q == k) == same}) == 2


def test_layer_index() -> None:
    assert layer_index("model.layers.11.self_attn.attn") == 11
    assert layer_index("thinker.layers.3.block.0.attn") == 3
    assert layer_index("attn") == 0


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.33.1", "0.27.0rc1", "0.26.0+cpu"])
def test_supported_versions(version: str) -> None:
    assert why_unsupported(version) is None


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0", "dev", "0.x.1"])
def test_other_versions(version: str) -> None:
    assert version in (why_unsupported(version) or "")
