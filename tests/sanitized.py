"""Small builds for compute-sanitizer, which watches what every kernel reads and writes: out of bounds, and races.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.sanitized
    compute-sanitizer --tool racecheck python -m tests.sanitized

Without the cache of PyTorch every tensor is an allocation of its own, so that what is beyond its end is seen.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch.nn.attention.flex_attention import and_masks

import flexproxy
from flexproxy import ProxyConfig, masks
from flexproxy.masks.structure import MaskMod
from flexproxy.plan import plan_estimate
from flexproxy.replay import Captures, Replay
from tests.settings import outliers


class Shape(NamedTuple):
    """Of the inputs."""

    batch: int
    num_q_heads: int
    num_kv_heads: int
    num_queries: int
    num_keys: int
    head_dim: int


def cases(device: str) -> dict[str, tuple[Shape, MaskMod | None, ProxyConfig]]:
    """Ragged lengths, a padded batch under two masks, and a mask that is evaluated pair by pair."""
    present = torch.ones(2, 300, dtype=torch.bool, device=device)
    present[1, :77] = False

    def every_third(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        return (q_idx >= kv_idx) & ((q_idx - kv_idx) % 3 != 1)

    return {
        "ragged, fewer queries than keys": (
            Shape(1, 4, 2, 333, 517, 64),
            None,
            ProxyConfig(num_proxies=2, density=0.5, min_budget=128),
        ),
        "padding and a window": (
            Shape(2, 4, 1, 300, 300, 80),
            and_masks(masks.causal, masks.padding(present), masks.sliding_window(190)),
            ProxyConfig(gamma=0.8, min_budget=64, block_size=64),
        ),
        "outliers of documents": (
            Shape(2, 4, 2, 300, 333, 64),
            masks.shift(and_masks(masks.causal, masks.document(torch.arange(333, device=device) // 150)), 33),
            outliers(min_budget=64, block_size=64, density=0.4),
        ),
        "outliers of a mask by pairs": (
            Shape(1, 4, 2, 260, 260, 256),
            every_third,
            outliers(min_budget=128, query_stride=16, stride=2),
        ),
        "rows share": (
            Shape(2, 4, 2, 300, 333, 64),
            None,
            ProxyConfig(num_proxies=4, query_stride=16, min_budget=128, gamma=0.8, block_size=32, sharing="rows"),
        ),
        "a mask by pairs": (Shape(1, 2, 2, 260, 260, 96), every_third, ProxyConfig(num_proxies=2, min_budget=128)),
    }


class NothingCaptured(Captures):
    """Without the cache of PyTorch a capture can take no memory; what would be in it runs before."""

    def __init__(self) -> None:
        pass

    def capture(self, work: object) -> NoReturn:
        raise torch.OutOfMemoryError


def main() -> None:
    torch.manual_seed(0)
    for name, (shape, mask_mod, config) in cases("cuda").items():
        batch, num_q_heads, num_kv_heads, num_queries, num_keys, head_dim = shape
        q = torch.randn(batch, num_q_heads, num_queries, head_dim, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(batch, num_kv_heads, num_keys, head_dim, device="cuda", dtype=torch.bfloat16)
        block_mask = flexproxy.build(q, k, mask_mod=mask_mod, config=config)
        if mask_mod is None:  # as attention reads queries and keys from the second call on
            plan = plan_estimate((q, k), None, None, (config, None))
            replay = Replay(NothingCaptured(), plan, rows_apart=0)
            for _ in range(2):
                replay.blocks(q, k)
        torch.cuda.synchronize()
        print(f"{name}: {int(block_mask.kv_num_blocks.sum())} partial blocks are kept")


if __name__ == "__main__":
    main()
