"""The first program: the mask of one layer, sparse attention with it, and what
it left out.

    python examples/quickstart.py

Needs torch and einops; on a CPU also a C++ compiler, with which torch.compile
builds the kernel.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import flexproxy

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

# In place of the activations of a layer: tokens near one another are alike, and
# each head looks more sharply than the one before.
S, D = 2048, 64
tokens = F.normalize(torch.randn(1, 1, S, D).cumsum(2), dim=-1)
sharpness = 2.0 ** torch.arange(3, 11).view(1, 8, 1, 1)
# [B, Hq, Sq, D], after the position embedding
q = (sharpness * tokens).to(device)
# [B, Hkv, Skv, D], two heads that four query heads share each
k = tokens.repeat(1, 2, 1, 1).to(device)
v = torch.randn(1, 2, S, D, device=device)

# Every head keeps the blocks that hold 90 % of its attention, and at least 512
# tokens a row.
config = flexproxy.ProxyConfig(gamma=0.90, min_budget=512)
block_mask = flexproxy.build(q, k, config=config)

# The mask is an ordinary BlockMask. On a CPU, compile for one set of lengths at
# a time.
compiled = torch.compile(
    flex_attention, dynamic=False if device == "cpu" else None
)
out = compiled(q, k, v, block_mask=block_mask, enable_gqa=True)

# The same in one call, with the options that are fastest here. It stays dense
# where sparse attention cannot pay, as on a GPU for so few tokens.
same = flexproxy.attention(q, k, v, config=config)

dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
error, other_error = ((x - dense).norm() / dense.norm() for x in (out, same))
# [Hq], kept blocks / admissible blocks
density = flexproxy.select(q, k, config=config).density()[0]
print("density of every head:", *(f"{x:.2f}" for x in density.tolist()))
print(
    f"mean density {density.mean():.3f}, "
    f"error of the output {error:.3f} of its norm"
)

if not (density.mean() < 0.9 and error < 0.1 and other_error < 0.1):
    raise SystemExit(
        "expected less than 0.9 of the blocks to be kept, and an error "
        "below 0.1"
    )
