"""flash-attn-4 under a causal mask, called directly.

NOTE [FLASH directly]
With ``BACKEND="FLASH"``, compiled ``flex_attention`` calls the package's kernels. On the way there the host checks the
call in three layers of torch, which takes as long as the kernel at 8K tokens, and a process imports and runs a compiler
before its first call. The package's own function takes the lists of a ``BlockMask`` too.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor

from flexproxy.ops import compat
from flexproxy.ops.operators import on_device_of
from flexproxy.stages.lists import Lists


def fits(kernel_options: dict[str, Any]) -> bool:
    """Whether ``attend`` can do what ``flex_attention`` does with these options."""
    return kernel_options.get("BACKEND") == "FLASH" and compat.flash_takes_lists()


def attend(q: Tensor, k: Tensor, v: Tensor, lists: Lists, block_size: int, scale: float, longest_first: bool) -> Tensor:
    """Attention to listed blocks under a causal mask that ends with the last query and key: ``[B, Hq, Sq, D]``.

    Args:
        q, k, v: ``[B, Hq, Sq, D]``, ``[B, Hkv, Skv, D]``, each as of ``kernel.prepared``.
        lists: as of a ``BlockMask``.
        longest_first: start the last rows first, so that long ones do not end long after all others. Each block is
            masked then, the full ones too, which takes up to 5 % longer (H200).
    """
    tokens_first = (x.transpose(1, 2) for x in (q, k, v))
    with on_device_of(q):
        out: Tensor = _kernels().attend(*tokens_first, lists, block_size, scale, longest_first)
    return out.transpose(1, 2)


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("flexproxy.sparse.flash_kernels")
