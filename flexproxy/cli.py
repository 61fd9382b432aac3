"""The command line: ``flexproxy demo`` and ``flexproxy info``.

Typer and rich are needed here and nowhere else in flexproxy.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import flexproxy

if TYPE_CHECKING:
    from flexproxy import demo as demo_module

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError as _error:
    if _error.name is None or _error.name.partition(".")[0] not in ("typer", "rich", "click"):
        raise
    _missing: str | None = _error.name
else:
    _missing = None

_INTERRUPTED = 130


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def _fail(message: object) -> typer.BadParameter:
    return typer.BadParameter(" ".join(str(message).split()))


def _require(extra: str, *modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            print(f'flexproxy: {module} is not installed: pip install "flexproxy[{extra}]"', file=sys.stderr)
            raise typer.Exit(1)


def demo(
    text: Annotated[
        Path | None, typer.Option(help="File whose first bytes are the text; by default the source of argparse.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the needle model; by default examples/needle of the repository.")
    ] = None,
    length: Annotated[int, typer.Option(min=32, help="Bytes of text, one token each.")] = 8192,
    needles: Annotated[int, typer.Option(min=1, help="Needles to plant, each asked for once.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Where the needles go and what they say.")] = 0,
    gamma: Annotated[float, typer.Option(help="Attention mass that each head's budget must reach, in (0, 1].")] = 0.95,
    min_budget: Annotated[
        int,
        typer.Option(
            help="Tokens that every row keeps at least. The library's default is 2048, meant for 32K tokens and more; "
            "of the demo's 8192 that would be a quarter, and what the heads choose by themselves would not show."
        ),
    ] = 512,
    num_proxies: Annotated[int, typer.Option(help="Proxy heads; the model has 2 key/value heads.")] = 2,
    stride: Annotated[
        int,
        typer.Option(
            help="Every how many tokens one is sampled for the scores. The library's default is the paper's 4, which "
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
    force: Annotated[bool, typer.Option("--force", help="Replace the picture if the file exists.")] = False,
    device: Annotated[Device, typer.Option(help="Where to run; auto takes a GPU if there is one.")] = Device.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Prefill a real text with a small trained model, dense and with flexproxy, and compare."""
    _require("transformers", "transformers", "safetensors")
    _require("plot", "matplotlib")
    from flexproxy import ProxyConfig, _demo_inputs, plot
    from flexproxy import demo as demo_module

    problem = plot.save_problem(picture, force)
    if problem is not None:
        raise _fail(f"--picture {picture}: {problem}")
    try:
        config = ProxyConfig(gamma=gamma, min_budget=min_budget, num_proxies=num_proxies, stride=stride)
    except ValueError as error:
        raise _fail(error) from error

    notes = Console(stderr=True, highlight=False)
    try:
        text = text or _demo_inputs.default_text()
        data = _demo_inputs.read_text(text, length)
        where = _demo_inputs.pick_device(device.value)
        _demo_inputs.check_compiler(where)
        model = model or _demo_inputs.default_model()
        processor = "Runs on the GPU" if where.type == "cuda" else "Runs on the CPU"
        notes.print(f"{processor}; the text is {text}", soft_wrap=True)
        needle_model = _demo_inputs.load_model(model, where)
        with _progress(notes) as progress:
            result = demo_module.run(
                needle_model, data, config, num_needles=needles, seed=seed, layer=layer, progress=progress
            )
        title = (
            f"Blocks that the heads of layer {result.layer} keep: {length} tokens, blocks of {config.block_size}, "
            f"gamma {gamma:g}"
        )
        plot.save(plot.block_map(result.selection, title=title), picture, force)
    except _demo_inputs.DemoError as error:
        raise _fail(error) from error
    except OSError as error:
        raise _fail(f"--picture {picture}: {error.strerror}") from error

    if as_json:
        files = {"text": str(text), "model": str(model), "picture": str(picture)}
        print(json.dumps(files | result.to_json(), indent=2))
    else:
        _show_demo(result, picture)


@contextmanager
def _progress(console: Console) -> Iterator[demo_module.Progress]:
    """A bar where there is a terminal; elsewhere a line for every stage."""
    if not console.is_terminal:
        begin, last = time.perf_counter(), ""

        def line(stage: str, done: int, total: int) -> None:
            nonlocal last
            if stage != last:
                console.print(f"{time.perf_counter() - begin:6.1f} s  {stage}")
            last = stage

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")

        def advance(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        yield advance


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
    console.print(f"The first prefill with flexproxy, its kernels being compiled, took {result.first_seconds:.1f} s.")

    table = Table(title="Blocks kept / admissible")
    for heading in ("layer", "mean", "sparsest head", "densest head"):
        table.add_column(heading, justify="right")
    for index, heads in enumerate(result.density):
        table.add_row(str(index), *(f"{x:.3f}" for x in (sum(heads) / len(heads), min(heads), max(heads))))
    console.print(table)
    console.print(f"The blocks of layer {result.layer}, head by head: {picture}", soft_wrap=True)


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """Show versions, devices, and the kernel options that flexproxy picks on each."""
    from flexproxy._info import collect

    data = collect()
    if as_json:
        print(json.dumps(data, indent=2))
        return
    console = Console(highlight=False)
    table = Table(title=f"flexproxy {data['flexproxy']}, Python {data['python']}, {data['platform']}")
    for heading in ("package", "version", "needed for"):
        table.add_column(heading)
    for name, package in data["packages"].items():
        table.add_row(name, package["version"] or "[bold]missing[/]", package["needed_for"])
    compiler = data["cpp_compiler"]
    table.add_row(compiler["name"], compiler["path"] or "[bold]missing[/]", "compiled attention on a CPU")
    console.print(table)

    shape = ", ".join(f"{name} {size}" for name, size in data["shape"].items())
    table = Table(title=f"The estimate, and the options of flex_attention for {shape}")
    for heading in ("device", "name", "memory", "estimate", "dtype", "kernel options"):
        table.add_column(heading)
    for entry in data["devices"]:
        memory = "" if entry["memory_gib"] is None else f"{entry['memory_gib']} GiB"
        options = ", ".join(f"{key}={value}" for key, value in entry["kernel_options"].items()) or "torch's own"
        table.add_row(entry["device"], entry["name"], memory, entry["estimate"], entry["dtype"], options)
    console.print(table)
    if len(data["devices"]) == 1:
        console.print("No CUDA device: everything runs on the CPU.")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(flexproxy.__version__)
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """ProxyAttn block-sparse prefill for PyTorch FlexAttention."""


def _app() -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_options)
    app.command()(demo)
    app.command()(info)
    return app


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (something is not installed), 2 (misuse), 130 (interrupted)."""
    if _missing is not None:
        print(f'flexproxy: {_missing} is not installed: pip install "flexproxy[cli]"', file=sys.stderr)
        return 1
    args = sys.argv[1:] if args is None else list(args)
    try:
        code: Any = _app()(args or ["--help"], prog_name="flexproxy", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        # What typer calls a usage error; its classes have moved from release to release.
        if not hasattr(error, "format_message"):
            raise
        print(f"flexproxy: {' '.join(error.format_message().split())}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    if code == _INTERRUPTED:
        print("flexproxy: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0
