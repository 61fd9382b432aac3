"""The passes of a record in sum: what every layer kept and took, and the table of it."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexproxy.inspect.recording import Pass, Record
    from flexproxy.inspect.summary import PerHead


@dataclass(frozen=True)
class Totals:
    """The passes of one layer, in sum. Times are milliseconds.

    Attributes:
        sparse, dense: how many passes were.
        density: of every query head, blocks kept / admissible in all sparse passes and sequences; empty without any.
        mass: of every query head, the mean over sparse passes and sequences; empty where it was not asked for.
        build_ms, sparse_ms: of sparse passes, until the BlockMasks were there, and in all.
        dense_ms: of dense passes.
    """

    sparse: int
    dense: int
    density: tuple[float, ...]
    mass: tuple[float, ...]
    build_ms: float
    sparse_ms: float
    dense_ms: float


def totals_of(passes: Sequence[Pass]) -> Totals:
    """The sums over the passes of a layer."""
    sparse, dense = [x for x in passes if x.dense is None], [x for x in passes if x.dense is not None]
    kept = map(math.fsum, _by_head((x.kept for x in sparse), 0))
    admissible = map(math.fsum, _by_head((x.admissible for x in sparse), 0))
    return Totals(
        sparse=len(sparse),
        dense=len(dense),
        density=tuple(part / of if of else 1.0 for part, of in zip(kept, admissible, strict=True)),
        mass=tuple(map(mean, _by_head((x.mass for x in sparse), math.nan))),
        build_ms=math.fsum(x.build_ms or 0.0 for x in sparse),
        sparse_ms=math.fsum(x.total_ms for x in sparse),
        dense_ms=math.fsum(x.total_ms for x in dense),
    )


def _by_head(parts: Iterable[PerHead | None], missing: float) -> Iterable[tuple[float, ...]]:
    """For every head, what it has in all sequences of all passes; where decoders share an index, some have fewer."""
    return zip_longest(*(heads for part in parts if part is not None for heads in part), fillvalue=missing)


def mean(values: Iterable[float]) -> float:
    """Of the numbers among the values; not-a-number if there are none."""
    numbers = [x for x in values if not math.isnan(x)]
    return statistics.fmean(numbers) if numbers else math.nan


def table_of(record: Record) -> str:
    """The record, layer by layer."""
    layers = record.layers
    if not layers:
        return f"{_title(record)}: no forward pass"
    by_layer = {str(layer): totals_of(passes) for layer, passes in layers.items()}
    rows = [_cells(name, totals) for name, totals in by_layer.items()]
    rows.append(_cells("all", together(list(by_layer.values()))))
    shown = [name for name in rows[0] if name != "mass" or rows[-1]["mass"]]
    table = [dict(zip(shown, shown, strict=True)), *rows]
    lines = ["".join(f"{row[name]:>{len(name) + 3 if ' ' in name else 9}}" for name in shown) for row in table]
    return "\n".join([f"{_title(record)}: {_lengths(layers)}", *lines, *_notes(layers)])


def _title(record: Record) -> str:
    return f"{record.model['class']}, {record.environment['device']}"


def together(totals: Sequence[Totals]) -> Totals:
    """All layers: heads after heads, and sums."""
    return Totals(
        sparse=sum(x.sparse for x in totals),
        dense=sum(x.dense for x in totals),
        density=tuple(chain.from_iterable(x.density for x in totals)),
        mass=tuple(chain.from_iterable(x.mass for x in totals)),
        build_ms=math.fsum(x.build_ms for x in totals),
        sparse_ms=math.fsum(x.sparse_ms for x in totals),
        dense_ms=math.fsum(x.dense_ms for x in totals),
    )


def _cells(name: str, x: Totals) -> dict[str, str]:
    return {
        "layer": name,
        "sparse": str(x.sparse),
        "density": f"{mean(x.density):.3f}" if x.density else "",
        "least": f"{min(x.density):.3f}" if x.density else "",
        "most": f"{max(x.density):.3f}" if x.density else "",
        "mass": f"{mean(x.mass):.4f}" if x.mass else "",
        "build ms": f"{x.build_ms:.2f}" if x.sparse else "",
        "sparse ms": f"{x.sparse_ms:.2f}" if x.sparse else "",
        "dense": str(x.dense),
        "dense ms": f"{x.dense_ms:.2f}" if x.dense else "",
    }


def _lengths(layers: Mapping[int, Sequence[Pass]]) -> str:
    passes = max(layers.values(), key=len)
    times = "1 pass" if len(passes) == 1 else f"{len(passes)} passes"
    queries, keys = sum(x.num_queries for x in passes), max(x.num_keys for x in passes)
    return f"{times} with {queries} queries and up to {keys} keys"


def _notes(layers: Mapping[int, Sequence[Pass]]) -> list[str]:
    """What the columns are, and why passes were dense."""
    reasons = Counter(x.dense for passes in layers.values() for x in passes)
    total = reasons.total()
    return [
        "density: blocks kept / admissible in sparse passes, the mean, least and most of the heads",
        *(f"dense in {n} of {total} layer passes: {reason}" for reason, n in reasons.items() if reason is not None),
    ]
