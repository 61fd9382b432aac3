"""Our reading of Prism (arXiv 2602.08426): blocks by pooled queries and keys, the RoPE bands apart and calibrated.

The paper, section 3.4. The mean over a block erases the dimensions that RoPE turns quickly (equation 6), and a softmax
over all dimensions does not see what is left of them. So pooled queries and keys are cut into the dimensions of high
and of low frequency, which may overlap; each band has its own softmax over the causal blocks of a row (equation 9), of
which the fewest blocks are kept that hold ``p`` (appendix C); the mask is the union of both (equation 10). The
temperature of a band brings its logits to the size of those of all dimensions: ``sqrt(d_z / d)`` times the ratios of
the root mean squares of pooled queries and of pooled keys, band to whole, per head (equation 13).

Bands: 64 dimensions of high and 96 of low frequency for heads of 128 (section 4.1). The paper sets other ones for
other RoPE bases (HunyuanVideo, appendix D.2), and leaves open what holds for other head dimensions. Here 1/2 and 3/4
of the dimensions unless told otherwise. All dimensions are taken to be rotated, as in the paper.

Not said in the paper; here as in its public code (xinghaow99/prism):
- the first and the diagonal block are always kept, on top of what the bands select;
- "the first dimensions" (section 3.4, figure 4) are meant in order of frequency. The rotation of Llama and Qwen in
  transformers pairs dimension i with i + D / 2, so a band is cut from both halves; ``interleaved`` is for neighbours.

Different from the public code: that fills a ragged end with zeros and divides by a whole block, here the last block is
the mean of the tokens that it has; it takes root mean squares in the inputs' dtype; its Triton selection makes a tie
less likely by taking 1e-9 per block index from the probabilities, here equals go by index; it reads its settings from
environment variables. A band without energy divides zero by zero there, here its blocks are equals.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.baselines.blocks import (
    BLOCK_SIZE,
    FORCED,
    below,
    causal_blocks,
    check_prompt,
    compiled_on_gpu,
    cover_levels,
    forced_blocks,
    grouped_logits,
    pool_blocks,
    widen,
)


def prism(
    q: Tensor,
    k: Tensor,
    p: float = 0.95,
    high: int | None = None,
    low: int | None = None,
    interleaved: bool = False,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """Blocks that Prism keeps, causal: bool ``[B, Hq, N, N]``.

    Args:
        q: ``[B, Hq, S, D]``, after the rotary position embedding.
        k: ``[B, Hkv, S, D]``.
        p: probability that each band keeps in each row, in [0, 1]; 1 keeps every block. The paper's are 0.95 for
            Llama-3.1-8B and 0.93 for Qwen3.
        high: dimensions of high frequency, an even number up to D; None is D / 2, the paper's for D 128.
        low: dimensions of low frequency; None is 3 D / 4, the paper's for D 128.
        interleaved: whether RoPE turns neighbours together, not the two halves of a head.

    Raises:
        ValueError: shapes do not fit, or a band has no pairs of dimensions.
    """
    return below(prism_levels(q, k, high, low, interleaved, block_size), p)


def prism_levels(
    q: Tensor,
    k: Tensor,
    high: int | None = None,
    low: int | None = None,
    interleaved: bool = False,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """From which p on each block is kept (NOTE [Levels] in ``blocks``); arguments and errors as above."""
    check_prompt(q, k)
    head_dim = q.shape[3]
    high, low = head_dim // 2 if high is None else high, 3 * head_dim // 4 if low is None else low
    for name, size in (("high", high), ("low", low)):
        if size % 2 or not 0 < size <= head_dim or head_dim % 2:
            raise ValueError(
                f"{name}: expected an even number of dimensions, up to D, for an even D, got {size} for D {head_dim}; "
                "RoPE turns dimensions in pairs"
            )
    q_pairs, k_pairs = (_pairs(widen(pool_blocks(x, block_size)), interleaved) for x in (q, k))
    half = head_dim // 2
    num_blocks = q_pairs.shape[2]
    whole = _energy(q_pairs, k_pairs)
    levels = []
    for band in (slice(0, high // 2), slice(half - low // 2, half)):
        q_band, k_band = q_pairs[..., band, :], k_pairs[..., band, :]
        size = 2 * q_band.shape[3]
        temperature = math.sqrt(size / head_dim) * _energy(q_band, k_band) / whole
        logits = grouped_logits(q_band.flatten(3), k_band.flatten(3))
        probability = _probability(logits, 1 / (temperature * math.sqrt(size)))
        levels.append(cover_levels(probability, torch.zeros_like(probability, dtype=torch.bool)))
    lower = torch.minimum(*levels).masked_fill_(forced_blocks(num_blocks, 1, 1, 0, q.device), FORCED)
    return lower.masked_fill_(~causal_blocks(num_blocks, q.device), torch.inf)


def _pairs(x: Tensor, interleaved: bool) -> Tensor:
    """The dimensions that RoPE turns together, by falling frequency: ``[B, H, N, D]`` to ``[B, H, N, D / 2, 2]``."""
    pairs: Tensor = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).mT
    return pairs


def _energy(q_pairs: Tensor, k_pairs: Tensor) -> Tensor:
    """Root mean square of a head's pooled queries times that of its keys: ``[B, Hq, 1, 1]``, not zero."""
    q_rms, k_rms = (x.square().mean((2, 3, 4)).sqrt() for x in (q_pairs, k_pairs))
    k_rms = k_rms.repeat_interleave(q_rms.shape[1] // k_rms.shape[1], 1)
    energy: Tensor = (q_rms * k_rms).clamp(min=1e-12)
    return energy[..., None, None]


@compiled_on_gpu
def _probability(logits: Tensor, scale: Tensor) -> Tensor:
    """Softmax over the causal blocks of every row, of logits ``[B, Hq, N, N]`` times a scale ``[B, Hq, 1, 1]``."""
    causal = causal_blocks(logits.shape[-1], logits.device)
    probability: Tensor = (logits * scale).masked_fill(~causal, -torch.inf).softmax(-1)
    return probability
