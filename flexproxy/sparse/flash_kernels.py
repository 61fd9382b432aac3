"""The kernels of flash-attn-4 under a causal mask. To be imported only where that package is installed."""

from __future__ import annotations

import threading

import cutlass
from cutlass import cute
from flash_attn.cute import flash_attn_func, utils
from torch import Tensor

from flexproxy.stages.lists import Lists

# The package's compiler takes the process down if two threads enter it, and its first calls are not known from here.
# (flex_attention calls it without this lock.)
_compiling = threading.Lock()


@cute.jit
def _causal(batch, head, query, key, lengths, tables):
    # The arguments are those of each mask_mod of the package.
    before = utils.scalar_to_ssa(lengths.seqlen_k - lengths.seqlen_q, cutlass.Int32)
    return query + before >= key


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Lists,
    block_size: int,
    scale: float,
    longest_first: bool,
) -> Tensor:
    """``flexproxy.sparse.flash.attend``, of tensors in the package's layout: ``[B, S, H, D]``."""
    count, index, full_count, full_index = lists
    mask = {"causal": True} if longest_first else {"mask_mod": _causal}
    with _compiling:
        out = flash_attn_func(
            q,
            k,
            v,
            softmax_scale=scale,
            mask_block_cnt=count,
            mask_block_idx=index,
            full_block_cnt=full_count,
            full_block_idx=full_index,
            block_size=(block_size, block_size),
            **mask,
        )
    output: Tensor = out[0] if isinstance(out, tuple) else out
    return output
