"""A batch of sequences of different lengths, padded as a tokenizer does it.

    python examples/padded_batch.py

A query of padding gives 0. Every sequence has budgets of its own, from its own
last tokens, so what a sequence gives does not depend on what it is batched
with: exactly, if its padding is on the right, or a whole number of blocks on
the left, because blocks then begin at the same tokens. Needs torch and einops.
"""

import warnings

import torch
from torch.nn.attention.flex_attention import flex_attention

import flexproxy
from flexproxy import masks

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
lengths, S, D, block_size = [1000, 424, 637], 1000, 32, 64
q = 2 * torch.randn(3, 4, S, D, device=device)
k, v = torch.randn(2, 3, 2, S, D, device=device)

# [B, S], 1 for a token: sequence 1 has its padding on the left (576 tokens,
# nine blocks), sequence 2 on the right.
attention_mask = torch.ones(3, S, dtype=torch.int64, device=device)
attention_mask[1, : S - lengths[1]] = 0
attention_mask[2, lengths[2] :] = 0

config = flexproxy.ProxyConfig(gamma=0.6, block_size=block_size, min_budget=128)
mask_mod = masks.and_masks(masks.causal, masks.padding(attention_mask))
selection = flexproxy.select(q, k, mask_mod=mask_mod, config=config)

# Eager flex_attention forms all scores, which will do for so few tokens.
# Compile it for more: see quickstart.py.
warnings.filterwarnings(
    "ignore", message="flex_attention called without torch.compile"
)
out = flex_attention(
    q, k, v, block_mask=selection.block_mask(), enable_gqa=True
)

for b, length in enumerate(lengths):
    real = attention_mask[b].bool()
    one_q, one_k, one_v = (x[b : b + 1, :, real] for x in (q, k, v))
    block_mask = flexproxy.build(one_q, one_k, config=config)
    alone = flex_attention(
        one_q, one_k, one_v, block_mask=block_mask, enable_gqa=True
    )
    error = float((out[b, :, real] - alone[0]).abs().max())
    print(
        f"{length:5d} tokens: density {selection.density()[b].mean():.3f}, "
        f"largest difference alone {error:.1e}"
    )
    torch.testing.assert_close(out[b, :, real], alone[0], rtol=1e-4, atol=1e-4)
    if out[b, :, ~real].any() or selection.density()[b].mean() == 1:
        raise SystemExit("expected zeros for padding, and a sparse mask")
