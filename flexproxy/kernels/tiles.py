"""Shapes of the work of one program, by dtype and head dimension. ``benchmarks.bench_tiles`` measures them."""

from __future__ import annotations

import torch

from flexproxy.kernels.block_logits import Tile


def scores_tile(dtype: torch.dtype, head_dim: int) -> Tile:
    """Of the pass over sampled queries and keys."""
    if dtype == torch.float32:  # its products are exact, and so without tensor cores
        return Tile(32, 32, 64, 4, 1)
    if head_dim > 128:
        return Tile(64, 64, 64, 4, 2)
    return Tile(128, 64, 64, 8, 3, tma=True)


def masses_tile(dtype: torch.dtype, head_dim: int, block_size: int) -> Tile:
    """Of the pass over the probes, no more than block_size of each head, and all keys."""
    if dtype == torch.float32 or head_dim > 128 or block_size < 128:
        tile = scores_tile(dtype, head_dim)
        return tile._replace(rows=max(16, min(tile.rows, block_size)), warps=4)
    return Tile(128, 64, 64, 4, 3, tma=True)
