"""The mask of a forward pass: from what transformers says of it to blocks that all layers share.

transformers describes a mask by a function of absolute positions, put together from a few parts (causal, sliding
window, packed sequences, ...), and by a 2D padding mask.

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
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_mask, or_masks
from transformers import AttentionMaskInterface, masking_utils

from flexproxy import ProxyConfig, masks
from flexproxy._ops import capturable
from flexproxy.masks import MaskMod
from flexproxy.pipeline import dense_block_mask

MaskFunction: TypeAlias = Callable[..., Any]

BLOCK_SIZE = ProxyConfig().block_size  # of the mask that is passed on; layers with another block size get one of theirs


def forward_mask(**arguments: Any) -> Tensor | BlockMask | None:
    """The mask function that transformers calls, once a forward pass for each kind of layer.

    Args:
        arguments: what ``transformers.masking_utils`` says of a mask; see ``sdpa_mask`` there.

    Returns:
        A BlockMask with blocks of 128 for causal masks. For fewer than 128 new tokens (decoding), and for masks that
        are not causal, what the mask function of ``sdpa`` gives: there layers are dense.
    """
    queries, keys = _queries(arguments)[0], arguments["kv_length"]
    if not BLOCK_SIZE <= queries <= keys or "allow_is_bidirectional_skip" in arguments:
        return _sdpa_mask(arguments)
    mask = ForwardMask(arguments)
    block_mask = mask.block_mask(mask.device, BLOCK_SIZE)
    # On the function, because it stays when BlockMask.to copies the lists to another device.
    block_mask.mask_mod.forward_mask = mask  # type: ignore[attr-defined]
    return block_mask if torch.compiler.is_compiling() else _BlockMask(block_mask)


class _BlockMask(BlockMask):
    """A BlockMask that ``generate`` takes with a static cache: there it asks every mask to be contiguous."""

    def __init__(self, blocks: BlockMask) -> None:
        vars(self).update(vars(blocks))

    def contiguous(self) -> _BlockMask:
        return self


def forward_mask_of(block_mask: BlockMask) -> ForwardMask | None:
    """What ``forward_mask`` knows of a BlockMask that it made; None for a caller's own BlockMask."""
    mask = getattr(block_mask.mask_mod, "forward_mask", None)
    return mask if isinstance(mask, ForwardMask) else None


class ForwardMask:
    """The mask of one forward pass, classified once for each device and block size among its layers.

    Attributes:
        device: where transformers made it.
        window: the most tokens that a query sees, counted back from itself; None if there is no such bound.
        is_causal: whether it is causal from the first key on, and nothing besides.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.num_queries, self._q_offset = _queries(arguments)
        self.num_keys: int = arguments["kv_length"]
        self.device = _device(arguments)
        self._batch: int = arguments["batch_size"]
        self._kv_offset: int | Tensor = arguments.get("kv_offset", 0)
        self._function: MaskFunction = arguments.get("mask_function", masking_utils.causal_mask_function)
        padding: Tensor | None = arguments.get("attention_mask")
        # As sdpa does: one look at the values, which spares every layer the work of a padding that is none.
        if padding is not None and not torch.compiler.is_compiling() and bool(padding.all()):
            padding = None
        self._padding = padding
        self._arguments = {**arguments, "attention_mask": padding}
        if isinstance(self._q_offset, Tensor) and "q_offset" in arguments:
            # A static cache counts on in this tensor while the layers run.
            self._q_offset = self._arguments["q_offset"] = self._q_offset.clone()
        self._gradients = torch.is_grad_enabled()
        self._made: dict[tuple[torch.device, int], BlockMask] = {}
        self.window = window_of(self._function)
        self.is_causal = (
            self._function is masking_utils.causal_mask_function
            and padding is None
            and self.num_queries == self.num_keys
        )

    def token_mask(self) -> Tensor | None:
        """The mask token by token, bool ``[B, 1, Sq, Skv]``, or None where ``sdpa`` needs none."""
        return _sdpa_mask(self._arguments)

    def block_mask(self, device: torch.device, block_size: int) -> BlockMask:
        """The mask by blocks, made when it is first asked for.

        Raises:
            ValueError: the mask has a part that is evaluated, and is wanted on another device than its own.
        """
        made = self._made.get((device, block_size))
        if made is None:
            # dense_block_mask looks at shapes and device alone.
            q, k = (torch.empty(self._batch, 1, n, 0, device=device) for n in (self.num_queries, self.num_keys))
            made = dense_block_mask(q, k, self._mask_mod(device), block_size, self._gradients)
            if (device, block_size) != (self.device, BLOCK_SIZE):  # that one knows this object: they would form a cycle
                self._made[device, block_size] = made
        return made

    def _mask_mod(self, device: torch.device) -> MaskMod:
        keys = _Keys(self._kv_offset, self.num_keys, device)
        parts = translate(self._function, keys)
        if parts is None and device != self.device:
            raise ValueError(
                f"attention_mask: expected a mask made of transformers' own parts for a model on several devices, got "
                f"{getattr(self._function, '__qualname__', self._function)}, which stays on {self.device}; put the "
                'model on one device, or use attn_implementation="sdpa"'
            )
        offset = _scalar(self._q_offset, device) - _scalar(self._kv_offset, device)
        if self._padding is not None:
            padding = masks.padding(keys.look_up(self._padding, 0))
            if parts is None:
                return and_masks(self._evaluated(device), masks.shift(padding, offset))
            parts = (*parts, padding)
        if parts is None:
            return self._evaluated(device)
        return masks.shift(parts[0] if len(parts) == 1 else and_masks(*parts), offset)

    def _evaluated(self, device: torch.device) -> MaskMod:
        """transformers' own function, at absolute positions."""
        # A compiled CPU kernel asks for the padding of its last tile too, where the function's tables end.
        function, last_query, last_key = self._function, self.num_queries - 1, self.num_keys - 1
        if device.type == "cpu" and torch.compiler.is_compiling():
            # The function may hold tensors of the graph being traced, which that kernel refuses: a table by tokens.
            tokens = _sdpa_mask({**self._arguments, "allow_is_causal_skip": False})
            assert tokens is not None
            table = capturable(tokens)

            def tabulated_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
                return table[b, 0, q_idx.clamp(max=last_query), kv_idx.clamp(max=last_key)]

            return tabulated_mask
        q_offset, kv_offset = _scalar(self._q_offset, device), _scalar(self._kv_offset, device)

        def evaluated_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            allowed: Tensor = function(
                b, h, q_idx.clamp(max=last_query) + q_offset, kv_idx.clamp(max=last_key) + kv_offset
            )
            return allowed

        return evaluated_mask


def translate(function: MaskFunction, keys: _Keys, known: frozenset[str] | None = None) -> tuple[MaskMod, ...] | None:
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
            parts.append(or_masks(*(p[0] if len(p) == 1 else and_masks(*p) for p in either if p is not None)))
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


class _Keys(NamedTuple):
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


def _chunks(cells: Mapping[str, Any], keys: _Keys) -> Tensor:
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
    keys = _Keys(0, length, torch.device("cpu"))
    found: frozenset[str] = frozenset()
    for name, sample in samples.items():
        try:
            theirs = sample()
        except (AttributeError, TypeError):  # this transformers has no such constructor, or makes it of something else
            continue
        ours = translate(theirs, keys, found | {name})
        if ours is not None:
            grids = [create_mask(f, batch, 1, length, length, device="cpu") for f in (and_masks(*ours), theirs)]
            found |= {name} if torch.equal(*grids) else set()
    return found


def _queries(arguments: Mapping[str, Any]) -> tuple[int, int | Tensor]:
    """How many queries there are, and the position of the first; some releases say it by ``cache_position``."""
    cache_position: Tensor | None = arguments.get("cache_position")
    if cache_position is not None:
        return cache_position.shape[0], cache_position[0]
    return arguments["q_length"], arguments.get("q_offset", 0)


def _device(arguments: Mapping[str, Any]) -> torch.device:
    cache_position: Tensor | None = arguments.get("cache_position")
    return cache_position.device if cache_position is not None else torch.device(arguments["device"])


def _scalar(number: int | Tensor, device: torch.device) -> Tensor:
    """A tensor ``[]``, so that another value compiles no new kernel."""
    if isinstance(number, Tensor):
        return capturable(number.to(device, torch.int32).reshape(()))
    return capturable(torch.full((), number, dtype=torch.int32, device=device))


def _sdpa_mask(arguments: Mapping[str, Any]) -> Tensor | None:
    mask: Tensor | None = AttentionMaskInterface()["sdpa"](**arguments)
    return mask
