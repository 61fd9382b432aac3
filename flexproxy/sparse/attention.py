"""The last stage: sparse attention in one call, and dense attention where sparse cannot pay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy.checks import (
    check_attention_options,
    check_config,
    check_masks,
    check_queries_and_keys,
    check_scale,
    check_values,
    check_when,
)
from flexproxy.config import ProxyConfig
from flexproxy.masks.structure import MaskMod, structure_of
from flexproxy.ops import compat
from flexproxy.pipeline import dense_block_mask, select_for
from flexproxy.selection import Selection
from flexproxy.sparse import compensation
from flexproxy.sparse.kernel import Output, run_flex
from flexproxy.sparse.kernel_options import options_for, tiles_of

When: TypeAlias = Literal["auto", "always"]
Built: TypeAlias = Callable[[Selection], None]  # called with a selection once its BlockMask is made


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask_mod: MaskMod | None = ...,
    block_mask: BlockMask | None = ...,
    config: ProxyConfig | None = ...,
    scale: float | None = ...,
    score_mod: Any = ...,
    kernel_options: dict[str, Any] | None = ...,
    return_lse: Literal[False] = ...,
    when: When = ...,
    compensate: bool = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask_mod: MaskMod | None = ...,
    block_mask: BlockMask | None = ...,
    config: ProxyConfig | None = ...,
    scale: float | None = ...,
    score_mod: Any = ...,
    kernel_options: dict[str, Any] | None = ...,
    return_lse: Literal[True],
    when: When = ...,
    compensate: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
    config: ProxyConfig | None = None,
    scale: float | None = None,
    score_mod: Any = None,
    kernel_options: dict[str, Any] | None = None,
    return_lse: bool = False,
    when: When = "auto",
    compensate: bool = False,
) -> Output:
    """ProxyAttn in one call: builds the mask, then runs compiled ``flex_attention`` with it.

    Dense where sparse cannot pay: fewer queries than a block (decoding), every row's budget covers all keys, the
    settings keep every block, or, on a GPU, sequences so short that the estimate takes longer than what it saves.
    ``why_dense`` says which it will be.

    Args:
        q: queries ``[B, Hq, Sq, D]``, after the position embedding; fp32, fp16 or bf16, any strides.
        k, v: keys and values ``[B, Hkv, Skv, D]``, Sq <= Skv; Hkv divides Hq.
        mask_mod, block_mask, config, scale: as in ``build``.
        score_mod: change of the scores, as in ``flex_attention``. The estimate of the blocks does not see it.
        kernel_options: as in ``flex_attention``; None is ``flexproxy.kernel_options(q, k)``.
        return_lse: also return the log-sum-exp of the scores, fp32 ``[B, Hq, Sq]``; not on a CPU.
        when: "auto", or "always" for sparse attention whatever it costs.
        compensate: give back what is dropped. Every query attends, besides, to the mean key and the mean value of each
            block that was not selected, weighted as that many tokens (FlashPrefill V2, arXiv 2608.19758, equations 5
            and 6), in one softmax with the kept tokens; ``return_lse`` is then that of both. Only blocks that the mask
            allows whole to all queries of the row count: a mean over others would tell of hidden tokens. Blocks that
            the mask cuts through are left out. Exact where the keys of a block are equal, and its values. With blocks
            of 128 and a causal mask it adds 1/64 of the multiplications of dense attention at 16K tokens and 1/114
            at 128K, and on a GPU a pass over both outputs. Not with a ``score_mod``.

    Returns:
        ``[B, Hq, Sq, D]``, or that and the log-sum-exp. Rows without an allowed key are 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
    """
    return attend(q, k, v, mask_mod, block_mask, config, scale, score_mod, kernel_options, return_lse, when, compensate)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_mod: MaskMod | None,
    block_mask: BlockMask | None,
    config: ProxyConfig | None,
    scale: float | None,
    score_mod: Any = None,
    kernel_options: dict[str, Any] | None = None,
    return_lse: bool = False,
    when: When = "auto",
    compensate: bool = False,
    built: Built | None = None,
) -> Output:
    """``attention``, which can be watched; built: not called where it is dense."""
    config = check_config(config)
    check_queries_and_keys(q, k)
    check_values(v, q, k)
    check_masks(mask_mod, block_mask, q, k, config.block_size)
    check_attention_options(q, k, v, score_mod, kernel_options, return_lse, compensate)
    check_when(when)
    scale = check_scale(scale, q.shape[3])
    num_queries, num_keys = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    # A score_mod may capture a parameter that requires gradients, where q, k and v do not.
    requires = score_mod is not None or any(x.requires_grad for x in (q, k, v))
    gradients = torch.is_grad_enabled() and requires
    if not torch.is_grad_enabled():  # the CPU kernel refuses tensors that could require gradients
        q, k, v = q.detach(), k.detach(), v.detach()

    if when == "auto" and _why_dense(q, k, config) is not None:
        no_mask_needed = num_queries in (1, num_keys)
        if mask_mod is None and block_mask is None and score_mod is None and not return_lse and no_mask_needed:
            with compat.fastest_sdpa(q):
                return F.scaled_dot_product_attention(q, k, v, is_causal=num_queries > 1, scale=scale, enable_gqa=gqa)
        if block_mask is None:
            block_mask = dense_block_mask(q, k, mask_mod, config.block_size, gradients)
        selection = None
    else:
        selection = select_for(q, k, mask_mod, block_mask, config, scale, gradients, lists=True)

    if kernel_options is not None:
        options = tiles_of(config.block_size, q.device.type) | kernel_options
    else:
        given = mask_mod if block_mask is None else block_mask.mask_mod
        structure = None if given is None else structure_of(given)
        traced = torch.compiler.is_compiling()  # there the mask is that of build, see _run_selected
        lse = return_lse or compensate
        options = options_for(q, k, structure, traced, score_mod is not None, config.block_size, gradients, lse)
    arguments: dict[str, Any] = {"score_mod": score_mod, "scale": scale, "enable_gqa": gqa, "kernel_options": options}
    if selection is not None and compensate:
        if q.device.type == "cpu":  # whose kernel returns no log-sum-exp to merge by
            return _run_joined(q, k, v, selection, arguments, built)
        merged = _run_merged(q, k, v, selection, arguments, kernel_options is None, gradients, built)
        return merged if return_lse else merged[0]
    if return_lse:
        arguments |= compat.lse_arguments()
    if selection is not None:
        return _run_selected(q, k, v, selection, arguments, built)
    return run_flex(q, k, v, block_mask, arguments)


def _run_selected(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, arguments: dict[str, Any], built: Built | None = None
) -> Output:
    """``run_flex`` with the mask of a selection that suits how it runs."""
    # FLASH forgets the lists where a mask_mod is trivial, which only ours are known not to be.
    known = structure_of(selection.allowed).clauses is not None
    forgets = not known and arguments["kernel_options"].get("BACKEND") == "FLASH"
    listed = not torch.compiler.is_compiling() and not forgets
    block_mask = selection.listed_block_mask() if listed else selection.block_mask()
    if built is not None:
        built(selection)
    return run_flex(q, k, v, block_mask, arguments, selection.block_mask if listed else None)


def _run_joined(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, arguments: dict[str, Any], built: Built | None = None
) -> Output:
    """Attention to kept tokens and means of dropped blocks in one softmax."""
    means = compensation.means_of(k, v, selection)
    keys, values, block_mask, score_mod = compensation.join(k, v, means, selection)
    if built is not None:
        built(selection)
    return run_flex(q, keys, values, block_mask, arguments | {"score_mod": score_mod})


def _run_merged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    arguments: dict[str, Any],
    choose_options: bool,
    gradients: bool,
    built: Built | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by two softmaxes, merged by their log-sum-exps: each in the kernel, and with the options, that suit it.

    choose_options: the kernel options in the arguments are not the caller's own.
    """
    means, size = compensation.means_of(k, v, selection), selection.block_size
    arguments = arguments | compat.lse_arguments()
    out, lse = _run_selected(q, k, v, selection, arguments, built)
    if choose_options:
        arguments["kernel_options"] = options_for(q, means.keys, None, True, True, size, gradients, True)
    arguments["score_mod"] = means.score_mod()
    block_mask = means.block_mask(size, q.shape[2], gradients)
    other, other_lse = run_flex(q, means.keys, means.values, block_mask, arguments)
    fuse = q.is_cuda and not torch.compiler.is_compiling()  # a trace around it fuses by itself
    merge = compat.fused(compensation.merge) if fuse else compensation.merge
    return merge(out, lse, other, other_lse)


# Work of dense attention, in floating-point operations, that a GPU does while the host starts the kernels of a build:
# that of 8K tokens, or somewhat more, as the host is: 0.9 ms of cuDNN (benchmarks/results/build.json).
BUILD_FLOPS = 6e11
# What a kept block costs beside one of dense attention: flex_attention is slower than cuDNN. An estimate.
SPARSE_COST = 1.3


def why_dense(q: Tensor, k: Tensor, config: ProxyConfig | None = None) -> str | None:
    """Why ``attention`` will be dense, in a few words; None where it will be sparse.

    It goes by lengths and settings, and looks at no values. It assumes a causal mask, ``when="auto"``, and that a gamma
    keeps no more than ``min_budget``. On a GPU it compares the work that is saved with the time that the host takes to
    start the kernels of the estimate, both as on an H200 whose host waits for each call.

    Args:
        q, k, config: as for ``attention``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
    """
    check_queries_and_keys(q, k)
    return _why_dense(q, k, check_config(config))


def _why_dense(q: Tensor, k: Tensor, config: ProxyConfig) -> str | None:
    num_queries, num_keys = q.shape[2], k.shape[2]
    kept = config.min_blocks * config.block_size / num_keys
    if num_queries < config.block_size:  # it reads all keys for a block of queries
        return "fewer queries than a block"
    if config.keeps_all:
        return "the settings keep every block"
    if kept >= 1:
        return "min_budget covers all keys"
    if not q.is_cuda:
        return None
    rows = num_queries / num_keys  # the last rows of a triangle
    dense_flops = 4 * q.shape[0] * q.shape[1] * q.shape[3] * num_queries * num_keys * (1 - rows / 2)
    density = max(1 - (1 - kept) ** 2, config.density or 0.0)
    pays = SPARSE_COST * density * dense_flops + BUILD_FLOPS > dense_flops
    return "an estimate would take longer than it saves" if pays else None
