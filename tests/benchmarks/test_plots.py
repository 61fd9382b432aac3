"""The plots of the benchmarks draw the data of the result files, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness, plots, stages
from benchmarks.harness import Row


def synthetic(folder: Path) -> None:
    """Result files with times that follow from a few rates, as a GPU would give them, and one failure each."""
    lengths = [2**i for i in range(12, 20)]

    def row(length: int, contender: str, part: str, ms: float, **more: Any) -> Row:
        return {"length": length, "contender": contender, "part": part, "median_ms": ms, "error": None, **more}

    rows: list[Row] = []
    for length in lengths:
        work = (length / 131072) ** 2
        rows += [
            row(length, "SDPA cuDNN", "dense", 250 * work),
            row(length, "SDPA FlashAttention-2", "dense", 420 * work),
        ]
        for density in (0.02, 0.05, 0.1, 0.2, 0.4):
            both = {"target_density": density, "density": round(density * 1.03, 4)}
            build, sparse = 0.2 + 0.6 * work, 0.05 + 270 * density * work
            rows.append(row(length, "flexproxy", "build", build, **both))
            rows.append(row(length, "flexproxy", "sparse", sparse, kernel="default", **both))
            rows.append(row(length, "flexproxy", "total", build + sparse, kernel="default", **both))
            rows.append(row(length, "flexproxy", "total", 1.2 * (build + sparse), kernel="triton", **both))
    for name, ms in (("XAttention", 22.0), ("FlexPrefill", 14.0), ("FlashPrefill", 6.0)):
        both = {"target_density": 0.1, "density": 0.1004}
        rows += [row(131072, name, "map", ms, **both), row(131072, name, "lists", 0.4, **both)]
        rows.append(row(131072, name, "sparse", 27.0, kernel="default", **both))
    rows.append({"length": 1048576, "contender": "SDPA cuDNN", "part": "dense", "error": "out of memory"})
    build_rows, memory_rows = [], []
    for length in lengths:
        for n, proxies in enumerate((1, 4, 8)):
            ms = (0.2 + 0.6 * (length / 131072) ** 2) * (1 + n)
            stage = {f"stage_{name}_ms": ms * (i + 1) / 50 for i, name in enumerate((*stages.STAGES, "other"))}
            dense = {"dense_ms": 250 * (length / 131072) ** 2 if length < 262144 else None}
            build_rows.append(row(length, "", "", ms, num_proxies=proxies, stage_error=None, **dense, **stage))
            mib = {"kept_mib": 2.5 * 128 * (length / 131072) ** 2, "extra_mib": 40 * length / 131072 * (1 + n)}
            for part in ("build", "sparse") if proxies == 1 else ("build",):
                found = {"length": length, "num_proxies": proxies, "part": part, "error": None, **mib}
                memory_rows.append(found)
    prefill_rows: list[Row] = [
        {"part": "decode", "length": 131072, "contender": "flexproxy", "ratio": 1, "error": None}
    ]
    for length in (32768, 131072):
        work, peak = (length / 131072) ** 2, {"peak_mib": length / 4}
        prefill_rows.append(row(length, "SDPA cuDNN", "prefill", 12000 * work, density=None, **peak))
        prefill_rows.append(row(length, "flexproxy", "prefill", 5000 * work, density=0.16, **peak))
    data_of = {"attention": rows, "build": build_rows, "memory": memory_rows, "prefill": prefill_rows}
    for name, data in data_of.items():
        environment = {"gpu": "NVIDIA H200 (synthetic)"}
        harness.write_json(folder / f"{name}.json", {"environment": environment, "complete": True, "rows": data})


def lines_of(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_label(): list(zip(*(map(float, xs) for xs in line.get_data()), strict=True))
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def drawn(tmp_path: Path, name: str) -> tuple[Any, list[Row]]:
    pytest.importorskip("matplotlib")
    synthetic(tmp_path)
    source, plot = plots.PLOTS[name]
    data = json.loads((tmp_path / f"{source}.json").read_text())
    return plot(data, plots.Wanted()), data["rows"]


def rows_where(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if wanted.items() <= row.items()]


def test_plot_of_times_shows_the_rows(tmp_path: Path) -> None:
    figure, rows = drawn(tmp_path, "time")
    lines = lines_of(figure.axes[0])
    ours: Row = {"contender": "flexproxy", "target_density": 0.1}
    for label, wanted in (
        ("dense cuDNN", {"contender": "SDPA cuDNN", "error": None}),
        ("dense FlashAttention-2", {"contender": "SDPA FlashAttention-2"}),
        ("flexproxy, build + attention", ours | {"part": "total", "kernel": "default"}),
        ("flexproxy, build alone", ours | {"part": "build"}),
    ):
        assert lines.pop(label) == [(r["length"], r["median_ms"]) for r in rows_where(rows, **wanted)]
    assert lines == {}
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    assert "NVIDIA H200" in figure.get_suptitle()
    assert "Hq 32" in figure.get_suptitle()
    assert figure.axes[0].get_ylabel() == "milliseconds"


def test_plot_of_speed_ups_shows_the_rows(tmp_path: Path) -> None:
    figure, rows = drawn(tmp_path, "speedup")
    for axes, dense in zip(figure.axes, ("SDPA FlashAttention-2", "SDPA cuDNN"), strict=True):
        lines = lines_of(axes)
        assert list(lines) == ["32K", "64K", "128K", "256K", "512K"]
        (base,) = rows_where(rows, contender=dense, length=131072)
        totals = rows_where(rows, contender="flexproxy", part="total", kernel="default", length=131072)
        assert lines["128K"] == [(r["density"], base["median_ms"] / r["median_ms"]) for r in totals]


def test_plot_of_prefills_shows_the_rows(tmp_path: Path) -> None:
    figure, rows = drawn(tmp_path, "prefill")
    for axes, column, unit in zip(figure.axes, ("median_ms", "peak_mib"), (1000, 1024), strict=True):
        lines = lines_of(axes)
        wanted = {"dense cuDNN": "SDPA cuDNN", "flexproxy, density 0.16": "flexproxy"}
        assert sorted(lines) == sorted(wanted)
        for label, contender in wanted.items():
            found = rows_where(rows, part="prefill", contender=contender)
            assert lines[label] == [(r["length"], r[column] / unit) for r in found]


def test_plot_of_peers_shows_the_rows(tmp_path: Path) -> None:
    figure, rows = drawn(tmp_path, "peers")
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["XAttention", "FlexPrefill", "FlashPrefill", "flexproxy"]
    at = rows_where(rows, length=131072, target_density=0.1)
    for container, parts in zip(axes.containers, (("map", "build"), ("lists",), ("sparse",)), strict=True):
        for name, bar in zip(names, container, strict=True):
            found = [r for r in at if r["contender"] == name and r["part"] in parts]
            assert bar.get_width() == pytest.approx(found[0]["median_ms"] if found else 0.0)
    assert any("density 0.100" in text.get_text() for text in axes.texts)


def test_plot_of_stages_shows_the_rows(tmp_path: Path) -> None:
    figure, rows = drawn(tmp_path, "stages")
    axes = figure.axes[0]
    labels = [container.get_label() for container in axes.containers]
    assert labels == [*stages.STAGES, "other", "gaps"]
    for row, place in zip(rows_where(rows, length=131072), range(3), strict=True):
        widths = [container[place].get_width() for container in axes.containers]
        assert widths[:-1] == pytest.approx([row[f"stage_{name}_ms"] for name in labels[:-1]])
        assert sum(widths) == pytest.approx(row["median_ms"])


def test_plot_of_build_shows_the_rows(tmp_path: Path) -> None:
    figure, rows = drawn(tmp_path, "build")
    lines = lines_of(figure.axes[0])
    assert lines.pop("dense cuDNN") == [
        (r["length"], r["dense_ms"]) for r in rows_where(rows, num_proxies=1) if r["dense_ms"] is not None
    ]
    assert lines == {
        f"build, P = {n}": [(r["length"], r["median_ms"]) for r in rows_where(rows, num_proxies=n)] for n in (1, 4, 8)
    }


def test_plot_of_memory_shows_the_rows(tmp_path: Path) -> None:
    figure, rows = drawn(tmp_path, "memory")
    lines = lines_of(figure.axes[0])
    eight = rows_where(rows, num_proxies=8, part="build")
    assert lines["build, P = 8"] == [(r["length"], r["extra_mib"]) for r in eight]
    one = rows_where(rows, num_proxies=1, part="build")
    assert lines["the BlockMask itself"] == [(r["length"], r["kept_mib"]) for r in one]


def test_all_plots_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    synthetic(tmp_path)
    plots.main(["--results", str(tmp_path)])
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".json") == sorted(
        f"{name}.png" for name in plots.PLOTS
    )


def test_plots_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    synthetic(tmp_path)
    (tmp_path / "build.json").unlink()
    unfinished = json.loads((tmp_path / "memory.json").read_text()) | {"complete": False}
    harness.write_json(tmp_path / "memory.json", unfinished)
    with pytest.raises(SystemExit) as exit_info:
        plots.main(["speedup", "stages", "memory", "--results", str(tmp_path)])
    message = str(exit_info.value.code)
    assert "python -m benchmarks.bench_build" in message
    assert "not from a finished run" in message
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".png"] == ["speedup.png"]
    titles = []
    monkeypatch.setattr(plots, "save", lambda figure, path: titles.append((path, figure.get_suptitle())))
    plots.main(["memory", "--unfinished", "--results", str(tmp_path), "--out", "elsewhere"])
    assert [path for path, _ in titles] == [Path("elsewhere/memory.png")]
    assert "a run that was stopped" in titles[0][1]
    with pytest.raises(SystemExit) as exit_info:
        plots.main(["times"])
    assert exit_info.value.code == 2


@pytest.mark.parametrize(("number", "text"), [(4096, "4K"), (131072, "128K"), (2**20, "1M"), (1000, "1000")])
def test_tokens(number: int, text: str) -> None:
    assert plots.tokens(number) == text
