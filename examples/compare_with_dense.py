"""How far sparse attention is from dense attention: layer by layer, on the
activations of a trained model.

    python examples/compare_with_dense.py

The needle model reads a text that every Python has, densely. Then the queries,
keys and values of each layer go through sparse attention, at several gammas.
Needs transformers too.
"""

import argparse
import itertools
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AutoModelForCausalLM

import flexproxy
from flexproxy import stats

NEEDLE_MODEL = Path(__file__).resolve().parent / "needle"
S = 1024

layers: list[tuple[torch.Tensor, ...]] = []


def remember(
    _: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    **others: Any,
) -> Any:
    """Dense causal attention, as transformers calls it, that keeps what it was
    given, and its output.
    """
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    layers.append((q, k, v, out))
    return out.transpose(1, 2), None


AttentionInterface.register("remember", remember)
model = AutoModelForCausalLM.from_pretrained(
    NEEDLE_MODEL, attn_implementation="remember", dtype=torch.float32
)
text = Path(argparse.__file__).read_bytes()[:S]  # the model reads bytes
with torch.no_grad():
    model(torch.tensor([list(text)]))

# Eager flex_attention forms all scores, which will do for so few tokens.
# Compile it for more: see quickstart.py.
warnings.filterwarnings(
    "ignore", message="flex_attention called without torch.compile"
)
print(
    "gamma  density  recovered mass, worst head  "
    "error of the output, worst layer"
)
means = []
for gamma in (0.80, 0.95, 1.00):
    config = flexproxy.ProxyConfig(
        gamma=gamma, num_proxies=2, stride=2, block_size=64, min_budget=128
    )
    densities, masses, errors = [], [], []
    for q, k, v, dense in layers:
        selection = flexproxy.select(q, k, config=config)
        out = flex_attention(
            q, k, v, block_mask=selection.block_mask(), enable_gqa=True
        )
        densities.append(selection.density()[0])
        masses.append(stats.recovered_mass(q, k, selection)[0])
        # of each layer alone: they do not add up here
        errors.append((out - dense).norm() / dense.norm())
    density, mass, error = (
        torch.stack(densities),
        torch.stack(masses),
        torch.stack(errors),
    )
    means.append(
        (float(density.mean()), float(mass.mean()), float(error.mean()))
    )
    print(
        f"{gamma:5.2f}  {density.mean():7.3f}  "
        f"{mass.mean():14.3f}  {mass.min():10.3f}  "
        f"{error.mean():19.4f}  {error.max():11.4f}"
    )

if means[-1][0] != 1 or means[-1][2] > 1e-5:
    raise SystemExit("expected gamma=1.0 to be dense attention")
for sparser, denser in itertools.pairwise(means):
    if not (
        sparser[0] < denser[0]
        and sparser[1] < denser[1]
        and sparser[2] > denser[2]
    ):
        raise SystemExit(
            "expected a higher gamma to keep more blocks, recover more mass "
            "and err less"
        )
