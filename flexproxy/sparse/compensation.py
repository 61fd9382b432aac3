"""Stage 7, compensation: every block that was dropped counts as one mean key and one mean value.

After FlashPrefill V2, arXiv 2608.19758, section 3.2, equations 5 and 6.

NOTE [Means]
A dropped block of n tokens counts as n tokens that all have its mean key and its mean value: one key whose score is
raised by log n. A query may attend to a mean only if it may see every token of the block, else the mean would tell it
of tokens that are hidden from it; the queries of a row of blocks are told together. So a dropped block counts for a row
where the mask allows every pair of the two (``whole_blocks``), and is left out where the mask cuts through it. For the
same reason a block that is not finite becomes a key of NaN and a value of 0: kernels multiply the values of hidden keys
by 0, which leaves NaN as it is, while hidden scores are replaced.

The means are the keys of a FlexAttention of its own, with blocks of block_size means; at 128K tokens and blocks of 128
these are 1024 keys in 8 blocks. M is their number with what fills the last block, which nobody may attend to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy.masks.blocks import whole_blocks
from flexproxy.ops import compat
from flexproxy.ops.operators import Output, capturable, operator
from flexproxy.ops.tensors import pad_to_multiple
from flexproxy.selection import Selection, membership
from flexproxy.sparse.kernel import Result
from flexproxy.sparse.plan import AttentionPlan, KernelPlan
from flexproxy.stages.lists import compile_block_mask

NEG_INF = -torch.inf


class Means(NamedTuple):
    """The blocks of a sequence as one key and one value each. See NOTE [Means].

    keys, values: ``[B, Hkv, M, D]``, means over the tokens of each block, in fp32, rounded once to the dtype of k.
    dropped: bool ``[B, Hq, Nq, M]``, the means that the queries of each row of blocks attend to.
    some, every: bool ``[B, Hq, Nq, M / block_size]``, the blocks of means with any, and with nothing but these.
    log_tokens: fp32 ``[M]``, the logarithm of how many tokens each stands for.
    """

    keys: Tensor
    values: Tensor
    dropped: Tensor
    some: Tensor
    every: Tensor
    log_tokens: Tensor

    def score_mod(self) -> Any:
        """Raises the scores as NOTE [Means] says, for ``flex_attention``."""
        log_tokens = self.log_tokens

        def weighted(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score + log_tokens[kv_idx]

        return weighted

    def block_mask(self, block_size: int, num_queries: int, compute_q_blocks: bool) -> BlockMask:
        """The mask of attention to the means alone."""
        lengths = num_queries, self.keys.shape[2]
        mask_mod = membership(self.dropped, block_size, 1)
        return compile_block_mask(self.some, self.every, mask_mod, block_size, lengths, compute_q_blocks)


def attend(q: Tensor, k: Tensor, v: Tensor, selection: Selection, plan: AttentionPlan) -> Result:
    """Attention to kept tokens and to the means of dropped blocks in one softmax."""
    if plan.means is None or q.device.type == "cpu":  # whose kernel returns no log-sum-exp to merge by
        return joined(q, k, v, selection, plan.kernel)
    result = merged(q, k, v, selection, plan.kernel, plan.means)
    return result if plan.return_lse else result[0]


def joined(q: Tensor, k: Tensor, v: Tensor, selection: Selection, kernel: KernelPlan) -> Tensor:
    """By one ``flex_attention``."""
    keys, values, block_mask, score_mod = join(k, v, means_of(k, v, selection), selection)
    out: Any = kernel.run(q, keys, values, block_mask, score_mod)
    return out  # type: ignore[no-any-return]


def merged(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, kernel: KernelPlan, of_means: KernelPlan
) -> tuple[Tensor, Tensor]:
    """By two, merged by their log-sum-exps: each in the kernel, and with the options, that suit it."""
    means = means_of(k, v, selection)
    out, lse = kernel.run(q, k, v, kernel.mask_of(selection), None, selection.block_mask)
    block_mask = means.block_mask(selection.block_size, q.shape[2], kernel.gradients)
    other, other_lse = of_means.run(q, means.keys, means.values, block_mask, means.score_mod())
    fuse = q.is_cuda and not torch.compiler.is_compiling()  # a trace around it fuses by itself
    return (compat.fused(merge) if fuse else merge)(out, lse, other, other_lse)


def means_of(k: Tensor, v: Tensor, selection: Selection) -> Means:
    """The means of all blocks, and which of them the selection leaves to be attended to.

    k ``[B, Hkv, Skv, D]``, v ``[B, Hkv, Skv, Dv]``; gradients flow to both.
    """
    size, num_keys = selection.block_size, selection.lengths[1]
    whole = whole_blocks(selection.allowed, selection.admissible, selection.full, selection.lengths, size)
    keys, values = block_means(k, size), block_means(v, size)
    finite = keys.isfinite().all(-1, keepdim=True) & values.isfinite().all(-1, keepdim=True)
    first = torch.arange(keys.shape[2], device=k.device) * size
    tokens = (num_keys - first).clamp(1, size)
    return Means(
        keys.masked_fill(~finite, torch.nan),
        values.masked_fill(~finite, 0.0),
        *dropped_blocks(selection.block_map(), whole, size),
        capturable(tokens.to(torch.float32).log()),
    )


def block_means(x: Tensor, block_size: int) -> Tensor:
    """Mean over the tokens of every block, a ragged last one too: ``[B, H, S, D]`` to ``[B, H, M, D]``, 0 behind."""
    number = x.shape[2] // block_size
    blocks: Tensor = x[:, :, : number * block_size].unflatten(2, (number, block_size))
    means = blocks.mean(3, dtype=torch.float32)
    if x.shape[2] % block_size:
        means = torch.cat([means, x[:, :, number * block_size :].mean(2, keepdim=True, dtype=torch.float32)], 2)
    return pad_to_multiple(means, -2, block_size, 0.0).to(x.dtype)


def _maps_of_means(a: Any) -> list[Output]:
    *rows, blocks = a.kept.shape
    number = -(-blocks // a.block_size)
    return [((*rows, n), torch.bool) for n in (number * a.block_size, number, number)]


@operator(_maps_of_means, has_kernel=False)
def dropped_blocks(kept: Tensor, whole: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """``dropped``, ``some`` and ``every`` of Means, from bool maps ``[B, Hq, Nq, Nk]`` (``whole`` is broadcast)."""
    dropped = pad_to_multiple(whole & ~kept, -1, block_size, False).contiguous()
    blocks: Tensor = dropped.unflatten(-1, (-1, block_size))
    return dropped, blocks.any(-1), blocks.all(-1)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from the attention to each, as if it had been one softmax.

    Args:
        out, other: ``[B, H, S, D]``, 0 in rows without a key.
        lse, other_lse: fp32 ``[B, H, S]``, -inf in these rows.

    Returns:
        Output, in the dtype of ``out``, and log-sum-exp, fp32. Where one set is empty, those of the other, exactly.
    """
    empty = (lse == NEG_INF) & (other_lse == NEG_INF)
    # Filled before, not after: the gradient of what is replaced must be finite too.
    lse, other_lse = lse.masked_fill(empty, 0.0), other_lse.masked_fill(empty, 0.0)
    share = torch.sigmoid(other_lse - lse)[..., None]
    merged = (1 - share) * out.to(torch.float32) + share * other.to(torch.float32)
    return merged.to(out.dtype), torch.logaddexp(lse, other_lse).masked_fill(empty, NEG_INF)


def join(k: Tensor, v: Tensor, means: Means, selection: Selection) -> tuple[Tensor, Tensor, BlockMask, Any]:
    """Kept tokens and means as the keys of one ``flex_attention``: for kernels that return no log-sum-exp.

    Returns:
        Keys and values ``[B, Hkv, Nk block_size + M, D]``: tokens, what fills their last block, means. The mask, and
        the ``score_mod``. No lists for gradients.
    """
    size, (num_queries, num_keys) = selection.block_size, selection.lengths
    keys, values = (
        torch.cat([pad_to_multiple(x, -2, size, 0.0), mean], 2) for x, mean in ((k, means.keys), (v, means.values))
    )
    first = keys.shape[2] - means.keys.shape[2]
    kept, mask_mod = selection.block_map(), selection.allowed
    kept_pair, dropped_pair = membership(kept, size), membership(means.dropped, size, 1)
    log_tokens = capturable(torch.cat([means.log_tokens.new_zeros(first), means.log_tokens]))

    def joined(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        token, mean = kv_idx.clamp(max=num_keys - 1), (kv_idx - first).clamp(min=0)
        of_tokens = (kv_idx < num_keys) & kept_pair(b, h, q_idx, token) & mask_mod(b, h, q_idx, token)
        return of_tokens | ((kv_idx >= first) & dropped_pair(b, h, q_idx, mean))

    some = torch.cat([kept, means.some], -1)
    full = torch.cat([selection.full.expand_as(kept), means.every], -1)
    block_mask = compile_block_mask(some, full, joined, size, (num_queries, keys.shape[2]), compute_q_blocks=False)
    return keys, values, block_mask, means._replace(log_tokens=log_tokens).score_mod()
