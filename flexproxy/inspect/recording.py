"""``flexproxy.record``: what the layers of a running model keep, and how long they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flexproxy.environment import processor, versions
from flexproxy.inspect.record import Pass, Record
from flexproxy.inspect.summary import as_tuples
from flexproxy.stats import recovered_mass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flexproxy.integrations.transformers.observing import Call


@contextmanager
def record(model: PreTrainedModel, *, mass: bool = False, selections: bool = False) -> Iterator[Record]:
    """Collect what every layer keeps and how long its attention takes, inside of a ``with`` statement.

        with flexproxy.record(model) as record:
            model(input_ids)
        print(record)

    It reads the selections that attention itself makes, and waits for nothing: on a GPU it adds two events and a sum
    over the map of blocks to a layer, unless ``mass`` is asked for. Every forward pass counts by itself: chunks of a
    prefill, decode steps. Gradient checkpointing's second run of a layer does not. Records can be nested. Afterwards,
    also after an exception, the model is as it was, and the record has what came until then.

    Args:
        model: a model of transformers with ``attn_implementation="flexproxy"``, not compiled by torch.compile.
        mass: also compute the attention mass that sparse layers keep, of a sample of rows: exact and slow, since it
            reads all keys for each of them. It is in none of the times.
        selections: also keep the last Selection of every layer, as ``record.selections``.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        TypeError, ValueError: ``model`` is something else, its attention is another, or it is compiled.
    """
    from flexproxy.integrations.transformers.observing import observe
    from flexproxy.integrations.transformers.settings import all_modules, attention_layers, shape_of

    modules = all_modules(attention_layers(model))
    names = {getattr(getattr(module, "config", None), "_attn_implementation", "flexproxy") for module in modules}
    if "flexproxy" not in names:
        raise ValueError(
            f'model: expected attn_implementation="flexproxy", got {sorted(map(str, names))}; use '
            'model.set_attn_implementation("flexproxy")'
        )
    identity = {"class": type(model).__name__, "name": getattr(model.config, "_name_or_path", ""), **shape_of(model)}
    record = Record(identity, versions() | {"device": processor(model.device)})

    def note(call: Call) -> None:
        record._add(call.layer, _pass_of(call, mass))
        if selections and call.selection is not None:
            record.selections[call.layer] = call.selection

    with observe(model, note):
        yield record


def _pass_of(call: Call, wants_mass: bool) -> Callable[[], Pass]:
    """Reads the pass, later; it holds no large tensor of the call."""
    from flexproxy.integrations.transformers.observing import milliseconds

    selection, begin, built, end = call.selection, call.begin, call.built, call.end
    sizes, dense, config = (call.query.shape[2], call.key.shape[2]), call.dense, call.config
    if selection is None or built is None:
        return lambda: Pass(*sizes, dense, config, None, None, None, None, milliseconds(begin, end))
    kept = selection.block_map().sum((-2, -1))
    admissible = selection.admissible.sum((-2, -1)).expand_as(kept)
    mass = recovered_mass(call.query, call.key, selection, scale=call.scale) if wants_mass else None

    def read() -> Pass:
        times = milliseconds(begin, built), milliseconds(begin, end)
        masses = None if mass is None else as_tuples(mass)
        return Pass(*sizes, None, config, as_tuples(kept), as_tuples(admissible), masses, *times)

    return read
