"""Train the needle models that quality is measured on, one for each seed: no conclusion should hang on a single one.

    python -m benchmarks.quality.train --out needle-models                             # two seeds, 20 min of one H200
    python -m benchmarks.quality.train --out toy --recipe toy --steps 20 --device cpu  # to see that it runs

The text is every Python file below --text; the files that benchmarks/quality/texts.py holds out are not trained on, and
the figures at the end are of its calibration texts, so its evaluation texts stay unseen. Writes model.safetensors
(bfloat16), config.json and training_log.json (the recipe, the limits, the steps that were done, the losses) to a folder
for each seed. A limit that ends a training early is in the log, and the learning rate falls to its end within it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness import command, listed
from benchmarks.quality.byte_tasks import NAMES
from benchmarks.quality.texts import default_folder
from benchmarks.quality.training import Limits, Recipe, read_corpus, run, save
from flexproxy.cli.common import Device
from flexproxy.cli.inputs import pick_device

RECIPES = {
    "large": Recipe(  # 13.5 M parameters
        shape={
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 131072,
        },
        lengths={512: (128, 0.28), 2048: (32, 0.25), 8192: (8, 0.22), 32768: (2, 0.25)},
        tasks=("single", "multivalue", "single", "multiquery", "variables"),
        evaluated=(2048, 8192, 32768, 65536),
        learning_rate=1.2e-3,
    ),
    "toy": Recipe(  # answers nothing: it shows that the training runs
        shape={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        lengths={256: (4, 0.5), 2048: (1, 0.5)},
        short=256,
        tasks=("single", "variables"),
    ),
}


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def train(
    *,
    out: Annotated[Path, typer.Option(help="Folder, of a folder for each seed: seed0, seed1, ...")],
    recipe: Annotated[str, typer.Option(help=f"Size, lengths and tasks: {', '.join(RECIPES)}.")] = "large",
    tasks: Annotated[list[str] | None, typer.Option(help=f"Repeat it for several: {', '.join(NAMES)}.")] = None,
    seeds: Annotated[Any, listed(_seeds, "One model each.")] = "0,1",
    minutes: Annotated[float, typer.Option(min=1e-3, max=1e4, help="Of training, for each seed.")] = 8.0,
    steps: Annotated[int | None, typer.Option(min=1, help="End after so many, if the time is not over.")] = None,
    device: Annotated[Device, typer.Option(help="What to train on; auto takes a GPU if there is one.")] = Device.cuda,
    text: Annotated[Path | None, typer.Option(help="Folder of Python files; by default site-packages.")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Evaluated batches of a task and length.")] = 8,
) -> None:
    try:
        chosen = RECIPES.get(recipe)
        if chosen is None or set(tasks or ()) - set(NAMES):
            raise ValueError(f"expected a recipe of {', '.join(RECIPES)} and tasks of {', '.join(NAMES)}")
        if tasks:
            chosen = replace(chosen, tasks=tuple(tasks))
        corpus = read_corpus(text or default_folder(), pick_device(device.value))
        print("corpus", corpus.counts, flush=True)
        for seed in seeds:
            limits = Limits(seconds=60 * minutes, steps=steps or math.inf)
            save(run(corpus, chosen, limits, seed, sequences), out / f"seed{seed}")
            print(f"wrote {out / f'seed{seed}'}", flush=True)
    except ValueError as error:
        sys.exit(str(error))


def main(argv: Sequence[str] | None = None) -> None:
    command(train, argv)


if __name__ == "__main__":
    main()
