"""The parts of a mask of transformers, as masks of flexproxy.

transformers describes a mask by a function of absolute positions, put together from a few parts: causal, sliding
window, packed sequences and so on.

NOTE [Known parts]
A part that is recognised becomes one of ``flexproxy.masks``, whose blocks are counted; a mask with any other part is
evaluated as it is, so that nothing of it is lost. Parts are recognised by the constructor that made them, and only if
that constructor, tried on a small grid, means what ours means: a later transformers that changes one costs time, and
not correctness.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from transformers import masking_utils

from flexproxy import masks
from flexproxy.masks.structure import MaskMod

MaskFunction: TypeAlias = Callable[..., Any]


class Keys(NamedTuple):
    """Which keys a layer has: positions ``start`` to ``start + number - 1``."""

    start: int | Tensor
    number: int
    device: torch.device

    def positions(self) -> Tensor:
        start = self.start.to(self.device) if isinstance(self.start, Tensor) else self.start
        return torch.arange(self.number, device=self.device) + start

    def look_up(self, table: Tensor, missing: int) -> Tensor:
        """The columns of a table ``[B, positions]`` that belong to the keys; ``missing`` where it ends before."""
        table = table.to(self.device)
        if isinstance(self.start, int) and self.start == 0 and table.shape[1] == self.number:
            return table
        width, positions = table.shape[1], self.positions()
        return torch.where(positions < width, table[:, positions.clamp(max=width - 1)], missing)


def translate(function: MaskFunction, keys: Keys, known: frozenset[str] | None = None) -> tuple[MaskMod, ...] | None:
    """The same mask as parts of which all must hold, over the positions of ``keys``; None if a part is not known."""
    if torch.compiler.is_compiling():  # a trace cannot look into closures
        return (masks.causal,) if function is masking_utils.causal_mask_function else None
    known = _known() if known is None else known
    parts: list[MaskMod] = []
    leaves = list(_conjunction(function, known))
    makers = [maker for maker, _ in leaves]
    windows = [cells["sliding_window"] for maker, cells in leaves if maker == "sliding_window_overlay"]
    if windows and "causal_mask_function" not in makers:
        return None
    if "causal_mask_function" in makers:
        parts.append(masks.sliding_window(min(windows)) if windows else masks.causal)
    for maker, cells in leaves:
        if maker == "packed_sequence_mask_function":
            parts.append(masks.document(keys.look_up(cells["packed_sequence_mask"], -1)))
        elif maker == "blockwise_overlay":
            parts.append(masks.document(keys.look_up(cells["block_sequence_ids"], -1)))
        elif maker == "chunked_overlay":
            parts.append(masks.document(_chunks(cells, keys)))
        elif maker == "or_masks":
            either = [translate(part, keys, known) for part in cells["mask_functions"]]
            if any(part is None for part in either):
                return None
            parts.append(masks.or_masks(*(masks.and_masks(*p) for p in either if p is not None)))
        elif maker not in ("causal_mask_function", "sliding_window_overlay"):
            return None
    return tuple(parts)


def window_of(function: MaskFunction) -> int | None:
    """The most tokens that a query sees, counted back from itself, by the mask's sliding window or chunk."""
    if torch.compiler.is_compiling():
        return None
    leaves = list(_conjunction(function, _known()))
    if "causal_mask_function" not in (maker for maker, _ in leaves):
        return None
    sizes = [cells[name] for _, cells in leaves for name in ("sliding_window", "chunk_size") if name in cells]
    return min(sizes, default=None)


def _chunks(cells: Mapping[str, Any], keys: Keys) -> Tensor:
    """The chunk of every key, ``[Skv]`` or ``[B, Skv]``: later releases count from the first token that is real."""
    position = keys.positions()
    if "left_padding" in cells:
        position = position - cells["left_padding"].to(keys.device)[:, None]
    return position.div(cells["chunk_size"], rounding_mode="floor")


def _conjunction(function: MaskFunction, known: frozenset[str]) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """The parts of a mask of which all must hold: the name of each part's constructor, None if not known, and the
    values that the part was made with."""
    maker, cells = _made_by(function, known)
    if maker == "and_masks":
        for part in cells["mask_functions"]:
            yield from _conjunction(part, known)
    elif maker == "remap_positions_for_packed_sequence":
        # Positions within each packed sequence instead of in the whole: the same for what looks at differences alone.
        inner = list(_conjunction(cells["mask_function"], known))
        relative = {name for name, _ in inner} <= {"causal_mask_function", "sliding_window_overlay"}
        yield from inner if relative else [(None, {})]
    else:
        yield maker, cells


def _made_by(function: MaskFunction, known: frozenset[str]) -> tuple[str | None, dict[str, Any]]:
    name = getattr(function, "__qualname__", "").partition(".<locals>.")[0]
    if getattr(function, "__module__", None) != masking_utils.__name__ or name not in known:
        return None, {}
    return name, dict(inspect.getclosurevars(function).nonlocals)


@functools.cache
def _known() -> frozenset[str]:
    """The constructors of masks in this transformers that mean what we take them for, see NOTE [Known parts]."""
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1]])
    blocks = torch.tensor([[-1, -1, 0, 0, 0, -1, 1], [0, 0, -1, 1, 1, 1, -1]])
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4, 5]])
    batch, length = ids.shape
    utils: Any = masking_utils
    causal = utils.causal_mask_function

    def chunks() -> MaskFunction:
        left_padding = (torch.zeros(batch, dtype=torch.int64),)
        takes_padding = len(inspect.signature(utils.chunked_overlay).parameters) == 2
        overlay: MaskFunction = utils.chunked_overlay(3, *(left_padding if takes_padding else ()))
        return overlay

    def packed(inner: MaskFunction) -> MaskFunction:
        remapped = utils.remap_positions_for_packed_sequence(inner, places)
        mask: MaskFunction = utils.and_masks(utils.packed_sequence_mask_function(ids), remapped)
        return mask

    # Each with those above it.
    samples: dict[str, Callable[[], MaskFunction]] = {
        "causal_mask_function": lambda: causal,
        "and_masks": lambda: utils.and_masks(causal, causal),
        "sliding_window_overlay": lambda: utils.and_masks(utils.sliding_window_overlay(3), causal),
        "packed_sequence_mask_function": lambda: utils.packed_sequence_mask_function(ids),
        "blockwise_overlay": lambda: utils.blockwise_overlay(blocks),
        "or_masks": lambda: utils.or_masks(causal, utils.blockwise_overlay(blocks)),
        "chunked_overlay": chunks,
        "remap_positions_for_packed_sequence": lambda: packed(utils.sliding_window_causal_mask_function(2)),
    }
    keys = Keys(0, length, torch.device("cpu"))
    found: frozenset[str] = frozenset()
    for name, sample in samples.items():
        try:
            theirs = sample()
        except (AttributeError, TypeError):  # this transformers has no such constructor, or makes it of something else
            continue
        ours = translate(theirs, keys, found | {name})
        if ours is not None:
            grids = [create_mask(f, batch, 1, length, length, device="cpu") for f in (masks.and_masks(*ours), theirs)]
            found |= {name} if torch.equal(*grids) else set()
    return found
