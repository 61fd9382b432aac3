"""The project's benchmarks, found beside the package, and one run of them beside another.

The benchmarks are part of the repository and not of the package. Everything here returns data; ``flexproxy.cli`` prints
it.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from flexproxy.cli.inputs import InputError

Row: TypeAlias = "Mapping[str, Any]"


class Benchmark(NamedTuple):
    """What the rows of a benchmark are told apart by, and what is compared of them; units are in the names."""

    about: str
    keys: tuple[str, ...]
    values: tuple[str, ...]


BENCHMARKS = {
    "build": Benchmark(
        "time of build, beside dense attention",
        ("length", "num_proxies", "query_choice", "query_stride", "density"),
        ("median_ms", "dense_ms"),
    ),
    "attention": Benchmark(
        "time of sparse attention, beside dense attention and peers",
        ("length", "contender", "part", "kernel", "target_density", "min_budget"),
        ("median_ms",),
    ),
    "memory": Benchmark(
        "device memory of build and attention",
        ("length", "num_proxies", "density", "part"),
        ("kept_mib", "extra_mib"),
    ),
    "tiles": Benchmark("tiles of the kernels, options of flex_attention", ("part", "choice", "mask"), ("median_ms",)),
    "cold": Benchmark("a cold process, to the first result", ("caches",), ("total_s", "again_ms")),
    "prefill": Benchmark(
        "time to first token of a model in transformers",
        ("part", "length", "contender", "density"),
        ("median_ms", "peak_mib", "layer_ms", "flexproxy_ms"),
    ),
    "calibrate": Benchmark("a calibration", ("length", "sequences", "target"), ("seconds", "peak_mib")),
}


@dataclass(frozen=True)
class Comparison:
    """One number of one case, measured and committed.

    Attributes:
        case: what the row is told apart by, the names and their values.
        value: the name of the number, with its unit.
        measured, committed: None where there is none.
        ratio: measured / committed; None where one of them is missing.
        error: why it could not be measured.
    """

    case: dict[str, Any]
    value: str
    measured: float | None
    committed: float | None
    ratio: float | None
    error: str | None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def compare(name: str, measured: Sequence[Row], committed: Sequence[Row]) -> list[Comparison]:
    """The numbers of measured rows beside those of the committed rows of the same case; the others are left out."""
    keys, values = BENCHMARKS[name].keys, BENCHMARKS[name].values
    known = {_case(row, keys): row for row in committed}
    found = []
    for row in measured:
        other = known.get(_case(row, keys), {})
        error = row.get("error")
        for value in values:
            ours, theirs = row.get(value), other.get(value)
            if ours is None and theirs is None and not (error and value == values[0]):
                continue
            ratio = round(ours / theirs, 4) if ours is not None and theirs else None
            case = {key: row[key] for key in keys if row.get(key) is not None}
            found.append(Comparison(case, value, ours, theirs, ratio, error))
    return found


def _case(row: Row, keys: Sequence[str]) -> str:
    return json.dumps([row.get(key) for key in keys], sort_keys=True)  # a target is a dict


def root() -> Path:
    """The repository that this package is part of.

    Raises:
        InputError: it is none.
    """
    folder = Path(__file__).resolve().parent.parent
    if not (folder / "benchmarks" / "harness.py").is_file():
        raise InputError(
            f"no benchmarks in {folder}; they are part of the repository, not of the installed package: clone it, and "
            'install it from there with pip install -e ".[all]"'
        )
    return folder


def committed(name: str) -> dict[str, Any] | None:
    """The committed result of a benchmark, as ``benchmarks/harness.py`` describes it; None if there is none."""
    path = root() / "benchmarks" / "results" / f"{name}.json"
    return read(path) if path.is_file() else None


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        InputError: it is none.
    """
    try:
        data = json.loads(path.read_text())
        if isinstance(data["rows"], list) and isinstance(data["environment"], dict):
            return dict(data)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: expected a result of a benchmark, got something else; measure again")


def main_of(name: str) -> Callable[[Sequence[str]], None]:
    """The ``main`` of a benchmark's module, which takes its options."""
    folder = str(root())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    main: Callable[[Sequence[str]], None] = importlib.import_module(f"benchmarks.bench_{name}").main
    return main
