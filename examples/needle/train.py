"""Train the needle model: a small Llama that reads Python source as bytes and answers key-value queries.

    python -m examples.needle.train --minutes 7.5 --out examples/needle        # in the root of the repository

One GPU, about ten minutes with compilation and evaluation. The text is every Python file below --text (by default the
site-packages of the running interpreter); one file in twenty is held out, chosen by a hash of its path, and half of
those is for this script's own evaluation. Writes model.safetensors (bfloat16), config.json and training_log.json to
--out. benchmarks/quality/training.py has what this shares with the training of larger models.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

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
    lengths={512: (128, 0.28), 2048: (32, 0.25), 8192: (8, 0.22), 32768: (2, 0.25)},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.5, help="training time, compilation and evaluation left out")
    parser.add_argument("--text", type=Path, default=default_folder(), help="folder of Python files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the checkpoint and the log")
    parser.add_argument("--sequences", type=int, default=16, help="evaluated batches of held-out text for each length")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = read_corpus(args.text, device)
    save(run(corpus, RECIPE, Limits(seconds=60 * args.minutes), 0, args.sequences), args.out)


if __name__ == "__main__":
    main()
