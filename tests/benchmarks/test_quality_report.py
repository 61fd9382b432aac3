"""What benchmarks/quality says of its results: intervals, differences, tables, the plot, and results joined."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from benchmarks.quality import evaluate, pool, report
from benchmarks.quality.intervals import bootstrap, wilson
from benchmarks.quality.methods import BASELINES, methods_of
from flexproxy import ProxyConfig

# Intervals


@pytest.mark.parametrize(  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_bootstrap_is_that_of_a_normal_mean_where_there_are_many() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    interval = bootstrap(values.tolist())
    half = 1.96 * float(values.std()) / math.sqrt(400)
    assert interval == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=0.1 * half)
    assert bootstrap(values.tolist()) == interval
    assert bootstrap([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert bootstrap([2.0]) is None


# Tables and the plot


def row(method: str, task: str, density: float, values: list[Any], setting: str = "density 0.1") -> dict[str, Any]:
    metric = "exact" if task == "single" else "bits_per_byte"
    cases = [{"seed": seed, metric: value} for seed, value in enumerate(values)]
    place = {"length": 4096, "task": task, "method": method, "setting": setting, "density": density, "error": None}
    return place | evaluate.summarize(metric, cases) | {"cases": cases}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        row("dense", "single", 1.0, [[True, True], [True, True]], ""),
        row("flexproxy P 1, stride 4", "single", 0.3, [[True, True], [True, False]], "density 0.3"),
        row("flexproxy P 1, stride 4", "single", 0.1, [[True, False], [False, False]]),
        row("oracle", "single", 0.1, [[True, True], [True, False]]),
        row("dense", "text", 1.0, [1.0, 3.0], ""),
        row("flexproxy P 1, stride 4", "text", 0.1, [1.5, 3.5]),
        row("oracle", "text", 0.1, [1.25, 3.75]),
        {"length": 4096, "task": "text", "method": "Prism", "setting": "density 0.1", "error": "RuntimeError: no"},
    ]


def test_series(rows: list[dict[str, Any]]) -> None:
    exact, text = report.panels(rows).values()
    lines = report.series(exact)
    assert list(lines) == ["flexproxy P 1, stride 4", "oracle"]
    assert [(density, drawn.mean) for density, drawn in lines["flexproxy P 1, stride 4"]] == [(0.1, 25.0), (0.3, 75.0)]
    assert lines["oracle"][0][1] == pytest.approx((75.0, *(100 * end for end in wilson(3, 4))), abs=1e-3)
    bits = report.series(text)
    assert bits["flexproxy P 1, stride 4"] == [(0.1, (0.5, 0.5, 0.5))], "the texts differ, the loss does not"
    assert bits["oracle"] == [(0.1, (0.5, 0.25, 0.75))]


def test_tables(rows: list[dict[str, Any]]) -> None:
    exact, text = report.panels(rows).values()
    assert report.cells(exact[0], exact[0])[2:] == ("1.000", "100.0 (51.0 to 100.0)", "")
    assert report.cells(exact[2], exact[0])[4] == "-75.0 (-100.0 to -50.0)"
    assert report.cells(text[1], text[0])[3:] == ("2.5000", "+0.5000 (+0.5000 to +0.5000)")
    assert [table.title for table in report.tables(rows)][2] == "failed"
    rows[3]["density"] = 0.123
    assert report.markdown(rows, 4096, "single").splitlines() == [
        "| method | density 0.3 | density 0.1 |",
        "| --- | --- | --- |",
        "| flexproxy P 1, stride 4 | 75.0 (30.1 to 95.4) | 25.0 (4.6 to 69.9) |",
        "| oracle |  | 75.0 (30.1 to 95.4), density 0.123 |",
    ]
    assert report.markdown(rows, 4096, "text").splitlines()[2:] == [
        "| flexproxy P 1, stride 4 | +0.5000 (+0.5000 to +0.5000) |",
        "| oracle | +0.5000 (+0.2500 to +0.7500) |",
    ]


def test_the_plot_draws_the_rows(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    data = {"rows": rows, "settings": {"model": {"name": "tiny"}}, "environment": {"device": "CPU"}}
    figure = report.figure(data, report.panels(rows))
    exact, text = figure.axes
    assert drawn_of(exact)["flexproxy P 1, stride 4"] == [(0.1, 25.0), (0.3, 75.0)]
    assert drawn_of(text)["oracle"] == [(0.1, 0.5)]
    (dense,) = (line for line in exact.lines if line.get_label() == "dense")
    assert set(map(float, list(dense.get_ydata()))) == {100.0}  # type: ignore[arg-type]
    assert (exact.get_ylabel(), text.get_ylabel()) == ("exact answers, %", "bits per byte, more than dense")
    (legend,) = figure.legends
    assert sorted(label.get_text() for label in legend.get_texts()) == ["dense", "flexproxy P 1, stride 4", "oracle"]
    report.draw(data, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    report.draw(data | {"rows": rows[-1:]}, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def drawn_of(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {
        container.get_label(): list(zip(*(map(float, x) for x in container.lines[0].get_data()), strict=True))
        for container in axes.containers
    }


def test_no_two_methods_look_alike() -> None:
    configs = [ProxyConfig(num_proxies=p, stride=s) for p in (1, 2, 4) for s in (1, 2, 4)]
    every = [method.name for method in methods_of(configs, BASELINES, [0.1], [], 128, compensate=True)]
    styles = report.styles(every)
    assert set(styles) >= set(every) - {"dense"}
    looks = [tuple(sorted((key, str(value)) for key, value in style.items())) for style in styles.values()]
    assert len(set(looks)) == len(looks)


# Several models


def result_of(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    settings = {"sequences": 2, "model": {"name": name, "fingerprint": name[::-1], "dtype": "float32"}}
    rows = [row | {"seconds": 1.0} for row in rows]
    return {"environment": {"device": "CPU", "date": name}, "settings": settings, "complete": True, "rows": rows}


def test_results_of_several_models_are_joined(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    first = result_of(rows[:7], "seed0")
    other = result_of([row("dense", "single", 1.0, [[True, False], [False, False]], ""), *rows[1:7]], "seed1")
    other["rows"][1]["density"] = 0.5
    for n, result in enumerate((first, other)):
        (tmp_path / f"{n}.json").write_text(json.dumps(result))
    pool.main([str(tmp_path / "0.json"), str(tmp_path / "1.json"), "--out", str(tmp_path / "all.json")])
    data = json.loads((tmp_path / "all.json").read_text())
    assert data["settings"]["model"]["name"] == "seed0, seed1"
    dense, ours = data["rows"][:2]
    assert (dense["number"], dense["mean"]) == (8, 0.625)
    assert (dense["low"], dense["high"]) == pytest.approx(wilson(5, 8), abs=1e-5)
    assert ours["density"] == 0.4
    assert [case["seed"] for case in ours["cases"]] == [0, 1, 0, 1]
    assert data["rows"][4]["mean"] == 2.0
    assert (tmp_path / "all.png").exists()


def test_what_does_not_belong_together_is_not_joined(rows: list[dict[str, Any]]) -> None:
    first, other = result_of(rows[:7], "seed0"), result_of(rows[:7], "seed1")
    for bad in ([first], [first, other | {"settings": other["settings"] | {"sequences": 3}}]):
        with pytest.raises(ValueError, match="FILE: expected two results or more of the same settings"):
            pool.pool(bad)
    with pytest.raises(ValueError, match="FILE: expected complete results without failed cells"):
        pool.pool([first, other | {"complete": False}])
