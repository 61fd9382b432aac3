"""What the layers of a running model keep, and how long they take: ``flexproxy.record``.

Numbers are left on the device while the model runs, and read when they are asked for.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flexproxy.config import ProxyConfig, changed_fields
from flexproxy.environment import processor, versions
from flexproxy.files import write_text
from flexproxy.inspect.summary import PerHead, PerHeadCount, as_tuples
from flexproxy.inspect.totals import table_of
from flexproxy.stats import recovered_mass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flexproxy.integrations.transformers.observing import Call


@dataclass(frozen=True)
class Pass:
    """One forward pass through the attention of one layer. Nested tuples are ``[B][Hq]``, None where it was dense.

    Attributes:
        num_queries, num_keys: Sq, Skv, in tokens.
        dense: why it was dense, in a few words; None where it was sparse.
        config: the settings; None where no mask by blocks came.
        count: blocks that every row keeps, where so many are admissible.
        kept, admissible: blocks in all.
        mass: share of dense attention's probability that is kept, of some rows (``flexproxy.stats.recovered_mass``);
            None unless it was asked for.
        build_ms: until the BlockMask was there; None where it was dense.
        total_ms: of the whole attention, the mask among it. The first pass of a process compiles kernels.
    """

    num_queries: int
    num_keys: int
    dense: str | None
    config: ProxyConfig | None
    count: PerHeadCount | None
    kept: PerHeadCount | None
    admissible: PerHeadCount | None
    mass: PerHead | None
    build_ms: float | None
    total_ms: float

    @property
    def density(self) -> PerHead | None:
        """Kept blocks / admissible blocks; 1 where no block is admissible."""
        if self.kept is None or self.admissible is None:
            return None
        pairs = (zip(*heads, strict=True) for heads in zip(self.kept, self.admissible, strict=True))
        return tuple(tuple(kept / of if of else 1.0 for kept, of in heads) for heads in pairs)

    def to_json(self) -> dict[str, Any]:
        """The pass as plain data; of the settings, those that differ from their defaults."""
        config = None if self.config is None else changed_fields(self.config)
        mass = self.mass and [[None if math.isnan(x) else x for x in heads] for heads in self.mass]
        return asdict(self) | {"config": config, "density": self.density, "mass": mass}


class Record:
    """What ``flexproxy.record`` collects. ``print`` it for a table; ``flexproxy.plot.record`` draws it.

    Attributes:
        model: what it is: its class, its name, and the numbers of its layers and heads.
        environment: versions, and the processor.
    """

    def __init__(self, model: dict[str, Any], environment: dict[str, Any], mass: bool) -> None:
        self.model, self.environment = model, environment
        self._mass = mass
        self._passes: dict[int, list[Pass | Callable[[], Pass]]] = {}

    @property
    def layers(self) -> dict[int, tuple[Pass, ...]]:
        """The passes of every layer until now, by its index; waits for the device."""
        for passes in self._passes.values():
            passes[:] = [x if isinstance(x, Pass) else x() for x in passes]
        return {layer: tuple(self._passes[layer]) for layer in sorted(self._passes)}  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data: dicts, lists, numbers and texts."""
        layers = {str(layer): [x.to_json() for x in passes] for layer, passes in self.layers.items()}
        return {"flexproxy": 1, "environment": self.environment, "model": self.model, "layers": layers}

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Write it as JSON, whole or not at all.

        Args:
            force: replace the file if it exists.

        Raises:
            ValueError: nothing can be written there; the message says why.
            OSError: writing failed; what was there before still is.
        """
        write_text(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", force)

    def __str__(self) -> str:
        return table_of(self)

    def _note(self, call: Call) -> None:
        self._passes.setdefault(call.layer, []).append(_pass_of(call, self._mass))


@contextmanager
def record(model: PreTrainedModel, *, mass: bool = False) -> Iterator[Record]:
    """Collect what every layer keeps and how long its attention takes, inside of a ``with`` statement.

        with flexproxy.record(model) as record:
            model(input_ids)
        print(record)

    It looks at the selections that attention itself makes, and waits for nothing: on a GPU it adds two events and a sum
    over the map of blocks to a layer, unless ``mass`` is asked for. Every forward pass counts by itself: chunks of a
    prefill, decode steps. Gradient checkpointing's second run of a layer does not. Records can be nested. Afterwards,
    also after an exception, the model is as it was, and the record has what came until then.

    Args:
        model: a model of transformers with ``attn_implementation="flexproxy"``, not compiled by torch.compile.
        mass: also compute the attention mass that sparse layers keep, of a sample of rows: exact, and slow, for it
            reads all keys for each of them. It is in none of the times.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        TypeError, ValueError: ``model`` is something else, its attention is another, or it is compiled.
    """
    from flexproxy.integrations.transformers.identity import shape_of
    from flexproxy.integrations.transformers.observing import observe
    from flexproxy.integrations.transformers.settings import all_modules, attention_layers

    modules = all_modules(attention_layers(model))
    names = {getattr(getattr(module, "config", None), "_attn_implementation", "flexproxy") for module in modules}
    if "flexproxy" not in names:
        raise ValueError(
            f'model: expected attn_implementation="flexproxy", got {sorted(map(str, names))}; use '
            'model.set_attn_implementation("flexproxy")'
        )
    identity = {"class": type(model).__name__, "name": getattr(model.config, "_name_or_path", ""), **shape_of(model)}
    collected = Record(identity, versions() | {"device": processor(model.device)}, mass)
    with observe(model, collected._note):
        yield collected


def _pass_of(call: Call, wants_mass: bool) -> Callable[[], Pass]:
    """Reads the pass, later; what is large stays with the call, which nobody keeps."""
    from flexproxy.integrations.transformers.observing import milliseconds

    selection, begin, built, end = call.selection, call.begin, call.built, call.end
    sizes, dense, config = (call.query.shape[2], call.key.shape[2]), call.dense, call.config
    assert end is not None
    if selection is None or built is None:
        return lambda: Pass(*sizes, dense, config, None, None, None, None, None, milliseconds(begin, end))
    count, kept = selection.count, selection.block_map().sum((-2, -1))
    admissible = selection.admissible.sum((-2, -1)).expand_as(kept)
    mass = recovered_mass(call.query, call.key, selection, scale=call.scale) if wants_mass else None
    return lambda: Pass(
        *sizes,
        dense=None,
        config=config,
        count=as_tuples(count.tolist()),
        kept=as_tuples(kept.tolist()),
        admissible=as_tuples(admissible.tolist()),
        mass=None if mass is None else as_tuples(mass.tolist()),
        build_ms=milliseconds(begin, built),
        total_ms=milliseconds(begin, end),
    )
