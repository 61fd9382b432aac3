"""Shapes of the work of one program, by dtype, head dimension and device. ``benchmarks.bench_tiles`` measures them."""

from __future__ import annotations

import functools

import torch

from flexproxy.ops import compat
from flexproxy.ops.kernels.block_logits import Tile


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether the large tiles were measured on this device; the interpreter takes them too."""
    return device.type != "cuda" or compat.is_hopper(device)


def scores_tile(dtype: torch.dtype, head_dim: int, device: torch.device) -> Tile:
    """Of the pass over sampled queries and keys."""
    if dtype == torch.float32:  # its products are exact, and so without tensor cores
        return Tile(32, 32, 64, 4, 1)
    if head_dim > 128:
        return Tile(64, 64, 64, 4, 2)
    if is_hopper(device):
        return Tile(128, 128, 32, 8, 2, tma=True, registers=128)
    return Tile(128, 64, 64, 8, 3, tma=True)


def masses_tile(dtype: torch.dtype, head_dim: int, device: torch.device, block_size: int) -> Tile:
    """Of the pass over the probes, no more than block_size of each head, and all keys."""
    if dtype == torch.float32 or head_dim > 128:
        tile = scores_tile(dtype, head_dim, device)
        return tile._replace(rows=max(16, min(tile.rows, block_size)))
    if block_size >= 128 and is_hopper(device):
        return Tile(64, 128, 64, 4, 3, tma=True, registers=128)
    return Tile(max(16, min(128, block_size)), 64, 64, 4, 3, tma=True)
