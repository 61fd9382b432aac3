"""How much of a model's quality is left under sparse prefill: flexproxy, other methods and an oracle at equal density.
Tasks are made on the spot: needles, chains, frequent words, and texts to predict. Every method chooses blocks of 128;
the attention is the same sparse kernel for all. Writes a JSON file, after every cell, and draws quality against density
beside it (PNG). The same command again goes on where it was stopped. docs/quality.md says what the columns mean.

python -m benchmarks.quality                                       # SmolLM2, on fixed prose and code
python -m benchmarks.quality --model meta-llama/Llama-3.1-8B --text book.txt --lengths 32768 --tasks single,text
python -m benchmarks.quality --model needle                        # a needle model of this repository
"""

from __future__ import annotations

import functools
import math
import re
import sys
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness import Out, Quick, command, fractions, integers, listed, result_path, versions
from benchmarks.quality import report
from benchmarks.quality.evaluate import Cell, ResultFile, run
from benchmarks.quality.methods import BASELINES, EXPERIMENTS, fits, methods_of
from benchmarks.quality.models import DEFAULT_MODEL, NEEDLE, attention_shape, fingerprint, name_of, tasks_for
from benchmarks.quality.real_models import MODELS, long_context, positions_of, resolve
from benchmarks.quality.texts import Text
from flexproxy import ProxyConfig
from flexproxy.cli.common import Device
from flexproxy.cli.inputs import load_decoder, load_tokenizer, pick_device
from flexproxy.environment import processor

USUAL_BASELINES = [name for name in BASELINES if name not in ("random", "oracle, per row")]
SHORT: Any = {"lengths": "1024", "texts": 2, "answers": 2, "densities": "0.5", "proxies": "kv"}


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def strides(text: str) -> list[str]:
    """As ``4``, or ``8:2`` of queries and keys, or ``outlier8:1``."""
    parts = names(text)
    if not all(re.fullmatch(r"((outlier)?[1-9]\d*:)?[1-9]\d*", part) for part in parts):
        raise ValueError
    return parts


def config_of(proxies: int, text: str, min_budget: int) -> ProxyConfig:
    """flexproxy's defaults with the proxies and an item of ``--strides``."""
    query, _, key = text.rpartition(":")
    stride = query.removeprefix("outlier")
    return ProxyConfig(
        num_proxies=proxies,
        stride=int(key),
        query_stride=int(stride) if stride else None,
        query_choice="outlier" if stride != query else "first",
        min_budget=min_budget,
    )


def configs_for(proxies: list[str], texts: list[str], min_budget: int, heads: int, kv_heads: int) -> list[ProxyConfig]:
    """flexproxy's variants for a model's heads. ``kv`` is the default number of proxies; what does not fit is left out,
    and said.

    Raises:
        ValueError: none fits, or one is no number.
    """
    numbers = list(
        dict.fromkeys(ProxyConfig().proxies(heads, kv_heads) if name == "kv" else int(name) for name in proxies)
    )
    configs = [config_of(number, text, min_budget) for number, text in product(numbers, texts)]
    problems = {config.num_proxies: fits(config, heads, kv_heads) for config in configs}
    fitting = [config for config in configs if problems[config.num_proxies] is None]
    for problem in filter(None, problems.values()):
        if not fitting:
            raise ValueError(problem)
        print(f"left out: {problem}", file=sys.stderr)
    return fitting


class Session:
    """A model under test, with its tasks and texts."""

    def __init__(self, name: str, device: Device, text: Path | None) -> None:
        self.name = str(NEEDLE) if name == "needle" else name
        if self.name == str(NEEDLE) and not (NEEDLE / "model.safetensors").is_file():
            raise ValueError(
                f"--model needle: expected model.safetensors in {NEEDLE}, got none; make one with python -m "
                "benchmarks.quality.train --out needle-models, and use --model needle-models/seed0"
            )
        self.folder = resolve(self.name)
        self.model: Any = load_decoder(self.folder, pick_device(device.value), "sdpa")
        self.tasks, self.texts = tasks_for(self.model, self.folder, text)
        self.heads, self.kv_heads, _ = attention_shape(self.model)

    @property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    def check(self, tasks: list[str], lengths: list[int]) -> None:
        """Find what cannot run before minutes are spent.

        Raises:
            ValueError: a task that the model does not have, or a length that it or a text does not have.
        """
        missing = sorted(set(tasks) - set(self.tasks))
        if missing:
            known = ", ".join(self.tasks)
            raise ValueError(
                f"--tasks: expected some of {known} for this model, got {', '.join(missing)}; leave it out"
            )
        positions = positions_of(self.name, self.model)
        if positions is not None and max(lengths) > positions:
            raise ValueError(f"--lengths: expected at most {positions} for this model, got {max(lengths)}; use less")
        for task, length in product(tasks, lengths):
            self.tasks[task].make(0, length)

    def results(self, out: Path, settings: dict[str, Any]) -> ResultFile:
        """The file of a run; what it depends on is in it, and no paths."""
        settings = settings | {
            "model": {
                "name": self.name if self.name in MODELS else name_of(self.folder),
                "fingerprint": fingerprint(self.model),
                "dtype": str(self.model.dtype)[6:],
            },
            "text": {name: _described(text) for name, text in self.texts.items()},
        }
        return ResultFile(out, {"device": processor(self.model.device)} | versions(), settings)

    def measure(self, cells: Iterable[Cell], total: int | None, results: ResultFile, until: float = math.inf) -> None:
        """Run cells under a progress bar, print tables, and draw the plot beside the file."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        notes = Console(stderr=True)
        with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as progress:
            bar = progress.add_task("", total=total)
            begin, of = time.monotonic(), "" if total is None else f"/{total}"
            context = functools.partial(long_context, self.name, self.model)
            for n, cell in enumerate(run(self.model, cells, results, context, until)):
                progress.update(bar, description=str(cell), completed=n)
                if not notes.is_terminal:
                    notes.print(f"{time.monotonic() - begin:7.1f} s  {n + 1}{of}  {cell}", soft_wrap=True)
        console = Console()
        for table in report.tables(results.rows):
            console.print(table)
        report.draw(results.data, results.path.with_suffix(".png"))
        console.print(f"wrote {results.path} and {results.path.with_suffix('.png').name}")


def _described(text: Text) -> dict[str, Any]:
    return {"name": text.name, "bytes": len(text.content), "digest": text.digest}


def main(
    *,
    model: Annotated[
        str,
        typer.Option(help=f"{', '.join(MODELS)}; needle; or a folder or name of a causal model of transformers."),
    ] = DEFAULT_MODEL,
    device: Annotated[Device, typer.Option(help="Where to run; auto takes a GPU if there is one.")] = Device.auto,
    text: Annotated[
        Path | None, typer.Option(help="File or folder to make tasks from, instead of the fixed prose and code.")
    ] = None,
    tasks: Annotated[Any, listed(names, "Needles, chains, words, and texts to predict.")] = None,
    lengths: Annotated[Any, listed(integers, "Tokens of a sequence.")] = "8192",
    texts: Annotated[int, typer.Option(min=1, help="Sequences of a text to predict; their seeds count from 0.")] = 16,
    answers: Annotated[int, typer.Option(min=1, help="Answers to ask for, at least, in as many sequences.")] = 64,
    densities: Annotated[Any, listed(fractions, "Kept / causal blocks.")] = "0.12,0.25,0.5",
    gammas: Annotated[Any, listed(fractions, "Of flexproxy, besides the densities.")] = "",
    proxies: Annotated[Any, listed(names, "flexproxy's proxy heads; kv is the default.")] = "1,kv",
    stride: Annotated[
        Any, listed(strides, "flexproxy's strides; of queries and keys as 8:2, outliers as outlier8:1.")
    ] = "4",
    min_budget: Annotated[
        int, typer.Option(min=0, help="Tokens that a row keeps at least, where this can be set.")
    ] = 256,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help=f"Repeat it for several, none for no one; by default the usual ones. {'; '.join(BASELINES)}"),
    ] = None,
    trials: Annotated[bool, typer.Option("--trials", help="Also all trials of benchmarks/quality/trials.py.")] = False,
    corrections: Annotated[
        bool, typer.Option("--corrections", help="flexproxy also with means of dropped blocks, and with dense rows.")
    ] = False,
    out: Out = None,
    quick: Quick = False,
) -> None:
    chosen = USUAL_BASELINES if baseline is None else [name for name in baseline if name != "none"]
    try:
        unknown = sorted(set(chosen) - set(BASELINES))
        if unknown:
            raise ValueError(f"--baseline: expected some of {'; '.join(BASELINES)}, got {'; '.join(unknown)}")
        session = Session(model, device, text)
        if tasks is None:
            tasks = ["single", *(name for name in ("text", "prose", "code") if name in session.tasks)]
        session.check(tasks, lengths)
        configs = configs_for(proxies, stride, min_budget, session.heads, session.kv_heads)
        others = [*chosen, *(EXPERIMENTS if trials else ())]
        methods = methods_of(configs, others, densities, gammas, min_budget, corrections)
        settings = {"tasks": tasks, "lengths": lengths, "texts": texts, "answers": answers, "densities": densities}
        settings |= {"gammas": gammas, "proxies": proxies, "strides": stride, "min_budget": min_budget}
        results = session.results(
            result_path("quality", out, quick), settings | {"baselines": others, "corrections": corrections}
        )
    except ValueError as error:
        sys.exit(str(error))
    cells = [
        Cell(length, session.tasks[task], method, answers if session.tasks[task].metric == "exact" else texts)
        for length, task, method in product(lengths, tasks, methods)
    ]
    session.measure(cells, len(cells), results)


if __name__ == "__main__":
    command(main, **SHORT)
