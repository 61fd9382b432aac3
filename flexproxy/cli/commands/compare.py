"""``flexproxy compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from flexproxy.cli.common import (
    PROMPT_LENGTH,
    AsJson,
    Device,
    Force,
    Model,
    Prompt,
    Where,
    check_picture,
    progress_bar,
    require,
    writing,
)

if TYPE_CHECKING:
    from flexproxy.cli.comparison import Comparison


def compare(
    *,
    model: Model,
    text: Prompt = None,
    length: Annotated[int | None, typer.Option(min=2, help=PROMPT_LENGTH)] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(help="Density to try, with a min_budget of 256; repeat it for several. By default 0.25 and 0.12."),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Where to write a picture (.png, .svg, .pdf).")] = None,
    force: Force = False,
    device: Where = Device.auto,
    as_json: AsJson = False,
) -> None:
    require("transformers", "safetensors")
    from flexproxy.cli import comparison, inputs

    check_picture(picture, force)
    settings = comparison.settings_of(density or comparison.DENSITIES)
    notes = Console(stderr=True, highlight=False)
    path = text or inputs.default_text()
    where = inputs.pick_device(device.value)
    inputs.check_compiler(where)
    loaded = inputs.load_decoder(model, where, "sdpa")
    inputs.check_decoder(loaded, length)
    tokens = inputs.prompt(path, loaded, model, length)
    notes.print(
        f"The first {tokens.shape[1]} tokens of {path}, on the {where.type.upper()}: one prefill each; before it the "
        "first layers run once untimed, to compile kernels",
        soft_wrap=True,
    )
    with progress_bar(notes) as progress:
        result = comparison.compare(loaded, tokens, progress, settings)
    if picture is not None:
        from flexproxy import plot

        drawing = comparison.figure(result)
        with writing("--picture", picture):
            plot.save(drawing, picture, force)
    files = {"model": model, "text": str(path), "picture": None if picture is None else str(picture)}
    if as_json:
        print(json.dumps(files | result.to_json(), indent=1))
    else:
        _show(result, picture)


def _show(result: Comparison, picture: Path | None) -> None:
    console = Console(highlight=False)
    table = Table(
        box=None, title=f"Prefill of {result.tokens} tokens, {result.dtype}, {result.device}", title_justify="left"
    )
    for heading in ("", "density", "same token", "bits/token", "loss", "first token", "speed"):
        table.add_column(heading, justify="right" if heading else "left")
    for setting in result.settings:
        dense = setting is result.settings[0]
        table.add_row(
            setting.name,
            f"{setting.density:.3f}",
            "" if dense else f"{setting.agreement:.1%}",
            f"{setting.loss:.4f}",
            "" if dense else f"{result.loss_over_dense(setting):+.2f} %",
            f"{setting.seconds:.3f} s",
            "" if dense else f"{result.speed(setting):.2f}",
        )
    console.print(table)
    if result.missed():
        told = "; ".join(result.missed())
        console.print(f"{told}: at this length sink, neighbours, last row and minimum are more", soft_wrap=True)
    console.print(
        f"{result.compared} places of the text are compared; gamma 0.95 is the default, and keeps at least 2048 tokens "
        f"in every row.\n{result.verdict()}",
        soft_wrap=True,
    )
    if picture is not None:
        console.print(str(picture), soft_wrap=True)
