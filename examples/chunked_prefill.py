"""Prefill in chunks against a growing cache, in plain PyTorch: each chunk has a
mask and budgets of its own.

    python examples/chunked_prefill.py

Without a mask, query i of a chunk stands at position i + Skv - Sq, so the cache
needs no bookkeeping. With gamma=1.0 the chunks together are one dense prefill,
whatever their lengths. Needs torch and einops.
"""

import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import flexproxy

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
S, D = 1536, 32
# tokens near one another are alike
tokens = F.normalize(torch.randn(1, 1, S, D).cumsum(2), dim=-1)
q = (torch.tensor([8.0, 30.0, 100.0, 300.0]).view(1, 4, 1, 1) * tokens).to(
    device
)
k = tokens.repeat(1, 2, 1, 1).to(device)
v = torch.randn(1, 2, S, D, device=device)

# Eager flex_attention forms all scores, which will do for so few tokens.
# Compile it for more: see quickstart.py.
warnings.filterwarnings(
    "ignore", message="flex_attention called without torch.compile"
)


def prefill(
    config: flexproxy.ProxyConfig, chunk_sizes: list[int]
) -> tuple[torch.Tensor, list[float]]:
    """The output ``[B, Hq, S, D]``, and the mean density of each chunk."""
    outputs, densities, end = [], [], 0
    for size in chunk_sizes:
        start, end = end, end + size
        chunk, cached_k, cached_v = (
            q[:, :, start:end],
            k[:, :, :end],
            v[:, :, :end],
        )
        selection = flexproxy.select(chunk, cached_k, config=config)
        block_mask = selection.block_mask()
        outputs.append(
            flex_attention(
                chunk,
                cached_k,
                cached_v,
                block_mask=block_mask,
                enable_gqa=True,
            )
        )
        densities.append(float(selection.density().mean()))
    return torch.cat(outputs, 2), densities


dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
sizes = [512, 512, 300, 212]  # any lengths
for gamma in (1.0, 0.9):
    out, densities = prefill(
        flexproxy.ProxyConfig(gamma=gamma, block_size=64, min_budget=256), sizes
    )
    error = float((out - dense).norm() / dense.norm())
    print(
        f"gamma {gamma}: density of each chunk",
        *(f"{x:.3f}" for x in densities),
        f"error {error:.1e}",
    )
    if gamma == 1.0:
        torch.testing.assert_close(out, dense, rtol=1e-3, atol=1e-3)
    elif not (densities[-1] < densities[0] <= 1.0 and error < 0.1):
        raise SystemExit(
            "expected later chunks to keep a smaller share of the blocks, and "
            "an error below 0.1"
        )
