"""The benchmarks without a GPU: statistics, files, options, and what is timed and recorded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import flexproxy
from benchmarks import bench_attention, bench_build, bench_calls, bench_memory, contenders, gate, harness, stages
from benchmarks.baselines import METHODS, to_block_mask
from benchmarks.harness import Row
from flexproxy import ProxyConfig
from tests.settings import outliers

MODULES = {"attention": bench_attention, "build": bench_build, "calls": bench_calls, "memory": bench_memory}
ENVIRONMENT = {"gpu": "a GPU"}


# Stand-ins for what needs a GPU


def eager(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, options: dict[str, Any]) -> Tensor:
    out = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out


def eager_attention(q: Tensor, k: Tensor, v: Tensor, *, config: Any = None, when: str = "auto") -> Tensor:
    return eager(q, k, v, flexproxy.build(q, k, config=config), {})


def small_inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randn(1, heads, length, 16, generator=generator) for heads in (8, 2, 2))  # type: ignore[return-value]


# Statistics and files


def test_quantiles() -> None:
    assert harness.quantiles([5.0]) == {"median_ms": 5.0, "p10_ms": 5.0, "p90_ms": 5.0, "repeats": 1}
    assert harness.quantiles([3.0, 1.0]) == {"median_ms": 2.0, "p10_ms": 1.2, "p90_ms": 2.8, "repeats": 2}
    times = [float(x) for x in range(10, -1, -1)]
    assert harness.quantiles(times) == {"median_ms": 5.0, "p10_ms": 1.0, "p90_ms": 9.0, "repeats": 11}


def test_repeats_fit_the_budget() -> None:
    assert harness.repeats_within(300.0, 20.0) == 15
    assert harness.repeats_within(300.0, 5000.0) == harness.MIN_REPEATS
    assert harness.repeats_within(300.0, 0.0) == harness.MAX_REPEATS


def test_write_json_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    harness.write_json(path, {"settings": {"rows": []}, "rows": [1, {"mean": 2.0}]})
    assert path.read_text() == '{\n "settings": {\n  "rows": []\n },\n "rows": [\n1,\n{"mean": 2.0}\n]\n}\n'
    harness.write_json(path, {"rows": [1]})
    assert json.loads(path.read_text()) == {"rows": [1]}
    for data in ({"rows": [1, object()]}, {"rows": [float("nan")]}):
        with pytest.raises((TypeError, ValueError)):
            harness.write_json(path, data)
        assert json.loads(path.read_text()) == {"rows": [1]}
        assert [file.name for file in path.parent.iterdir()] == ["result.json"]


class FakeEvents:
    """CUDA events on a clock that calls of the timed function move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, durations: list[float]) -> None:
        self.now, self.durations, self.log = 0.0, durations, []  # type: float, list[float], list[str]
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = outer.now
                outer.log.append("record")

            def elapsed_time(self, end: Event) -> float:
                return end.time - self.time

        class Cache:
            def zero_(self) -> None:
                outer.now += 1000.0
                outer.log.append("overwrite")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(harness, "_l2_sized_buffer", Cache)

    def run(self) -> None:
        self.now += self.durations.pop(0)
        self.log.append("run")


def test_time_ms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls are thrown away, the third decides the repeats; the cache is overwritten between what is timed."""
    events = FakeEvents(monkeypatch, [9000.0, 500.0, 50.0, 10.0, 30.0, 20.0, 40.0])
    assert harness.time_ms(events.run, budget_ms=200.0) == harness.quantiles([10.0, 20.0, 30.0, 40.0])
    assert events.log == ["run", "run", *["overwrite", "record", "run", "record"] * 5]
    events = FakeEvents(monkeypatch, [1.0] * 6)
    harness.time_ms(events.run, budget_ms=3.0, cold_l2=False)
    assert events.log == ["run", "run", *["record", "run", "record"] * 4]


def test_attempt_records_failures() -> None:
    def fail() -> Row:
        raise RuntimeError("out of\n  memory")

    assert harness.attempt(lambda: {"median_ms": 1.0}) == {"median_ms": 1.0, "error": None}
    assert harness.attempt(fail) == {"error": "RuntimeError: out of memory"}


def test_stage_times() -> None:
    """Kernels are summed by name, over calls; what no pattern fits is "other"; what is no kernel does not count."""
    names = ["_pool_kernel", "_block_logits_kernel", "_scores_kernel", "_rank_kernel", "_block_logits_kernel"]
    names += ["_masses_kernel", "_lists_kernel", "void at::native::copy", "Memset"]
    events: list[dict[str, Any]] = [
        {"cat": "kernel", "name": name, "ts": start, "dur": 1000.0} for start, name in enumerate(names[:-1] * 2)
    ]
    events += [{"cat": "gpu_memset", "name": names[-1], "ts": 99, "dur": 500.0}, {"ph": "M"}]
    events += [{"cat": "cpu_op", "name": "_pool_", "ts": 100, "dur": 1e6}]
    found = stages.stage_times(reversed(events), calls=2)
    assert found == {
        "stage_pool_ms": 1.0,
        "stage_classify_ms": 0.0,
        "stage_scores_ms": 2.0,  # the pass over the keys counts with what follows it
        "stage_rank_ms": 1.0,
        "stage_probe_ms": 2.0,
        "stage_count_ms": 0.0,
        "stage_lists_ms": 1.0,
        "stage_other_ms": 1.25,
        "kernels": 8.5,
    }


# Options and cases


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    "arguments",
    [
        ["--lengths", "0"],
        ["--lengths", "many"],
        ["--lengths"],
        ["--density", "0"],
        ["--densities", "1.5"],
        ["--num-proxies", "-1"],
        ["--budget-ms", "inf"],
        ["--lengths", "8192,0"],
        ["--unknown"],
    ],
)
def test_wrong_options(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        MODULES[name].main(arguments)
    assert exit_info.value.code == 2
    assert f"{arguments[0]}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", MODULES)
def test_without_a_gpu(name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        MODULES[name].main(["--out", str(tmp_path / "x.json")])
    assert list(tmp_path.iterdir()) == []


def test_a_quick_run_replaces_no_full_result(tmp_path: Path) -> None:
    assert harness.result_path("build", None, quick=False) == harness.RESULTS / "build.json"
    assert harness.result_path("build", None, quick=True) == harness.RESULTS / "quick" / "build.json"
    assert harness.result_path("build", tmp_path / "x.json", quick=True) == tmp_path / "x.json"


def test_quick_leaves_given_options_alone() -> None:
    seen: list[Any] = []

    def run(
        *, lengths: harness.Lengths = "1,2", budget_ms: harness.Budget = 300.0, quick: harness.Quick = False
    ) -> None:
        seen.append((lengths, budget_ms, quick))

    run.__annotations__ = {"lengths": harness.Lengths, "budget_ms": harness.Budget, "quick": harness.Quick}
    for words in (["--budget-ms", "1"], ["--quick", "--lengths", "3"], []):
        harness.command(run, words, lengths="7", budget_ms=5.0)
    assert seen == [([1, 2], 1.0, False), ([3], 5.0, True), ([1, 2], 300.0, False)]


def test_cases_cover_what_is_asked() -> None:
    cases = bench_attention.cases_of([4096, 262144, 524288], [0.1, 0.4], 262144, [131072], 0.1)
    assert [(c.kind, c.length, c.density) for c in cases] == [
        ("dense", 4096, None),
        ("sparse", 4096, 0.1),
        ("sparse", 4096, 0.4),
        ("XAttention", 131072, 0.1),
        ("FlexPrefill", 131072, 0.1),
        ("FlashPrefill", 131072, 0.1),
        ("Prism", 131072, 0.1),
        ("dense", 262144, None),
        ("sparse", 262144, 0.03),
        ("sparse", 262144, 0.1),
        ("sparse", 262144, 0.4),
        ("sparse", 524288, 0.1),  # 0.4 would take seconds a call
    ]


@pytest.mark.parametrize("length", [4096, 8192, 131072, 1048576])
@pytest.mark.parametrize("density", harness.fractions(bench_attention.DENSITIES))
def test_min_budget_leaves_room_for_the_density(length: int, density: float) -> None:
    budget = contenders.budget_for(density, length)
    blocks, rows = budget // 128, length // 128
    least = sum(min(blocks, row + 1) for row in range(rows)) / (rows * (rows + 1) / 2)
    assert budget % 128 == 0
    assert 128 <= budget <= 2048
    assert least <= density * 1.1 or budget == 128
    assert budget == 2048 or least > density - 3 / rows


@pytest.mark.filterwarnings("ignore")  # without a GPU the profiler says that it has none
def test_a_profile_without_kernels_is_no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(RuntimeError, match="recorded no kernel"):
        stages.profile_stages(lambda: torch.ones(3).sum())


# The gate


@pytest.fixture
def gate_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "inputs", small_inputs)
    monkeypatch.setattr(gate, "LENGTH", 700)
    monkeypatch.setattr(gate, "WHOLE", 768)
    monkeypatch.setattr(gate, "flex", eager)
    monkeypatch.setattr(flexproxy, "attention", eager_attention)


@pytest.mark.usefixtures("gate_on_cpu")
def test_the_gate_lets_right_results_pass() -> None:
    gate.check_attention(every=True)
    for config in (ProxyConfig(), ProxyConfig(num_proxies=4), outliers()):
        gate.check_selection(config)


@pytest.mark.usefixtures("gate_on_cpu")
@pytest.mark.slow
def test_the_gate_stops_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that drops the blocks, a peer whose lists are another's, attention that is dense, ranks that are off."""

    def dense(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def other_blocks(blocks: Tensor, length: int) -> BlockMask:
        return to_block_mask(blocks.flip(1), length)

    for place, name, wrong, message in (
        (gate, "flex", dense, "kernel 'default': error"),
        (gate, "to_block_mask", other_blocks, "XAttention: error"),
        (flexproxy, "attention", dense, "attention, kernel 'default': error"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, wrong)
            with pytest.raises(SystemExit, match=f"gate failed: {message}"):
                gate.check_attention(every=True)

    def off(*args: Any, **options: Any) -> flexproxy.Selection:
        selection = select(*args, **options)
        return dataclasses.replace(selection, rank=selection.rank.flip(-1))

    select = flexproxy.select
    monkeypatch.setattr(flexproxy, "select", off)
    with pytest.raises(SystemExit, match="gate failed: selection with ProxyConfig"):
        gate.check_selection(ProxyConfig())


# Whole runs, on small inputs, with a clock and kernels of this CPU


def fake_time(run: Callable[[], Any], budget_ms: float = 0.0, cold_l2: bool = True) -> Row:
    run()
    return harness.quantiles([1.0])


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")

    monkeypatch.setattr(flexproxy, "attention", eager_attention)
    monkeypatch.setattr(harness, "environment", lambda: ENVIRONMENT)
    monkeypatch.setattr(gate, "check_attention", lambda every: None)
    monkeypatch.setattr(gate, "check_selection", lambda config: None)
    replacements: dict[str, Any] = {"require_gpu": lambda: None, "inputs": small_inputs, "time_ms": fake_time}
    replacements |= {
        "flex": eager,
        "call_ms": lambda run, repeats: (0.5, 0.6),
        "profile_stages": lambda run: fake_stages(run, 1.0),
    }
    replacements["times_of"] = lambda run: {"host_ms": 0.1 * (run() is not None)}
    replacements["peak_memory"] = lambda run: {"kept_mib": 1.0, "extra_mib": 0.5 * (run() is not None)}
    for module in MODULES.values():
        for name in set(replacements) & set(vars(module)):
            monkeypatch.setattr(module, name, replacements[name])
    bench_build.dense_time.cache_clear()


def fake_stages(run: Callable[[], Any], total: float) -> Row:
    run()
    return {f"stage_{stage}_ms": total / 10 for stage in (*stages.STAGES, "other")} | {"kernels": 8.0}


def result_of(module: ModuleType, path: Path, *arguments: str) -> list[Row]:
    module.main(["--out", str(path), *arguments])
    data = json.loads(path.read_text())
    assert data["complete"] is True
    assert data["environment"] == ENVIRONMENT
    assert "out" not in data["settings"]
    for row in data["rows"]:
        assert all(isinstance(value, (str, int, float, type(None))) for value in row.values()), "rows are flat"
    return list(data["rows"])


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_bench_attention_records_every_contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(bench_attention, "cudnn", missing)
    monkeypatch.setattr(bench_attention, "flash_attention_2", lambda q, k, v: q)
    arguments = ["--lengths", "512,1000", "--densities", "0.3", "--peers-at", "1000", "--peer-density", "0.5"]
    rows = result_of(bench_attention, tmp_path / "attention.json", *arguments)
    seen = [(r["length"], r["contender"], r["part"]) for r in rows]
    each = [("SDPA cuDNN", "dense"), ("SDPA FlashAttention-2", "dense"), ("flex dense", "dense")]
    ours = [("flexproxy", part) for part in ("build", "sparse", "total")]
    theirs = [(name, part) for name in METHODS for part in ("map", "lists", "sparse")]
    assert seen == [(512, *x) for x in each + ours] + [(1000, *x) for x in each + ours + theirs]
    for row in rows:
        if row["contender"] == "SDPA cuDNN":
            assert row["error"] == "RuntimeError: no such kernel"  # and the run went on
            assert "median_ms" not in row
        else:
            assert row["error"] is None
            assert row["median_ms"] == 1.0
    assert all(0.0 < r["density"] <= 1.0 for r in rows if "density" in r)
    assert all(0.0 <= r["threshold"] <= 1.0 for r in rows if r["contender"] in METHODS)


@pytest.mark.usefixtures("on_cpu")
def test_a_case_that_breaks_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> BlockMask:
        raise RuntimeError("broken")

    monkeypatch.setattr(bench_attention, "to_block_mask", broken)
    monkeypatch.setattr(bench_attention, "cases_of", lambda *_: [bench_attention.Case("FlashPrefill", 512, 0.5)])
    rows = result_of(bench_attention, tmp_path / "attention.json")
    theirs = [(r["part"], r["error"]) for r in rows if r["contender"] == "FlashPrefill"]
    assert theirs == [("map", None), ("lists", "RuntimeError: broken"), (None, "RuntimeError: broken")]


@pytest.mark.usefixtures("on_cpu")
def test_bench_calls_says_why_a_call_is_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_calls, "cudnn", lambda q, k, v: q)
    monkeypatch.setattr(bench_calls, "kernel_variants", lambda: {"default": nullcontext, "triton": nullcontext})
    monkeypatch.setattr(flexproxy, "why_dense", lambda *_: "too short")
    rows = result_of(bench_calls, tmp_path / "calls.json", "--lengths", "512")
    ours = [(name, kernel) for kernel in ("default", "triton") for name in ("flexproxy", "flexproxy, auto")]
    kinds = [("SDPA", None), ("SDPA cuDNN", None), *ours]
    wanted = [(turn, *kind) for turn in range(bench_calls.ROUNDS) for kind in kinds]
    assert [(r["round"], r["contender"], r["kernel"]) for r in rows] == wanted
    assert all(r["error"] is None and r["host_ms"] == 0.1 for r in rows)
    assert [r["why_dense"] for r in rows if "why_dense" in r] == [None, "too short"] * 2 * bench_calls.ROUNDS


@pytest.mark.usefixtures("on_cpu")
def test_bench_build_has_stages_and_the_share_of_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_build, "cudnn", lambda q, k, v: q)
    monkeypatch.setattr(bench_build, "NUM_Q_HEADS", 8)
    kinds_of = ["--num-proxies", "1,3", "--rows", "16"]
    arguments = ["--lengths", "512,1000", *kinds_of, "--dense-up-to", "512"]
    rows = result_of(bench_build, tmp_path / "build.json", *arguments)
    kinds = [(1, 4), (3, 4), (8, 16)]
    wanted = [(length, *kind) for length in (512, 1000) for kind in kinds]
    assert [(r["length"], r["num_proxies"], r["query_stride"]) for r in rows] == wanted
    good, impossible, shared, long, *_ = rows
    assert shared["error"] is None
    assert [row["sharing"] for row in rows[:3]] == ["heads", "heads", "rows"]
    assert good["error"] is good["stage_error"] is good["dense_error"] is None
    assert (good["median_ms"], good["cpu_ms"], good["dense_ms"], good["share_of_dense"]) == (1.0, 0.5, 1.0, 1.0)
    assert {f"stage_{stage}_ms" for stage in (*stages.STAGES, "other")} < set(good)
    assert "num_proxies: expected a divisor" in impossible["error"]
    assert impossible["share_of_dense"] is None
    assert long["dense_ms"] is long["share_of_dense"] is long["dense_error"] is None


@pytest.mark.usefixtures("on_cpu")
def test_bench_memory_has_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("Properties", (), {"total_memory": 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    rows = result_of(bench_memory, tmp_path / "memory.json", "--lengths", "512", "--num-proxies", "1,2")
    assert [(r["num_proxies"], r["part"]) for r in rows] == [(1, "build"), (1, "sparse"), (1, "total"), (2, "build")]
    assert all(r["error"] is None and r["kept_mib"] == 1.0 and r["extra_mib"] == 0.5 for r in rows)
    assert rows[0]["inputs_mib"] == 0.4  # 12 heads x 512 x 16 x 4 bytes
