"""``flexproxy calibrate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flexproxy.cli.common import (
    AsJson,
    Device,
    Force,
    Where,
    check_output,
    check_picture,
    progress_bar,
    require,
    writing,
)
from flexproxy.cli.inputs import ImpossibleError, InputError

if TYPE_CHECKING:
    from flexproxy.calibration import Calibration


def calibrate(
    *,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder of a model of transformers, or its name on the Hugging Face hub."),
    ],
    text: Annotated[
        list[Path],
        typer.Option(
            help="File of text like what the model will read; repeat it for several. Not what it is tested on."
        ),
    ],
    density: Annotated[
        float | None,
        typer.Option(help="Target: blocks kept / admissible, the mean over layers, in (0, 1]. This or --quality."),
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(help="Target: share of next tokens that stay those of dense attention, in (0, 1]. Or --density."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a sequence; by default the longest of which the texts have two, up to 32768."
        ),
    ] = None,
    sequences: Annotated[
        int, typer.Option(min=2, help="Sequences to use at most; half of them decide, the others confirm.")
    ] = 4,
    min_budget: Annotated[int, typer.Option(min=0, help="Tokens that every row keeps at least.")] = 2048,
    stride: Annotated[
        int | None, typer.Option(min=1, help="One of this many tokens is sampled for the scores; by default 4.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to write the settings, for configure(model, PATH).")] = Path(
        "calibration.json"
    ),
    picture: Annotated[Path | None, typer.Option(help="Where to draw what was found (.png, .svg, .pdf).")] = None,
    force: Force = False,
    device: Where = Device.auto,
    as_json: AsJson = False,
) -> None:
    require("transformers", "safetensors")
    from flexproxy import ProxyConfig
    from flexproxy.calibration import calibrate as run
    from flexproxy.calibration import check_target
    from flexproxy.cli import inputs

    check_output("--output", output, force)
    check_picture(picture, force)
    try:
        check_target(density, quality)
        sampling: dict[str, Any] = {} if stride is None else {"stride": stride}
        config = ProxyConfig(min_budget=min_budget, **sampling)
    except ValueError as error:
        raise InputError(error) from error

    notes = Console(stderr=True, highlight=False)
    where = inputs.pick_device(device.value)
    loaded = inputs.load_decoder(model, where, "sdpa")
    inputs.check_decoder(loaded, length)
    texts = [inputs.read_tokens(path, loaded, model, None) for path in text]
    with progress_bar(notes) as progress:
        found = run(
            loaded,
            texts,
            density=density,
            quality=quality,
            config=config,
            length=length,
            sequences=sequences,
            progress=progress,
        )
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _show(found)
    try:
        with writing("--output", output):
            found.save(output, force)
    except ImpossibleError:
        if not as_json:  # the result of minutes of work
            print(json.dumps(found.to_json()))
        raise
    if picture is not None:
        from flexproxy import plot

        with writing("--picture", picture):
            plot.save(plot.calibration(found), picture, force)
    if not as_json:
        print(f"The settings are in {output}: configure(model, path) reads them.")


def _show(found: Calibration) -> None:
    console = Console(highlight=False)
    evidence = found.evidence
    used = evidence["sequences"]["confirmed_on"]
    number = "1 sequence" if used == 1 else f"{used} sequences"
    table = Table(title=f"Measured on {number} of {evidence['length']} tokens, kept aside")
    for heading in ("", "density", "bits per token from dense", "next token as dense"):
        table.add_column(heading, justify="right")
    for name, key in (("shared out", "confirmed_on"), ("same in all layers", "uniform")):
        mean = evidence["mean"][key]
        table.add_row(name, f"{mean['density']:.3f}", f"{mean['divergence']:.4f}", f"{mean['agreement']:.3f}")
    console.print(table)
    densities = [config.density or 1.0 for config in found.layers.values()]
    if evidence["chosen"] == "uniform":
        console.print(f"Sharing does not help: every layer gets a density of {densities[0]:g}.")
    else:
        console.print("Densities by layer: " + " ".join(f"{density:.2f}" for density in densities))
