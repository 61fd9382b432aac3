"""The mask of a forward pass: from what transformers says of it to blocks that all layers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionMaskInterface, masking_utils

from flexproxy import ProxyConfig, masks
from flexproxy.integrations.transformers.parts import Keys, MaskFunction, translate, window_of
from flexproxy.masks.structure import MaskMod
from flexproxy.ops.operators import capturable
from flexproxy.pipeline import dense_block_mask

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
        is_default: whether it is causal, aligned at the end, and nothing besides: the default mask of ``attention``.
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
        self._tokens: list[Tensor | None] = []  # none yet, or one
        self.window = window_of(self._function)
        plain = self._function is masking_utils.causal_mask_function and padding is None
        self.is_causal = plain and self.num_queries == self.num_keys
        offsets = self._q_offset, self._kv_offset
        at_end = (self.num_keys - self.num_queries, 0)
        self.is_default = plain and not any(isinstance(x, Tensor) for x in offsets) and offsets == at_end

    def token_mask(self) -> Tensor | None:
        """The mask token by token, bool ``[B, 1, Sq, Skv]``, or None where ``sdpa`` needs none."""
        if not self._tokens:
            self._tokens.append(_sdpa_mask(self._arguments))
        return self._tokens[0]

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
        keys = Keys(self._kv_offset, self.num_keys, device)
        parts = translate(self._function, keys)
        if parts is None and device != self.device:
            raise ValueError(
                f"attention_mask: expected a mask made of transformers' own parts for a model on several devices, got "
                f"{getattr(self._function, '__qualname__', self._function)}, which stays on {self.device}; put the "
                'model on one device, or use attn_implementation="sdpa"'
            )
        # For each sequence, though it is the same for all: BACKEND="FLASH" reads no tensor of shape [].
        offset = (_scalar(self._q_offset, device) - _scalar(self._kv_offset, device)).repeat(self._batch)
        if self._padding is not None:
            padding = masks.padding(keys.look_up(self._padding, 0))
            if parts is None:
                return masks.and_masks(self._evaluated(device), masks.shift(padding, offset))
            parts = (*parts, padding)
        if parts is None:
            return self._evaluated(device)
        return masks.shift(masks.and_masks(*parts), offset)

    def _evaluated(self, device: torch.device) -> MaskMod:
        """transformers' own function, at absolute positions."""
        # A compiled CPU kernel asks for the padding of its last tile too, where the function's tables end.
        function, last_query, last_key = self._function, self.num_queries - 1, self.num_keys - 1
        if device.type == "cpu" and torch.compiler.is_compiling():
            # The function may hold tensors of the graph being traced, which that kernel refuses: a table by tokens.
            tokens: Any = _sdpa_mask({**self._arguments, "allow_is_causal_skip": False})  # never None so
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
