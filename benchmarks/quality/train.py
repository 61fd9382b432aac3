"""Train the needle models that quality is measured on, one for each seed: no conclusion should hang on a single one.

    python -m benchmarks.quality.train --out needle-models                             # two seeds, 20 min of one H200
    python -m benchmarks.quality.train --out toy --recipe toy --steps 20 --device cpu  # to see that it runs

The text is every Python file below --text; the files that benchmarks/quality/texts.py holds out are not trained on, and
the figures at the end are of its calibration texts, so its evaluation texts stay unseen. Writes model.safetensors
(bfloat16), config.json and training_log.json (the recipe, the limits, the steps that were done, the losses) to a folder
for each seed. A limit that ends a training early is in the log, and the learning rate falls to its end within it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness import HelpFormatter, positive_float, positive_int
from benchmarks.quality.byte_tasks import NAMES
from benchmarks.quality.texts import default_folder
from benchmarks.quality.training import Limits, Recipe, read_corpus, run, save

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


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="folder, of a folder for each seed: seed0, seed1, ...")
    options.add_argument("--recipe", choices=RECIPES, default="large", help="size, lengths and tasks")
    options.add_argument(
        "--tasks", nargs="+", choices=NAMES, metavar="TASK", help=f"of {', '.join(NAMES)}; if none, the recipe's"
    )
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one model each")
    options.add_argument("--minutes", type=positive_float, default=8.0, help="of training, for each seed")
    options.add_argument("--steps", type=positive_int, help="end after so many, if the minutes are not over before")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what to train on")
    options.add_argument("--text", type=Path, default=default_folder(), help="folder of Python files")
    options.add_argument("--sequences", type=positive_int, default=8, help="evaluated batches of a task and length")
    args = options.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        options.error("--device: expected a GPU, found none; --device cpu is for --recipe toy")
    recipe = RECIPES[args.recipe]
    if args.tasks:
        recipe = replace(recipe, tasks=tuple(args.tasks))
    limits = Limits(seconds=60 * args.minutes, steps=args.steps or math.inf)
    try:
        corpus = read_corpus(args.text, torch.device(args.device))
        print("corpus", corpus.counts, flush=True)
        for seed in args.seeds:
            save(run(corpus, recipe, limits, seed, args.sequences), args.out / f"seed{seed}")
            print(f"wrote {args.out / f'seed{seed}'}", flush=True)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
