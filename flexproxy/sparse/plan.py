"""What attention needs besides the values of its tensors, worked out once: NOTE [Plans] in flexproxy/plan.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy.checks import (
    check_attention_options,
    check_config,
    check_queries_and_keys,
    check_scale,
    check_selection,
    check_values,
    check_when,
)
from flexproxy.config import ProxyConfig
from flexproxy.masks.structure import MaskMod, Structure, structure_of
from flexproxy.ops import compat
from flexproxy.plan import Plan, Tensors, check_mask, new_plan, planned
from flexproxy.sparse.kernel import Result, run_flex
from flexproxy.sparse.kernel_options import options_for, tiles_of

When: TypeAlias = Literal["auto", "always"]


class Masks(Protocol):
    """A selection, as a kernel needs it."""

    def block_mask(self) -> BlockMask: ...
    def listed_block_mask(self) -> BlockMask: ...


@dataclass(frozen=True)
class KernelPlan:
    """How ``flex_attention`` runs.

    Attributes:
        scale: factor of the scores.
        gqa: there are fewer key heads than query heads.
        gradients: they are needed.
        detach: the CPU kernel refuses tensors that require gradients, also where none are recorded.
        listed: the ``mask_mod`` need not look up which blocks are kept, for the kernel visits the listed ones alone.
        lse: the log-sum-exp is returned.
        kernel_options: as in ``flex_attention``.
    """

    scale: float
    gqa: bool
    gradients: bool
    detach: bool
    listed: bool
    lse: bool
    kernel_options: dict[str, Any]

    def mask_of(self, selection: Masks) -> BlockMask:
        """The mask that suits the kernel."""
        return selection.listed_block_mask() if self.listed else selection.block_mask()

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_mask: BlockMask | None,
        score_mod: Any = None,
        eager_mask: Callable[[], BlockMask] | None = None,
    ) -> Result:
        """``flex_attention`` by the plan. eager_mask: as in ``run_flex``, where the mask is that of ``mask_of``."""
        arguments: dict[str, Any] = {"score_mod": score_mod, "scale": self.scale, "enable_gqa": self.gqa}
        arguments["kernel_options"] = self.kernel_options
        if self.lse:
            arguments |= compat.lse_arguments()
        if self.detach:
            q, k, v = q.detach(), k.detach(), v.detach()
        return run_flex(q, k, v, block_mask, arguments, eager_mask if self.listed else None)


@dataclass(frozen=True)
class AttentionPlan:
    """What a call of ``attention`` does.

    Attributes:
        dense: why it is dense, in a few words; None where it is sparse.
        by_sdpa: it is dense, and nothing that ``scaled_dot_product_attention`` lacks is asked for.
        asks_for_cudnn: ``scaled_dot_product_attention`` takes cuDNN's kernel only if asked for it.
        estimate: the plan of the estimate; None where it is dense.
        kernel: that of ``flex_attention``.
        block_size: tokens per block.
        is_inference: sparse, under the default mask and options, and nothing but the output is needed.
    """

    dense: str | None
    by_sdpa: bool
    asks_for_cudnn: bool
    estimate: Plan | None
    kernel: KernelPlan
    block_size: int
    is_inference: bool


class Settings(NamedTuple):
    """The settings of a call of ``attention``: the type of its ``score_mod``, and the items of its options."""

    config: ProxyConfig | None
    scale: float | None
    score_mod: type
    kernel_options: tuple[tuple[str, Any], ...] | None
    return_lse: bool
    when: When = "auto"


@planned
def plan_attention(
    tensors: Tensors, mask_mod: MaskMod | None, block_mask: BlockMask | None, settings: tuple[Any, ...]
) -> AttentionPlan:
    """The plan of ``attention``. tensors: q, k, v. settings: Settings.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    (q, k, v), call = tensors, Settings(*settings)
    config = check_config(call.config)
    check_queries_and_keys(q, k)
    check_values(v, q, k)
    structure = check_mask(mask_mod, block_mask, q, k, config.block_size)
    check_attention_options(q, k, v, call.score_mod, call.return_lse)
    check_when(call.when)
    scale = check_scale(call.scale, q.shape[3])
    dense = reason_to_be_dense(q, k, config) if call.when == "auto" else None
    kernel = _plan_kernel(q, k, v, structure, config.block_size, scale, call)
    plain = structure is None and call.score_mod is NoneType and not call.return_lse and q.shape[2] in (1, k.shape[2])
    estimate = new_plan(q, k, config, scale, kernel.gradients) if dense is None else None
    is_default = structure is None and kernel.listed and not compat.in_a_mode()
    bare = call.score_mod is NoneType and call.kernel_options is None and not (call.return_lse or kernel.gradients)
    by_sdpa = dense is not None and plain
    return AttentionPlan(
        dense=dense,
        by_sdpa=by_sdpa,
        asks_for_cudnn=by_sdpa and compat.must_ask_for_cudnn(q, k, v),
        estimate=estimate,
        kernel=kernel,
        block_size=config.block_size,
        is_inference=dense is None and is_default and bare,
    )


@planned
def plan_kernel(
    tensors: Tensors, mask_mod: MaskMod | None, block_mask: BlockMask | None, settings: tuple[Any, ...]
) -> KernelPlan:
    """The plan of ``Selection.attention``.

    Args:
        tensors: q, k, v.
        mask_mod: the mask of the selection.
        settings: Settings, and what the selection was made for: B, Hq, Sq, Skv, its device and its block size.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    (q, k, v), (*given, made_for, device, block_size) = tensors, settings
    call = Settings(*given)
    check_queries_and_keys(q, k)
    check_values(v, q, k)
    check_selection(made_for, device, q, k)
    check_attention_options(q, k, v, call.score_mod, call.return_lse)
    structure = None if mask_mod is None else structure_of(mask_mod)
    return _plan_kernel(q, k, v, structure, block_size, check_scale(call.scale, q.shape[3]), call)


def _plan_kernel(
    q: Tensor, k: Tensor, v: Tensor, structure: Structure | None, block_size: int, scale: float, call: Settings
) -> KernelPlan:
    """structure: of the mask; None of the default one."""
    has_score_mod = call.score_mod is not NoneType
    # A score_mod may capture a parameter that requires gradients, where q, k and v do not.
    requires = any(x.requires_grad for x in (q, k, v))
    gradients = torch.is_grad_enabled() and (requires or has_score_mod)
    traced = torch.compiler.is_compiling()  # there the mask is that of build: eager flex_attention may run the trace
    if call.kernel_options is not None:
        options = tiles_of(block_size, q.device.type) | dict(call.kernel_options)
    else:
        options = options_for(
            q, k.shape[2], structure, block_size, gradients,
            membership=traced, has_score_mod=has_score_mod, lse=call.return_lse,
        )  # fmt: skip
    # FLASH forgets the lists where a mask_mod is trivial, which only ours are known not to be.
    known = structure is None or structure.clauses is not None
    return KernelPlan(
        scale=scale,
        gqa=q.shape[1] != k.shape[1],
        gradients=gradients,
        detach=q.device.type == "cpu" and not gradients,
        listed=not traced and (known or options.get("BACKEND") != "FLASH"),
        lse=call.return_lse,
        kernel_options=options,
    )


# TFLOPS of dense causal attention in bf16 by compute capability: of an H200 as measured, in
# benchmarks/results/calls.json; of an A100 by FlashAttention-2's paper (arXiv 2307.08691), which reaches 50 to 73 % of
# 312 TFLOPS. Other GPUs count as an H200: those that are slower stay dense at more lengths than need be.
DENSE_TFLOPS = {(8, 0): 200, (9, 0): 600}
# By how much longer the host takes for a sparse call than for a dense one: up to 0.3 ms beside an H200
# (benchmarks/results/calls.json); other hosts have taken twice as long. Inside a model the host runs ahead, and the GPU
# waits for neither; whether it does depends on the model, so a host that is waited for is assumed.
HOST_MS = 0.4
# Time of an estimate on a CPU, as a share of dense attention: at 8K tokens 1/16 with stride 4 and 1/8 with stride 2,
# less for longer prompts (benchmarks/results/cpu.json).
CPU_BUILD = 0.1
# What a kept block costs beside one of dense attention: flex_attention is slower than cuDNN. An estimate.
SPARSE_COST = 1.3


def why_dense(q: Tensor, k: Tensor, config: ProxyConfig | None = None) -> str | None:
    """Why ``attention`` will be dense, in a few words; None where it will be sparse.

    It goes by lengths and settings, and looks at no values. It assumes a causal mask, ``when="auto"``, and that a gamma
    keeps no more than ``min_budget``. On a GPU it compares the work that is saved, at the speed of dense attention on
    GPUs of its class, with the time that the host takes to start the kernels of the estimate, as if each call was
    waited for; on a CPU it assumes that the estimate takes a tenth of the time of dense attention.

    Args:
        q, k, config: as for ``attention``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
    """
    check_queries_and_keys(q, k)
    return reason_to_be_dense(q, k, check_config(config))


def reason_to_be_dense(q: Tensor, k: Tensor, config: ProxyConfig) -> str | None:
    """``why_dense``, of arguments that were checked."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    kept = config.min_blocks * config.block_size / num_keys
    if num_queries < config.block_size:  # it reads all keys for a block of queries
        return "fewer queries than a block"
    if config.keeps_all:
        return "the settings keep every block"
    if kept >= 1:
        return "min_budget covers all keys"
    rows = num_queries / num_keys  # the last rows of a triangle
    dense_flops = 4 * q.shape[0] * q.shape[1] * q.shape[3] * num_queries * num_keys * (1 - rows / 2)
    density = max(1 - (1 - kept) ** 2, config.density or 0.0)
    if q.is_cuda:
        tflops = DENSE_TFLOPS.get(compat.capability(q.device), DENSE_TFLOPS[9, 0])
        build, assumed = HOST_MS * 1e9 * tflops, f"a host that is waited for, dense attention at {tflops} TFLOPS"
    else:
        build, assumed = CPU_BUILD * dense_flops, "a tenth of dense attention"
    loses = SPARSE_COST * density * dense_flops + build > dense_flops
    return f"an estimate would take longer than it saves ({assumed})" if loses else None
