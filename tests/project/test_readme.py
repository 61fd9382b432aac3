"""The README says nothing that does not work: its code runs, its links and make targets exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import flexproxy
from flexproxy import Selection
from tests.accuracy import skip_unless_flex_compiles

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_code_runs_in_order() -> None:
    skip_unless_flex_compiles("cuda" if torch.cuda.is_available() else "cpu")
    torch._dynamo.reset()  # dynamo counts what other tests compiled towards its limit
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks[:3]:
        exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["selection"], Selection)
    q, k, v = (names[name] for name in "qkv")
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out = names["compiled"](q, k, v, block_mask=names["block_mask"], enable_gqa=True)
    # The early rows keep every block, so there the README's mask is causal attention.
    torch.testing.assert_close(out[:, :, :2048], dense[:, :, :2048], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_code_for_transformers_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    skip_unless_flex_compiles(device)
    from flexproxy.integrations.transformers import configuration

    monkeypatch.chdir(ROOT)
    blocks = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "transformers" in b]
    assert len(blocks) == 1
    names: dict[str, Any] = {"torch": torch, "flexproxy": flexproxy, "device": device}
    exec(compile(blocks[0], "README.md", "exec"), names)
    assert names["tokens"].shape == (1, 4100)
    assert {config.gamma for config in configuration(names["model"]).values()} == {0.9}


def test_figures_of_build() -> None:
    """The table of times is that of the committed result."""
    rows = json.loads((ROOT / "benchmarks/results/build.json").read_text())["rows"]
    found = {row["length"]: row for row in rows if row["num_proxies"] == 1}
    table = re.findall(r"^\| (\d+)([KM]) \| ([\d.]+) \| *([\d.]*) *\| *([\d.]*)(?: %)? *\|$", README, re.MULTILINE)
    assert len(table) == len(found) == 8
    for number, unit, build, dense, share in table:
        row = found[int(number) * {"K": 2**10, "M": 2**20}[unit]]
        decimals = [len(text.partition(".")[2]) for text in (build, dense, share)]
        shares = None if row["share_of_dense"] is None else 100 * row["share_of_dense"]
        values = [row["median_ms"], row["dense_ms"], shares]
        wanted = ["" if x is None else f"{x:.{d}f}" for x, d in zip(values, decimals, strict=True)]
        assert [build, dense, share] == wanted, number


def test_figures_of_attention() -> None:
    """The table of build and attention is that of the committed result."""
    rows = json.loads((ROOT / "benchmarks/results/attention.json").read_text())["rows"]

    def median(length: int, **wanted: Any) -> float:
        (row,) = [row for row in rows if row["length"] == length and wanted.items() <= row.items()]
        return float(row["median_ms"])

    table = re.findall(r"^\| (\d+)K \| ([\d.]+) \| " + r"([\d.]+) \| " * 5 + r"([\d.]+) \|$", README, re.MULTILINE)
    assert len(table) == 7
    for number, density, *shown in table:
        length, ours = (
            int(number) * 2**10,
            {"contender": "flexproxy", "part": "total", "target_density": float(density)},
        )
        sparse = [median(length, kernel=kernel, **ours) for kernel in ("default", "triton")]
        dense = [median(length, contender=f"SDPA {name}", part="dense") for name in ("cuDNN", "FlashAttention-2")]
        assert shown == [f"{x:.1f}" for x in (*sparse, *dense, *(x / sparse[0] for x in dense))], number


def test_figures_of_a_model() -> None:
    """The sentence on a whole model is that of the committed result."""
    rows = json.loads((ROOT / "benchmarks/results/prefill.json").read_text())["rows"]
    ours, cudnn, flash = (
        next(r for r in rows if (r["part"], r["length"], r["contender"], r["density"]) == ("prefill", 131072, *which))
        for which in (("flexproxy", 0.16), ("SDPA cuDNN", None), ("SDPA FlashAttention-2", None))
    )
    second, fast, flash_second = (row["median_ms"] / 1e3 for row in (ours, cudnn, flash))
    text = " ".join(README.split())
    assert f"{second:.1f} s to the first token, beside {fast:.1f} s with cuDNN ({fast / second:.1f} times" in text
    assert f"{flash_second:.1f} s with FlashAttention-2 ({flash_second / second:.1f} times)" in text
    assert f"{ours['peak_mib'] - cudnn['peak_mib']:.0f} MiB more memory" in text


def test_figures_of_quality() -> None:
    """The table and the sentences are those of the committed result."""
    report = pytest.importorskip("benchmarks.quality.report")
    rows = json.loads((ROOT / "benchmarks/results/quality_smollm2.json").read_text())["rows"]
    found = {(row["length"], row["task"], row["method"], row["setting"]): row for row in rows}
    compared = [
        r
        for r in rows
        if r["method"] == "dense"
        or found.keys() >= {(8192, "prose", r["method"], f"density {density}") for density in ("0.25", "0.12")}
    ]
    columns = [(8192, task, f"density {x}") for x in ("0.25", "0.12") for task in ("prose", "code", "single")]
    assert report.columns_markdown(compared, columns, intervals=False) in README

    def lost(length: int, task: str, setting: str) -> float:
        dense, ours = found[length, task, "dense", ""], found[length, task, "flexproxy P 3, stride 4", setting]
        return float(100 * (ours["mean"] / dense["mean"] - 1))

    prose, code = (lost(8192, task, "density 0.25") for task in ("prose", "code"))
    kept = [found[length, "prose", "flexproxy P 3, stride 4", "defaults"]["density"] for length in (4096, 32768)]
    text = " ".join(README.split())
    assert f"lose {prose:.1f} % of the bits on prose and {code:.1f} % on code" in text
    assert f"prose loses {lost(4096, 'prose', 'defaults'):.1f} % at 4K tokens and less than 0.5 % up to 32K" in text
    assert max(lost(length, "prose", "defaults") for length in (8192, 16384, 32768)) < 0.5
    assert f"with {kept[0]:.2f} of the blocks kept at 4K and {kept[1]:.2f} at 32K" in text


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    local = [link for link in links if not link.startswith("https://")]
    assert len(local) >= 3
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_make_targets_exist() -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "lint", "test-oldest", "test-newest", "test-gpu"} <= named
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named - rules == set()
