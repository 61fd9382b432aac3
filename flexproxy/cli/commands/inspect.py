"""``flexproxy inspect``."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flexproxy.cli.common import (
    PROMPT_LENGTH,
    Advance,
    AsJson,
    Device,
    Force,
    Model,
    Prompt,
    Where,
    check_output,
    check_outputs,
    progress_bar,
    require,
    write_json,
    writing,
)
from flexproxy.cli.inputs import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from flexproxy import ProxyConfig
    from flexproxy.inspect.record import Record


def inspect(
    *,
    model: Model,
    text: Prompt = None,
    length: Annotated[int | None, typer.Option(min=1, help=PROMPT_LENGTH)] = None,
    gamma: Annotated[float | None, typer.Option(help="Attention mass of every budget, in (0, 1].")] = None,
    density: Annotated[float | None, typer.Option(help="Mean density to reach, instead of --gamma.")] = None,
    num_proxies: Annotated[int | None, typer.Option(help="Proxy heads.")] = None,
    stride: Annotated[int | None, typer.Option(help="One of this many tokens is sampled.")] = None,
    min_budget: Annotated[int | None, typer.Option(help="Tokens that every row keeps at least.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings of the layers, as save_configuration writes them, instead of options.")
    ] = None,
    mass: Annotated[
        bool, typer.Option("--mass", help="Also compute the attention mass that is kept (of a sample of rows; slow).")
    ] = False,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for pictures: the record by layer and head, and the blocks of --layer.")
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="Layer whose blocks are drawn; by default the one whose heads differ most."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write the JSON to.")] = None,
    force: Force = False,
    device: Where = Device.auto,
    as_json: AsJson = False,
) -> None:
    require("transformers", "safetensors")
    if pictures is not None:
        require("matplotlib")
    elif layer is not None:
        raise InputError("--pictures: expected a folder for the pictures, got none beside --layer; name one")
    if output is not None:
        check_output("--output", output, force)
    paths = [] if pictures is None else check_outputs("--pictures", pictures, ("record.png", "blocks.png"), force)
    options = {"gamma": gamma, "density": density, "num_proxies": num_proxies}
    options |= {"stride": stride, "min_budget": min_budget}
    settings = _settings({name: value for name, value in options.items() if value is not None}, config)
    record, taken = _run(model, text, length, settings, layer, mass, device)
    shown = _most_varied(record) if layer is None else layer
    problem = None if shown in record.selections else _why_no_blocks(record, layer)
    paths = paths if problem is None else paths[:1]
    data = {"text": taken, "pictures": list(map(str, paths))} | record.to_json()
    if output is not None:
        write_json("--output", output, data)
    print(json.dumps(data, indent=1) if as_json else record)
    if pictures is not None:
        _draw(record, shown, pictures, paths)
    if not as_json:
        for path in paths if output is None else [*paths, output]:
            print(path)
    if pictures is not None and problem is not None:
        if layer is not None:
            raise InputError(problem)
        print(f"flexproxy: {problem}", file=sys.stderr)


def _settings(options: dict[str, Any], file: Path | None) -> ProxyConfig | Path:
    from flexproxy import ProxyConfig

    if "gamma" in options and "density" in options:
        got = ", ".join(f"{name}={options[name]}" for name in ("gamma", "density"))
        raise InputError(f"gamma, density: expected one of the two, got {got}; leave one of them out")
    if file is None:
        try:
            return ProxyConfig(**options)
        except ValueError as error:
            raise InputError(error) from error
    if options:
        names = ", ".join("--" + name.replace("_", "-") for name in options)
        raise InputError(f"--config: expected all settings in the file, got {names} besides; leave one of them out")
    return file


def _run(
    name: str,
    text: Path | None,
    length: int | None,
    settings: ProxyConfig | Path,
    layer: int | None,
    mass: bool,
    device: Device,
) -> tuple[Record, dict[str, Any]]:
    """The record of a prefill, and which text it was of."""
    from flexproxy.cli import inputs
    from flexproxy.integrations.transformers import configuration, configure

    notes = Console(stderr=True, highlight=False)
    path = text or inputs.default_text()
    where = inputs.pick_device(device.value)
    inputs.check_compiler(where)
    model = inputs.load_decoder(name, where, "flexproxy")
    inputs.check_decoder(model, length)
    tokens = inputs.prompt(path, model, name, length)
    try:
        configure(model, settings)
    except ValueError as error:
        raise InputError(error) from error
    layers = configuration(model)
    if layer is not None and layer not in layers:
        raise InputError(f"--layer: expected one of {min(layers)} to {max(layers)}, got {layer}; counted from 0")
    taken = {"path": str(path), "tokens": tokens.shape[1]}
    notes.print(f"The first {taken['tokens']} tokens of {path}, on the {where.type.upper()}", soft_wrap=True)
    with progress_bar(notes) as progress:
        return prefill(model, tokens.to(where), mass, progress), taken


def prefill(model: PreTrainedModel, tokens: Tensor, mass: bool, progress: Advance) -> Record:
    """The record of a second prefill of tokens ``[1, S]``; the first one compiles kernels."""
    import torch

    from flexproxy.integrations.transformers import configuration, record
    from flexproxy.integrations.transformers.observing import observe

    number = len(configuration(model))
    for stage in ("compiling kernels", "recording"):
        done = itertools.count(1)
        progress(stage, 0, number)
        with (
            torch.no_grad(),
            record(model, mass=mass and stage == "recording", selections=True) as found,
            observe(model, lambda _: progress(stage, next(done), number)),  # noqa: B023
        ):
            model.base_model(input_ids=tokens, use_cache=False)  # logits of a long text can be larger than the model
    return found


def _most_varied(record: Record) -> int:
    """The layer whose heads differ most in density; the first if none was sparse."""

    def spread(layer: int) -> float:
        selection = record.selections.get(layer)
        return -1.0 if selection is None else float(selection.density().max() - selection.density().min())

    return max(record.layers, key=spread)


def _why_no_blocks(record: Record, layer: int | None) -> str:
    if layer is None:
        begin, reason = "no layer was sparse, so no blocks are drawn", next(iter(record.layers.values()))[0].dense
    else:
        reason = record.layers[layer][0].dense
        begin = f"--layer: expected a layer that is sparse, got layer {layer}, which was dense"
    return f"{begin} ({reason}); use a longer text, or a lower --min-budget"


def _draw(record: Record, layer: int, folder: Path, paths: Sequence[Path]) -> None:
    from flexproxy import plot

    figures = [plot.record(record)]
    if layer in record.selections:
        figures.append(plot.block_map(record.selections[layer], title=f"Blocks that the heads of layer {layer} keep"))
    with writing("--pictures", folder):
        folder.mkdir(exist_ok=True)
    for figure, path in zip(figures, paths, strict=True):
        with writing("--pictures", path):
            plot.save(figure, path, force=True)
