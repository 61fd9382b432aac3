"""``flexproxy demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from flexproxy.cli.common import AsJson, Device, Force, Where, check_picture, progress_bar, require, writing
from flexproxy.cli.inputs import InputError

if TYPE_CHECKING:
    from flexproxy.cli import demo as demo_module


def demo(
    *,
    text: Annotated[
        Path | None, typer.Option(help="File whose first bytes are the text; by default the source of argparse.")
    ] = None,
    model: Annotated[
        Path, typer.Option(help="Folder of the needle model, which is part of flexproxy's repository.")
    ] = Path("examples/needle"),
    length: Annotated[int, typer.Option(min=32, help="Bytes of text, one token each.")] = 16384,
    needles: Annotated[int, typer.Option(min=1, help="Needles to plant, each asked for once.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Where the needles go and what they say.")] = 0,
    gamma: Annotated[float, typer.Option(help="Attention mass that each head's budget must reach, in (0, 1].")] = 0.95,
    min_budget: Annotated[
        int,
        typer.Option(
            help="Tokens that every row keeps at least. The library's default is 2048, meant for 32K tokens and more; "
            "of the demo's 16384 that would be an eighth, and what the heads choose by themselves would not show."
        ),
    ] = 512,
    num_proxies: Annotated[int, typer.Option(help="Proxy heads; the model has 2 key/value heads.")] = 2,
    stride: Annotated[
        int,
        typer.Option(
            help="One of this many tokens is sampled for the scores. The library's default is the paper's 4, which "
            "steps over some of the demo's needles: their values are four bytes long."
        ),
    ] = 2,
    layer: Annotated[
        int | None,
        typer.Option(help="Layer in the picture, counted from 0; by default the one whose heads differ most."),
    ] = None,
    picture: Annotated[Path, typer.Option(help="Where to write the picture (.png, .svg, .pdf).")] = Path(
        "flexproxy-demo.png"
    ),
    force: Force = False,
    device: Where = Device.auto,
    as_json: AsJson = False,
) -> None:
    require("transformers", "safetensors")
    check_picture(picture, force)
    from flexproxy import ProxyConfig, plot
    from flexproxy.cli import demo as demo_module
    from flexproxy.cli import inputs

    try:
        config = ProxyConfig(gamma=gamma, min_budget=min_budget, num_proxies=num_proxies, stride=stride)
    except ValueError as error:
        raise InputError(error) from error

    notes = Console(stderr=True, highlight=False)
    text = text or inputs.default_text()
    data = inputs.read_text(text, length)
    where = inputs.pick_device(device.value)
    inputs.check_compiler(where)
    processor = "Runs on the GPU" if where.type == "cuda" else "Runs on the CPU"
    notes.print(f"{processor}; the text is {text}", soft_wrap=True)
    needle_model = inputs.load_model(model, where)
    with progress_bar(notes) as progress:
        result = demo_module.run(
            needle_model, data, config, num_needles=needles, seed=seed, layer=layer, progress=progress
        )
    title = (
        f"Blocks that the heads of layer {result.layer} keep: {length} tokens, blocks of {config.block_size}, "
        f"gamma {gamma:g}"
    )
    figure = plot.block_map(result.selection, title=title)
    with writing("--picture", picture):
        plot.save(figure, picture, force)

    if as_json:
        files = {"text": str(text), "model": str(model), "picture": str(picture)}
        print(json.dumps(files | result.to_json(), indent=2))
    else:
        _show_demo(result, picture)


def _show_demo(result: demo_module.DemoResult, picture: Path) -> None:
    console = Console(highlight=False)
    table = Table(title=f"Prefill of {result.tokens} tokens, {result.dtype}, {result.device}")
    for heading in ("", "dense", "flexproxy"):
        table.add_column(heading, justify="right" if heading else "left")
    dense, sparse = result.dense, result.sparse
    for name, *values in (
        ("needles answered exactly", *(f"{p.exact_answers} of {result.queries}" for p in (dense, sparse))),
        ("bits per byte of the text", *(f"{p.bits_per_byte:.4f}" for p in (dense, sparse))),
        ("blocks kept / admissible", "1.000", f"{result.mean_density:.3f}"),
        ("time", *(f"{p.seconds:.2f} s" for p in (dense, sparse))),
    ):
        table.add_row(name, *values)
    console.print(table)
    console.print(f"The first prefill with flexproxy took {result.first_seconds:.1f} s.")

    for index, heads in enumerate(result.density):
        mean = sum(heads) / len(heads)
        console.print(f"layer {index}: {mean:.3f} of the blocks; {min(heads):.3f} to {max(heads):.3f} of a head")
    console.print(f"The blocks of layer {result.layer}, head by head: {picture}", soft_wrap=True)
