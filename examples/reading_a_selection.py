"""What the heads of a trained model keep: a selection as a table, as numbers,
as maps of blocks.

    python examples/reading_a_selection.py

Takes the queries and keys of one layer of the needle model, on a text that
every Python has. Needs transformers too.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM

import flexproxy
from flexproxy import stats

NEEDLE_MODEL = Path(__file__).resolve().parent / "needle"
S, LAYER = 2048, 4

layers: list[tuple[torch.Tensor, ...]] = []


def remember(
    _: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    **others: Any,
) -> Any:
    """Dense causal attention that keeps what transformers gave it."""
    layers.append((q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    ).transpose(1, 2), None


AttentionInterface.register("remember", remember)
model = AutoModelForCausalLM.from_pretrained(
    NEEDLE_MODEL, attn_implementation="remember", dtype=torch.float32
)
text = Path(argparse.__file__).read_bytes()[:S]  # the model reads bytes
with torch.no_grad():
    model(torch.tensor([list(text)]))
q, k, _ = layers[LAYER]  # [1, 8, S, 64] and [1, 2, S, 64]

config = flexproxy.ProxyConfig.paper(
    gamma=0.90, num_proxies=2, stride=2, block_size=64, min_budget=128
)
selection = flexproxy.select(q, k, config=config)
print(selection.summary())  # dataclasses.asdict gives the same as numbers

kept = selection.block_map()  # [B, Hq, Nq, Nk], what each row of blocks keeps
# [B, Hq], of the attention of 256 queries from all parts
mass = stats.recovered_mass(q, k, selection)
print(
    "\nhead  proxy  blocks a row  density  recovered mass  "
    "keys of the last row of blocks"
)
for head in range(kept.shape[1]):
    count, density = (
        int(selection.count[0, head, -1]),
        selection.density()[0, head],
    )
    row = "".join("#" if block else "." for block in kept[0, head, -1].tolist())
    print(
        f"{head:4d}  {selection.proxy_of[head]:5d}  {count:12d}  "
        f"{density:7.3f}  {mass[0, head]:14.3f}  {row}"
    )

# The counts are what gamma asks for; the last row of blocks, from which they
# were taken, has that mass or nearly so.
last = torch.arange(S - 64, S)
mass_of_last = stats.recovered_mass(q, k, selection, rows=last)
print(
    "\nmass that the last 64 queries recover: "
    f"{mass_of_last.min():.3f} to {mass_of_last.max():.3f}, gamma 0.90"
)
if not (
    torch.equal(kept[0, :, -1].sum(-1), selection.count[0, :, -1])
    and mass_of_last.min() > 0.8
):
    raise SystemExit(
        "expected the last row to keep each head's count of blocks, and "
        "most of the attention"
    )
