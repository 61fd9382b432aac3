"""What a layer does: sparse by which settings, or dense and why; and in words, for a server's log.

Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from flexproxy.config import ProxyConfig, changed_fields
from flexproxy.integrations.common import ranges
from flexproxy.sparse.plan import When, why_dense


class Plan(NamedTuple):
    """How a layer prefills long prompts.

    config: the settings of the whole model.
    share: those for the heads of this rank; None where the layer stays dense.
    why_dense: in a few words, where it does.
    """

    config: ProxyConfig
    share: ProxyConfig | None
    when: When = "auto"
    why_dense: str | None = None


class Heads(NamedTuple):
    """The heads of a layer that a rank has, and where their keys are stored."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def pays(self, plan: Plan, num_queries: int, num_keys: int) -> bool:
        """Whether such a prefill is sparse."""
        if plan.share is None or plan.when == "always":
            return plan.share is not None
        # Nothing is stored: lengths, dtype and device are all that is looked at.
        one = torch.empty((), dtype=self.dtype, device=self.device)
        q = one.expand(1, self.num_q_heads, num_queries, self.head_dim)
        k = one.expand(1, self.num_kv_heads, num_keys, self.head_dim)
        return why_dense(q, k, plan.share) is None

    def shortest(self, plan: Plan, max_queries: int, max_keys: int) -> int | None:
        """Tokens of the shortest prompt whose last step is sparse; None where no prompt's is.

        max_queries: new tokens of a step.
        """

        def pays(length: int) -> bool:
            return self.pays(plan, min(length, max_queries), length)

        low, high = 2, max_keys
        if not pays(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if pays(middle) else (middle + 1, high)
        return low


def description(plans: Mapping[int, Plan], shortest: Mapping[Plan, int | None]) -> list[str]:
    """What the layers of a model do, a line for each kind of them.

    Args:
        plans: by layer.
        shortest: tokens of the shortest sparse prompt, by plan.
    """
    lines = []
    for plan in dict.fromkeys(plans.values()):
        which = "layers " + ranges(layer for layer, other in plans.items() if other == plan)
        settings = ", ".join(f"{name}={value}" for name, value in changed_fields(plan.config).items()) or "the defaults"
        if plan.share is None:
            lines.append(f"{which} stay dense: {plan.why_dense}")
        elif shortest[plan] is None:
            lines.append(f"{which} stay dense: with {settings} no prompt of this server is long enough")
        else:
            lines.append(f"{which} prefill sparsely where a prompt has {shortest[plan]} tokens or more: {settings}")
    return lines


def rehearsals(max_queries: int, max_keys: int) -> list[tuple[int, int]]:
    """Numbers of queries and keys to try, in whole blocks and not, the longest last.

    Kernels that hold a row of blocks are compiled for each power of two of its blocks; flex_attention for the first
    lengths, for any at the second, of queries and of keys, and perhaps once more where there are as many of both.
    """
    most = min(max_queries, max_keys)
    fewer = most * 3 // 4  # as in the last step of a prompt
    powers = (2**n for n in range(10, max_keys.bit_length()))
    lengths = [length for length in powers if length < max_keys] + [max_keys]
    pairs = []
    for queries, keys in [(fewer, fewer), (fewer, max_keys), *((min(most, keys), keys) for keys in lengths)]:
        pairs += [(min(queries - 1, keys - 3), keys - 3), (queries // 128 * 128, keys // 128 * 128)]
    return [(q, k) for q, k in dict.fromkeys([*pairs, (most, max_keys)]) if 1 < q <= k]


def layer_index(name: str) -> int:
    """The layer of a module: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), 0)
