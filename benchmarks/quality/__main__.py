"""How much of a model's quality is left under sparse prefill: flexproxy, other methods and an oracle at equal density.

    python -m benchmarks.quality                                       # a needle model of this repository
    python -m benchmarks.quality --model meta-llama/Llama-3.1-8B --text book.txt --lengths 32768 --tasks single multikey

Tasks are made on the spot from a text: needles, chains of variables, frequent words, and the prediction of the text
itself. Every method chooses blocks of 128; the attention is the same sparse kernel for all. Writes a JSON file, after
every cell, and draws quality against density beside it (PNG). The same command again goes on where it was stopped.
docs/quality.md says what the columns mean.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.harness import fraction, parse, parser, positive_int, result_path, versions
from benchmarks.quality import report
from benchmarks.quality.evaluate import ResultFile, run
from benchmarks.quality.methods import BASELINES, Method, check, methods_of
from benchmarks.quality.models import attention_shape, default_model, fingerprint, name_of, tasks_for
from benchmarks.quality.prompt_tasks import TASKS as ALL_TASKS
from benchmarks.quality.samples import Task
from benchmarks.quality.texts import Text, default_folder, read_text
from flexproxy import ProxyConfig
from flexproxy.cli.inputs import load_decoder, pick_device, reads_bytes
from flexproxy.environment import processor


def options(argv: Sequence[str] | None) -> Namespace:
    """The options, with what stands for those that were not given."""
    tasks, baselines = ", ".join(ALL_TASKS), "; ".join(BASELINES)
    found = parser(__doc__)
    found.prog = "python -m benchmarks.quality"
    found.add_argument("--model", help="folder or name of a causal model; if none, benchmarks/quality/needle13m")
    found.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is the GPU if there is one"
    )
    found.add_argument(
        "--text", type=Path, help="file or folder to make tasks from; a needle model reads Python packages"
    )
    found.add_argument(
        "--tasks", nargs="+", choices=ALL_TASKS, default=["single", "text"], metavar="TASK", help=f"of: {tasks}"
    )
    found.add_argument("--lengths", type=positive_int, nargs="+", default=[8192], help="tokens of a sequence")
    found.add_argument(
        "--sequences", type=positive_int, default=16, help="sequences of a task; their seeds count from 0"
    )
    found.add_argument("--densities", type=fraction, nargs="*", default=[0.1, 0.25, 0.4], help="kept / causal blocks")
    found.add_argument("--gammas", type=fraction, nargs="*", default=[], help="of flexproxy, besides the densities")
    found.add_argument("--compensate", action="store_true", help="flexproxy also with the means of dropped blocks")
    found.add_argument("--proxies", type=positive_int, nargs="*", default=[1, 2], help="flexproxy's proxy heads")
    found.add_argument(
        "--strides",
        type=stride_option,
        nargs="*",
        default=["4", "outlier8:1", "2", "1"],
        help="flexproxy's strides; of queries and of keys, as 8:2, where they differ; the outlier of 8 queries: "
        "outlier8:1",
    )
    found.add_argument(
        "--min-budget", type=int, default=256, help="tokens that a row keeps at least, where this can be set"
    )
    found.add_argument(
        "--baselines", nargs="*", choices=BASELINES, metavar="NAME", help=f"if not given, all of: {baselines}"
    )
    args = parse(found, argv, lengths=[1024], sequences=2, densities=[0.5], proxies=[1], strides=["4"])
    args.baselines = list(BASELINES) if args.baselines is None else args.baselines
    return args


def stride_option(text: str) -> str:
    """An argument of ``--strides``, as it stands: what is brought to ``config_of``."""
    if not re.fullmatch(r"((outlier)?[1-9]\d*:)?[1-9]\d*", text):
        raise ArgumentTypeError(
            f"expected a stride, as 4, or that of queries and that of keys, as 8:2 or outlier8:1, got {text}"
        )
    return text


def config_of(proxies: int, text: str, min_budget: int) -> ProxyConfig:
    """flexproxy's settings for an argument of ``--strides``."""
    query, _, key = text.rpartition(":")
    stride = query.removeprefix("outlier")
    return ProxyConfig(
        num_proxies=proxies,
        stride=int(key),
        query_stride=int(stride) if stride else None,
        query_choice="outlier" if stride != query else "first",
        min_budget=min_budget,
    )


def prepare(args: Namespace) -> tuple[Any, Any, list[Task], list[Method], Text]:
    """Model, haystack, tasks, methods and text of a run; stops it with one line where something does not fit."""
    args.model = default_model() if args.model is None else args.model
    model = load_decoder(args.model, pick_device(args.device), "sdpa")
    if args.text is None:
        if not reads_bytes(model):
            raise ValueError("--text: expected a file or folder, got none; name a long text, a book for example")
        args.text = default_folder()
    text = read_text(args.text, "evaluation", trained_on=reads_bytes(model) and args.text.is_dir())
    tasks, haystack = tasks_for(model, args.model, text)
    missing = sorted(set(args.tasks) - set(tasks))
    if missing:
        raise ValueError(f"--tasks: expected {', '.join(tasks)} for this model, got {', '.join(missing)}; leave it out")
    chosen = [tasks[name] for name in args.tasks]
    for task, length in product(chosen, args.lengths):
        task.make(0, length, haystack)  # a text or a length that is too short is said now
    configs = [config_of(proxies, strides, args.min_budget) for proxies, strides in product(args.proxies, args.strides)]
    methods = methods_of(configs, args.baselines, args.densities, args.gammas, args.min_budget, args.compensate)
    check(methods, *attention_shape(model))
    return model, haystack, chosen, methods, text


def settings_of(args: Namespace, model: Any, text: Text) -> dict[str, Any]:
    """What the result depends on; no paths."""
    left_out = ("out", "quick", "device", "model", "text")
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    settings["model"] = {"name": name_of(args.model), "fingerprint": fingerprint(model), "dtype": str(model.dtype)[6:]}
    settings["text"] = {"name": text.name, "bytes": len(text.content), "digest": text.digest}
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    args = options(argv)
    out = result_path(args, "quality")
    try:
        model, haystack, tasks, methods, text = prepare(args)
        results = ResultFile(out, {"device": processor(model.device)} | versions(), settings_of(args, model, text))
    except ValueError as error:
        sys.exit(str(error))
    cells = len(args.lengths) * len(tasks) * len(methods)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=cells)
        for n, cell in enumerate(run(model, haystack, tasks, methods, args.lengths, args.sequences, results)):
            progress.update(bar, description=cell, completed=n)
    console = Console()
    for table in report.tables(results.rows):
        console.print(table)
    report.draw(results.data, out.with_suffix(".png"))
    console.print(f"wrote {out} and {out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
