"""Train the needle model: a small Llama that reads Python source as bytes and
answers key-value queries.

python -m examples.needle.train --minutes 7.5 --out examples/needle        # in
the root of the repository

One GPU, about ten minutes with compilation and evaluation. The text is every
Python file below --text (by default the site-packages of the running
interpreter); one file in twenty is held out, chosen by a hash of its path, and
half of those is for this script's own evaluation. Writes model.safetensors
(bfloat16), config.json and training_log.json to --out.
benchmarks/quality/training.py has what this shares with the training of larger
models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.quality.texts import default_folder
from benchmarks.quality.training import Limits, Recipe, read_corpus, run, save

RECIPE = Recipe(
    shape={
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    lengths={
        512: (128, 0.28),
        2048: (32, 0.25),
        8192: (8, 0.22),
        32768: (2, 0.25),
    },
)


def main(
    *,
    minutes: Annotated[
        float,
        typer.Option(
            help="Training time, compilation and evaluation left out."
        ),
    ] = 7.5,
    text: Annotated[
        Path | None,
        typer.Option(help="Folder of Python files; by default site-packages."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the checkpoint and the log.")
    ] = Path("examples/needle"),
    sequences: Annotated[
        int,
        typer.Option(
            help="Evaluated batches of held-out text for each length."
        ),
    ] = 16,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = read_corpus(text or default_folder(), device)
    save(run(corpus, RECIPE, Limits(seconds=60 * minutes), 0, sequences), out)


if __name__ == "__main__":
    typer.run(main)
