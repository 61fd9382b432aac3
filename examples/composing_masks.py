"""Packed documents, a sliding window and the blocks of each head, in one
BlockMask.

    python examples/composing_masks.py

The mask is part of the estimate: what it forbids takes part in no score and in
no budget. Needs torch and einops.
"""

import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import (
    create_block_mask,
    create_mask,
    flex_attention,
)

import flexproxy
from flexproxy import masks

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
B, Hq, Hkv, S, D = 1, 4, 2, 2048, 32
# tokens near one another are alike
tokens = F.normalize(torch.randn(B, 1, S, D).cumsum(2), dim=-1)
q = (torch.tensor([30.0, 100.0, 300.0, 1000.0]).view(1, Hq, 1, 1) * tokens).to(
    device
)
k = tokens.repeat(1, Hkv, 1, 1).to(device)
v = torch.randn(B, Hkv, S, D, device=device)

# Three documents in one row, the last 48 tokens are padding; a token sees the
# 500 most recent ones of its document.
document_ids = torch.full((S,), -1, device=device)
document_ids[:2000] = torch.arange(2000, device=device) // 700
mask_mod = masks.and_masks(
    masks.causal, masks.document(document_ids), masks.sliding_window(500)
)

config = flexproxy.ProxyConfig(gamma=0.9, min_budget=128)
block_mask = flexproxy.build(q, k, mask_mod=mask_mod, config=config)

# A mask in which another one is wanted as well: membership alone goes into
# masks.and_masks like any other function ...
selection = flexproxy.select(q, k, mask_mod=mask_mod, config=config)
both = masks.and_masks(mask_mod, selection.mask_mod())
by_tokens = create_block_mask(both, B, Hq, S, S, device=device)
# ... and two BlockMasks are joined block by block, without looking at tokens.
window = create_block_mask(
    masks.sliding_window(200), None, None, S, S, device=device
)
narrower = flexproxy.and_block_masks(block_mask, window)

# Eager flex_attention forms all scores, which will do for so few tokens.
# Compile it for more: see quickstart.py.
warnings.filterwarnings(
    "ignore", message="flex_attention called without torch.compile"
)
out = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)

allowed = create_mask(mask_mod, None, None, S, S, device=device)[0, 0]
kept = create_mask(block_mask.mask_mod, B, Hq, S, S, device=device)
print(f"pairs of tokens that are allowed:   {allowed.sum():7d}")
print(
    "of these kept, head by head:       ",
    *(f"{x:7d}" for x in kept.sum((0, 2, 3)).tolist()),
)
print(f"blocks kept / admissible:           {selection.density().mean():.3f}")

torch.testing.assert_close(by_tokens.to_dense(), block_mask.to_dense())
if (
    (kept & ~allowed).any()
    or out[:, :, 2000:].any()
    or not kept.sum() < Hq * allowed.sum()
):
    raise SystemExit(
        "expected fewer pairs than the mask allows, none besides, and "
        "nothing for padding"
    )
if (narrower.to_dense() > block_mask.to_dense()).any() or (
    narrower.to_dense() > window.to_dense()
).any():
    raise SystemExit("expected the blocks that are in both masks")
