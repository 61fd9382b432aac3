"""What a call needs besides the values of its tensors, worked out once.

NOTE [Plans]
A plan follows from shapes, dtypes, devices, the kind of the mask and the settings, and never from the values of a
tensor: those may change in place. It holds no tensor and no function of the caller's. It is found by one lookup; only
a combination that was not seen before is checked and planned. In a trace, where lengths may be symbols, and in a mode
of torch every call is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexproxy.checks import (
    check_config,
    check_mask_function,
    check_masks,
    check_queries_and_keys,
    check_scale,
    needs_much_memory,
)
from flexproxy.config import ProxyConfig
from flexproxy.masks.structure import MaskMod, Structure, check_tables, structure_of
from flexproxy.ops.compat import in_a_mode, seq_lengths_of
from flexproxy.stages.proxy import Groups, head_groups
from flexproxy.stages.ranking import ForcedRule

MAX_KEPT = 1024
Made = TypeVar("Made")
Tensors: TypeAlias = tuple[Tensor, ...]
Make: TypeAlias = Callable[[Tensors, MaskMod | None, BlockMask | None, tuple[Any, ...]], Made]


class Planner(Protocol[Made]):
    """Finds plans, or makes them. plans: those that were kept, by what they depend on."""

    plans: dict[Hashable, Made]

    def __call__(
        self, tensors: Tensors, mask_mod: MaskMod | None, block_mask: BlockMask | None, settings: tuple[Any, ...]
    ) -> Made: ...


def planned(make: Make[Made]) -> Planner[Made]:
    """Keep the plans that a function makes. See NOTE [Plans].

    The function gets tensors, the mask and the settings, which are hashable, and raises where one of them does not fit.
    """
    plans: dict[Hashable, Made] = {}

    def find(tensors: Tensors, mask_mod: MaskMod | None, block_mask: BlockMask | None, settings: Any) -> Made:
        try:
            # The types of settings too, for True is 1 to a dictionary.
            key = (
                *map(_facts, tensors), torch.is_grad_enabled(), _kind(mask_mod), _kind_of_lists(block_mask),
                settings, *map(type, settings),
            )  # fmt: skip
            plan = plans.get(key)
        except (AttributeError, RuntimeError, TypeError):  # not what it should be, or lengths that are symbols
            return make(tensors, mask_mod, block_mask, settings)
        if plan is None:
            plan = make(tensors, mask_mod, block_mask, settings)
            if len(plans) >= MAX_KEPT:
                plans.clear()
            plans[key] = plan
        return plan

    @functools.wraps(make)
    def find_or_make(
        tensors: Tensors, mask_mod: MaskMod | None, block_mask: BlockMask | None, settings: tuple[Any, ...]
    ) -> Made:
        # A trace must not see the dictionary: torch 2.5 refuses its keys.
        way = make if torch.compiler.is_compiling() or in_a_mode() else find
        return way(tensors, mask_mod, block_mask, settings)

    planner = cast(Planner[Made], find_or_make)
    planner.plans = plans
    return planner


def _facts(x: Tensor) -> Hashable:
    return type(x), x.shape, x.dtype, x.device, x.layout, x.requires_grad


def _kind(mask_mod: MaskMod | None) -> Hashable:
    """What is known of a mask, and the shapes of its tables."""
    if mask_mod is None:
        return None
    if not isinstance(getattr(mask_mod, "structure", None), Structure):
        check_mask_function(mask_mod)  # another of its kind may be fine where it is not
    structure = structure_of(mask_mod)
    tables = [(name, x.shape, x.device, per_sequence) for name, x, per_sequence in structure.tables]
    return structure.clauses is None, *tables


def _kind_of_lists(block_mask: BlockMask | None) -> Hashable:
    if block_mask is None:
        return None
    index = block_mask.kv_indices
    lengths = seq_lengths_of(block_mask)
    return index.shape, index.device, block_mask.BLOCK_SIZE, lengths, _kind(block_mask.mask_mod)


class Frame(NamedTuple):
    """What of a call its mask is prepared for, besides the device."""

    batch: int
    num_heads: int
    num_queries: int
    num_keys: int
    block_size: int
    strides: tuple[int | None, int]  # of sampled queries, None where they are chosen later, and of keys
    forced: tuple[int, int]  # sink_blocks, local_blocks
    dense_last_blocks: int
    groups: Groups  # the query heads of every proxy

    def rule(self, offset: Tensor) -> ForcedRule:
        return ForcedRule(offset, self.num_queries, self.block_size, *self.forced)

    def of_all_heads(self) -> Frame:
        """For a mask that is the same for all heads."""
        return Frame(self.batch, 1, *self[2:8], ((0,),))  # torch 2.5 does not trace _replace

    def num_blocks(self) -> tuple[int, int]:
        return -(-self.num_queries // self.block_size), -(-self.num_keys // self.block_size)


@dataclass(frozen=True, eq=False)
class Plan:
    """What an estimate needs. See NOTE [Plans]. Equal is only itself: what is kept for a plan is found by it.

    Attributes:
        config, scale: the settings, the defaults filled in.
        frame: what the mask is prepared for.
        key_groups: the key heads of every proxy.
        gradients: the BlockMask gets the lists that gradients need.
        much_memory: the BlockMask is so large that the memory that is free is asked for before it is made.
    """

    config: ProxyConfig
    scale: float
    frame: Frame
    key_groups: Groups
    gradients: bool
    much_memory: bool

    @property
    def shares_rows(self) -> bool:
        """Rows and heads share one budget."""
        return self.config.sharing == "rows" and self.config.target < 1.0

    @property
    def needs_masses(self) -> bool:
        """Budgets need a probe: not where everything is the target (a ``max_budget`` may still keep less), nor where
        rows share a density."""
        return self.config.target < 1.0 and not (self.shares_rows and self.config.density is not None)


@planned
def plan_estimate(
    tensors: Tensors, mask_mod: MaskMod | None, block_mask: BlockMask | None, settings: tuple[Any, ...]
) -> Plan:
    """The plan of ``select`` and ``build``. tensors: q, k. settings: config, scale.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    q, k = tensors
    config, scale = settings
    config = check_config(config)
    check_queries_and_keys(q, k)
    check_mask(mask_mod, block_mask, q, k, config.block_size)
    scale = check_scale(scale, q.shape[3])
    return new_plan(q, k, config, scale, torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))


def new_plan(q: Tensor, k: Tensor, config: ProxyConfig, scale: float, gradients: bool) -> Plan:
    """The plan of an estimate whose arguments were checked.

    Raises:
        ValueError: the proxies do not fit the heads.
    """
    groups, key_groups = head_groups(config, q.shape[1], k.shape[1])
    sizes = q.shape[0], q.shape[1], q.shape[2], k.shape[2], config.block_size
    strides = (None if config.chooses_queries else config.strides[0]), config.strides[1]
    forced = config.sink_blocks, config.local_blocks
    frame = Frame(*sizes, strides, forced, config.dense_last_blocks, groups)
    return Plan(config, scale, frame, key_groups, gradients, needs_much_memory(q, k, config, gradients))


def check_mask(
    mask_mod: MaskMod | None, block_mask: BlockMask | None, q: Tensor, k: Tensor, block_size: int
) -> Structure | None:
    """Check the mask of a call. Returns what is known of it, None of the default one."""
    check_masks(mask_mod, block_mask, q, k, block_size)
    given = mask_mod if block_mask is None else block_mask.mask_mod
    if given is None:
        return None
    structure = structure_of(given)
    check_tables(structure.tables, q)
    return structure
