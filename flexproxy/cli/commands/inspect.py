"""``flexproxy inspect``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flexproxy.cli.common import (
    Device,
    Outliers,
    check_output,
    check_outputs,
    fail,
    input_errors,
    progress_bar,
    require,
    write_json,
    writing,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from flexproxy import ProxyConfig
    from flexproxy.cli.inspection import Inspection

# Tokens that are taken of a longer text unless --length says more: seconds on a CPU, a long prompt on a GPU.
_DEFAULT_LENGTH = {"cpu": 8192, "cuda": 131072}
_PICTURES = {
    True: ("record.png", "blocks.png"),
    False: ("record.png", "blocks.png", "ranking.png"),
}  # no ranking, or one


def inspect(
    *,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder or Hugging Face name of a decoder; examples/needle of the repository works.",
        ),
    ],
    text: Annotated[
        Path | None, typer.Option(help="Text file to prefill; by default the source of Python's argparse.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of the text; by default all, at most 8192 on a CPU and 131072 on a GPU, and what the model "
            "is made for.",
        ),
    ] = None,
    gamma: Annotated[
        float | None, typer.Option(help="Attention mass of every budget, in (0, 1]; by default 0.95.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Mean density to reach, instead of --gamma.")] = None,
    num_proxies: Annotated[int | None, typer.Option(help="Proxy heads; by default 1. With --outliers, 2.")] = None,
    stride: Annotated[int | None, typer.Option(help="Every how many tokens one is sampled; by default 4.")] = None,
    outliers: Outliers = False,
    min_budget: Annotated[
        int | None, typer.Option(help="Tokens that every row keeps at least; by default 2048.")
    ] = None,
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
    ranking: Annotated[
        int | None,
        typer.Option(min=0, help="Also draw the ranking of this head of --layer beside the true mass (slow)."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write the JSON to.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    device: Annotated[Device, typer.Option(help="Where to run; auto takes a GPU if there is one.")] = Device.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON, and nothing else.")] = False,
) -> None:
    require("transformers", "transformers", "safetensors")
    if pictures is not None:
        require("plot", "matplotlib")
    elif ranking is not None or layer is not None:
        raise fail("--pictures: expected a folder for the pictures of --layer and --ranking, got none; name one")
    if output is not None:
        check_output("--output", output, force)
    paths = [] if pictures is None else check_outputs("--pictures", pictures, _PICTURES[ranking is None], force)
    options = {"gamma": gamma, "density": density, "num_proxies": num_proxies}
    options |= {"stride": stride, "min_budget": min_budget, "outliers": outliers or None}
    settings = _settings({name: value for name, value in options.items() if value is not None}, config)
    result, tokens = _run(model, text, length, settings, layer, ranking, mass, device)
    paths = paths if result.call.selection is not None else paths[:1]  # a dense layer has no blocks to draw
    data = {"text": tokens, "pictures": list(map(str, paths))} | result.record.to_json()
    if output is not None:
        write_json("--output", output, data)
    if as_json:
        print(json.dumps(data, indent=1))
    else:
        print(result.record)
    if pictures is not None:
        with input_errors():
            _draw(result, pictures, paths, ranking)
    if not as_json:
        for path in paths if output is None else [*paths, output]:
            print(path)
    if pictures is not None and result.call.selection is None:
        _say_dense(result, "--layer" if layer is not None else "--ranking" if ranking is not None else None)


def _settings(options: dict[str, Any], file: Path | None) -> ProxyConfig | Path:
    from flexproxy import ProxyConfig

    if "gamma" in options and "density" in options:
        got = ", ".join(f"{name}={options[name]}" for name in ("gamma", "density"))
        raise fail(f"gamma, density: expected one of the two, got {got}; leave one of them out")
    if file is None:
        try:
            make = ProxyConfig.outliers if options.pop("outliers", False) else ProxyConfig
            return make(**options)
        except ValueError as error:
            raise fail(error) from error
    if options:
        names = ", ".join("--" + name.replace("_", "-") for name in options)
        raise fail(f"--config: expected all settings in the file, got {names} besides; leave one of them out")
    return file


def _run(
    name: str,
    text: Path | None,
    length: int | None,
    settings: ProxyConfig | Path,
    layer: int | None,
    head: int | None,
    mass: bool,
    device: Device,
) -> tuple[Inspection, dict[str, Any]]:
    """The prefill, and which text it was of."""
    from flexproxy.cli import inputs, inspection
    from flexproxy.integrations.transformers import configure

    notes = Console(stderr=True, highlight=False)
    with input_errors():
        path = text or inputs.default_text()
        where = inputs.pick_device(device.value)
        inputs.check_compiler(where)
        model = inputs.load_decoder(name, where, "flexproxy")
        inputs.check_decoder(model, length)
        tokens = _read(path, model, name, length, where.type)
        try:
            configure(model, settings)
        except ValueError as error:
            raise fail(error) from error
        inspection.check_layer(model, layer, head)
        taken = {"path": str(path), "tokens": tokens.shape[1]}
        notes.print(f"The first {taken['tokens']} tokens of {path}, on the {where.type.upper()}", soft_wrap=True)
        with progress_bar(notes) as progress:
            result = inspection.prefill(model, tokens.to(where), layer=layer, mass=mass, progress=progress)
    return result, taken


def _read(path: Path, model: PreTrainedModel, name: str, length: int | None, device: str) -> Tensor:
    from flexproxy.cli import inputs
    from flexproxy.integrations.transformers.settings import max_positions

    if length is not None:
        return inputs.read_tokens(path, model, name, length)
    made_for = max_positions(model) or _DEFAULT_LENGTH[device]
    return inputs.read_tokens(path, model, name, None)[:, : min(_DEFAULT_LENGTH[device], made_for)]


def _draw(result: Inspection, folder: Path, paths: Sequence[Path], head: int | None) -> None:
    from flexproxy import plot

    call, layer = result.call, result.layer
    figures = [plot.record(result.record)]
    if call.selection is not None:
        figures.append(plot.block_map(call.selection, title=f"Blocks that the heads of layer {layer} keep"))
        if head is not None:
            title = f"Ranking and true mass of layer {layer}, head {head}"
            figures.append(plot.ranking(call.selection, call.query, call.key, head=head, scale=call.scale, title=title))
    with writing("--pictures", folder):
        folder.mkdir(exist_ok=True)
    for figure, path in zip(figures, paths, strict=True):
        with writing("--pictures", path):
            plot.save(figure, path, force=True)


def _say_dense(result: Inspection, asked_by: str | None) -> None:
    """Why there is no picture of blocks; a mistake only if it was asked for."""
    got = f"{result.layer}, which was dense ({result.call.dense})"
    remedy = "use a longer text, or a lower --min-budget"
    if asked_by is not None:
        raise fail(f"{asked_by}: expected a layer that is sparse, got layer {got}; {remedy}, or another --layer")
    print(f"flexproxy: no layer was sparse, so no blocks are drawn ({result.call.dense}); {remedy}", file=sys.stderr)
