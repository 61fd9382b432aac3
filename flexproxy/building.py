"""``build``: from queries and keys to a BlockMask."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy.config import ProxyConfig
from flexproxy.masks.structure import MaskMod
from flexproxy.pipeline import check_memory, estimate, read_mask
from flexproxy.plan import plan_estimate
from flexproxy.replay import replayed
from flexproxy.selection import mask_of_blocks


def build(
    q: Tensor,
    k: Tensor,
    *,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
    config: ProxyConfig | None = None,
    scale: float | None = None,
) -> BlockMask:
    """Build the per-head BlockMask of ProxyAttn, for ``flex_attention(q, k, v, block_mask=..., enable_gqa=True)``.

    Args:
        q, k, mask_mod, block_mask, config, scale: as for ``select``, and so are the errors.

    Returns:
        BlockMask ``[B, Hq, Sq, Skv]`` of every head's kept blocks, and within them the mask that was given. It has the
        lists that gradients need if q or k requires them.
    """
    plan = plan_estimate((q, k), mask_mod, block_mask, (config, scale))
    if mask_mod is None and block_mask is None and not plan.gradients:
        blocks = replayed(q, k, plan, copies=True)
        if blocks is not None:
            frame = plan.frame
            return mask_of_blocks(*blocks, frame.block_size, (frame.num_queries, frame.num_keys), gradients=False)
    check_memory(q, k, plan)
    return estimate(q, k, read_mask(mask_mod, block_mask, plan.frame, q.device), plan).block_mask()
