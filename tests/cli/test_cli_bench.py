"""``flexproxy bench``: which rows are compared, and what it says where it cannot measure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from flexproxy import cli
from flexproxy.cli import benchmarking
from flexproxy.cli.benchmarking import BENCHMARKS, Comparison, compare
from flexproxy.cli.inputs import InputError

HERE = {"gpu": "A GPU", "torch": "2.99", "date": "2026-01-02"}


def build_row(length: int, num_proxies: int, **values: Any) -> dict[str, Any]:
    keys = {"length": length, "num_proxies": num_proxies, "density": 0.1, "min_budget": length // 4}
    return keys | {"error": None, "p10_ms": 0.0} | values


def test_rows_are_matched_by_their_case() -> None:
    """Whatever their order, and whatever else is in them; a missing number has no ratio."""
    committed = [
        build_row(8192, 4, median_ms=2.0, dense_ms=1.0),
        build_row(8192, 1, median_ms=4.0, dense_ms=None),
        build_row(8192, 8, median_ms=1.0, dense_ms=1.0),
    ]
    measured = [
        build_row(8192, 1, median_ms=6.0, dense_ms=3.0),
        build_row(8192, 4, median_ms=1.0, dense_ms=1.5),
        build_row(4096, 1, median_ms=7.0),
    ]
    case = {"length": 8192, "num_proxies": 1, "density": 0.1}
    assert compare("build", measured, committed) == [
        Comparison(case, "median_ms", 6.0, 4.0, 1.5, None),
        Comparison(case, "dense_ms", 3.0, None, None, None),
        Comparison(case | {"num_proxies": 4}, "median_ms", 1.0, 2.0, 0.5, None),
        Comparison(case | {"num_proxies": 4}, "dense_ms", 1.5, 1.0, 1.5, None),
        Comparison(case | {"length": 4096}, "median_ms", 7.0, None, None, None),
    ]


def test_what_failed_is_a_row_too() -> None:
    committed = [{"caches": "empty", "total_s": 20.0, "again_ms": 0.0}]
    measured = [
        {"caches": "empty", "error": "RuntimeError: no"},
        {"caches": "warm", "error": "RuntimeError: no"},
    ]
    assert compare("cold", measured, committed) == [
        Comparison({"caches": "empty"}, "total_s", None, 20.0, None, "RuntimeError: no"),
        Comparison({"caches": "empty"}, "again_ms", None, 0.0, None, "RuntimeError: no"),
        Comparison({"caches": "warm"}, "total_s", None, None, None, "RuntimeError: no"),
    ]


def test_a_target_is_part_of_the_case() -> None:
    rows = [{"length": 8192, "sequences": 4, "target": {"density": x}, "seconds": x} for x in (0.1, 0.2)]
    assert [x.committed for x in compare("calibrate", rows, rows[::-1])] == [0.1, 0.2]


def test_keys_that_a_row_lacks_tell_it_apart() -> None:
    common = {"length": 8192, "contender": "flexproxy", "part": "total", "target_density": 0.1}
    rows = [common | {"kernel": name, "median_ms": ms} for name, ms in (("default", 1.0), ("triton", 2.0))]
    rows.append({"length": 8192, "contender": "SDPA cuDNN", "part": "dense", "median_ms": 3.0})
    assert [x.ratio for x in compare("attention", rows, rows[::-1])] == [1.0, 1.0, 1.0]
    assert compare("attention", rows[:1], rows[1:])[0].committed is None


@pytest.mark.parametrize("name", BENCHMARKS)
def test_committed_rows_have_the_keys_and_no_two_the_same_case(name: str) -> None:
    result = benchmarking.committed(name)
    if result is None:
        pytest.skip("not committed yet")
    keys, values = BENCHMARKS[name].keys, BENCHMARKS[name].values
    cases = [json.dumps([row.get(key) for key in keys]) for row in result["rows"]]
    assert len(set(cases)) == len(cases)
    assert all(set(row) & set(keys) for row in result["rows"])
    assert any(row.get(values[0]) for row in result["rows"])


def test_every_benchmark_is_there() -> None:
    found = {path.stem.removeprefix("bench_") for path in (benchmarking.root() / "benchmarks").glob("bench_*.py")}
    assert found == set(BENCHMARKS)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A GPU, and benchmarks that write one row; gives the options that they got."""
    calls: list[list[str]] = []

    def main_of(name: str) -> Callable[[Sequence[str]], None]:
        def main(options: Sequence[str]) -> None:
            calls.append([name, *options])
            print("wrote it")
            rows = [build_row(8192, 1, median_ms=9.0)] if name == "build" else [{"caches": "warm", "total_s": 1.0}]
            Path(options[-1]).write_text(json.dumps({"environment": HERE, "rows": rows}))

        return main

    committed = {"build": {"environment": HERE | {"gpu": "Another"}, "rows": [build_row(8192, 1, median_ms=3.0)]}}
    monkeypatch.setattr(benchmarking, "main_of", main_of)
    monkeypatch.setattr(benchmarking, "committed", committed.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return calls


def test_a_run_is_one_table_beside_the_committed_results(
    measured: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "build", "cold", "--quick", "--output", str(tmp_path / "new")]) == 0
    out, err = capsys.readouterr()
    files = [str(tmp_path / "new" / f"{name}.json") for name in ("build", "cold")]
    assert measured == [["build", "--quick", "--out", files[0]], ["cold", "--quick", "--out", files[1]]]
    assert "measured, A GPU, torch 2.99" in out
    assert "committed, Another, torch 2.99" in out
    (row,) = [line for line in out.splitlines() if "median_ms" in line]
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["median_ms", "9.000", "3.000", "3.00"]
    assert out.splitlines()[-1] == "cold: no committed result"
    assert "wrote it" not in out
    assert "wrote it" in err


def test_json_of_a_run(measured: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "build", "--json", "--output", str(tmp_path)]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["benchmark"] == "build"
    assert (report["measured_on"]["gpu"], report["committed_from"]["gpu"]) == ("A GPU", "Another")
    assert [(row["value"], row["ratio"]) for row in report["rows"]] == [("median_ms", 3.0)]


def test_results_are_replaced_only_when_told_to(
    measured: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cold.json").write_text("precious")
    command = ["bench", "build", "cold", "--output", str(tmp_path)]
    assert cli.main(command) == 2
    assert "cold.json: exists already" in capsys.readouterr().err
    assert not measured
    assert [file.read_text() for file in tmp_path.iterdir()] == ["precious"]
    assert cli.main([*command, "--force"]) == 0
    assert len(measured) == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (SystemExit("the gate failed: ranks differ"), 1, "flexproxy: build: the gate failed: ranks differ"),
        (ModuleNotFoundError("No module", name="triton"), 1, "flexproxy: build: triton is not installed: pip install"),
        (OSError(28, "No space left on device"), 1, "build.json: No space left on device"),
        (KeyboardInterrupt(), 130, "flexproxy: interrupted"),
    ],
)
def test_what_ends_a_run_is_one_line(
    measured: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def broken(_: Any) -> None:
        raise error

    monkeypatch.setattr(benchmarking, "main_of", lambda _: broken)
    assert cli.main(["bench", "build", "--output", str(tmp_path)]) == code
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_what_needs_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "flexproxy: bench: expected a CUDA GPU, torch finds none; --show shows the committed results\n"
    assert cli.main(["bench", "--list", "--json"]) == 0
    assert [entry["benchmark"] for entry in json.loads(capsys.readouterr().out)] == list(BENCHMARKS)
    assert cli.main(["bench", "--list"]) == 0
    assert "prefill" in capsys.readouterr().out
    assert cli.main(["bench", "build", "--show", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["measured_on"] is None
    assert {row["measured"] for row in report["rows"]} == {None}
    result = benchmarking.committed("build")
    assert result is not None
    assert report["rows"][0]["committed"] == result["rows"][0]["median_ms"]


def test_an_unknown_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "speed"]) == 2
    assert "NAME: expected some of build, attention" in capsys.readouterr().err


def test_an_installed_package_says_where_the_benchmarks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmarking, "__file__", str(tmp_path / "flexproxy" / "benchmarking.py"))
    assert cli.main(["bench", "--list"]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert f"no benchmarks in {tmp_path}; they are part of the repository" in err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": 1, "environment": {}}', b"\xff\x00"])
def test_a_damaged_result_is_named(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "build.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"build\.json: expected a result of a benchmark"):
        benchmarking.read(path)
