"""What the layers of a running model kept and how long they took: passes, their sums, and the table of them."""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from flexproxy.config import ProxyConfig, changed_fields
from flexproxy.files import write_json
from flexproxy.inspect.summary import PerHead

if TYPE_CHECKING:
    from flexproxy.selection import Selection


@dataclass(frozen=True)
class Pass:
    """One forward pass through the attention of one layer. Nested tuples are ``[B][Hq]``, None where it was dense.

    Attributes:
        num_queries, num_keys: Sq, Skv, in tokens.
        dense: why it was dense, in a few words; None where it was sparse.
        config: the settings; None where the layer got no BlockMask.
        kept, admissible: numbers of blocks.
        mass: share of dense attention's probability that the kept blocks hold, of a sample of rows
            (``flexproxy.stats.recovered_mass``); None unless it was asked for.
        build_ms: time until the BlockMask was made; None where it was dense.
        total_ms: time of the whole attention, mask included. The first pass of a process compiles kernels.
    """

    num_queries: int
    num_keys: int
    dense: str | None
    config: ProxyConfig | None
    kept: PerHead | None
    admissible: PerHead | None
    mass: PerHead | None
    build_ms: float | None
    total_ms: float

    @property
    def density(self) -> PerHead | None:
        """Kept blocks / admissible blocks; 1 where no block is admissible."""
        if self.kept is None or self.admissible is None:
            return None
        pairs = (zip(*heads, strict=True) for heads in zip(self.kept, self.admissible, strict=True))
        return tuple(tuple(part / of if of else 1.0 for part, of in heads) for heads in pairs)

    def to_json(self) -> dict[str, Any]:
        """The pass as plain data; null where a mass is NaN (a sequence that is all padding)."""
        config = None if self.config is None else changed_fields(self.config)
        mass = self.mass and [[None if math.isnan(x) else x for x in heads] for heads in self.mass]
        return asdict(self) | {"config": config, "density": self.density, "mass": mass}


class Record:
    """What ``flexproxy.record`` collects. ``print`` it for a table; ``flexproxy.plot.record`` draws it.

    Attributes:
        model: class, name, and numbers of layers and heads of the model.
        environment: versions, and the processor.
        selections: the last Selection of every sparse layer, by its index; empty unless it was asked for.
    """

    def __init__(self, model: dict[str, Any], environment: dict[str, Any]) -> None:
        self.model, self.environment = model, environment
        self.selections: dict[int, Selection] = {}
        self._passes: dict[int, list[Pass | Callable[[], Pass]]] = {}

    def _add(self, layer: int, read: Callable[[], Pass]) -> None:
        """Add a pass, whose numbers are on the device until somebody asks for them."""
        self._passes.setdefault(layer, []).append(read)

    @property
    def layers(self) -> dict[int, tuple[Pass, ...]]:
        """The passes of every layer so far, by its index; waits for the device."""
        for passes in self._passes.values():
            passes[:] = [x if isinstance(x, Pass) else x() for x in passes]
        return {layer: tuple(self._passes[layer]) for layer in sorted(self._passes)}  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """The record as plain data, without the selections."""
        layers = {str(layer): [x.to_json() for x in passes] for layer, passes in self.layers.items()}
        return {"flexproxy": 1, "environment": self.environment, "model": self.model, "layers": layers}

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Write it as JSON, whole or not at all.

        Args:
            force: replace the file if it exists.

        Raises:
            ValueError: nothing can be written there; the message says why.
            OSError: writing failed; the old file, if any, is unchanged.
        """
        write_json(path, self.to_json(), force)

    def __str__(self) -> str:
        layers = self.layers
        title = f"{self.model['class']}, {self.environment['device']}"
        if not layers:
            return f"{title}: no forward pass"
        totals = {str(layer): totals_of(passes) for layer, passes in layers.items()}
        rows = [_cells(name, x) for name, x in (totals | {"all": together(list(totals.values()))}).items()]
        shown = [name for name in rows[0] if name != "mass" or rows[-1]["mass"]]
        table = [dict(zip(shown, shown, strict=True)), *rows]
        lines = ["".join(f"{row[name]:>{len(name) + 3 if ' ' in name else 9}}" for name in shown) for row in table]
        return "\n".join([f"{title}: {_lengths(layers)}", *lines, *_notes(layers)])


class Totals(NamedTuple):
    """The passes of one layer, in sum. Times are milliseconds.

    sparse, dense: numbers of passes.
    density: of every query head, blocks kept / admissible in all sparse passes and sequences; empty without any.
    mass: of every query head, the mean over sparse passes and sequences; empty where it was not asked for.
    build_ms, sparse_ms: of sparse passes, until the BlockMasks were made, and in all.
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


def together(totals: Sequence[Totals]) -> Totals:
    """All layers: heads after heads, and sums."""
    sparse, dense, density, mass, *times = zip(*totals, strict=True)
    return Totals(sum(sparse), sum(dense), tuple(chain(*density)), tuple(chain(*mass)), *map(math.fsum, times))


def mean(values: Iterable[float]) -> float:
    """Of the numbers among the values; NaN if there are none."""
    numbers = [x for x in values if not math.isnan(x)]
    return statistics.fmean(numbers) if numbers else math.nan


def _by_head(parts: Iterable[PerHead | None], missing: float) -> Iterable[tuple[float, ...]]:
    """For every head, what it has in all sequences of all passes; where decoders share an index, some have fewer."""
    return zip_longest(*(heads for part in parts if part is not None for heads in part), fillvalue=missing)


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
        "density: blocks kept / admissible in sparse passes; the mean, least and most of the heads",
        *(f"dense in {n} of {total} layer passes: {reason}" for reason, n in reasons.items() if reason is not None),
    ]
