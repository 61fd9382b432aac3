"""Masks that know their blocks: ordinary ``mask_mod`` functions, each with its structure attached."""

from flexproxy.masks.mods import (
    and_masks,
    causal,
    document,
    full,
    or_masks,
    padding,
    prefix_lm,
    shift,
    sliding_window,
)

__all__ = ["and_masks", "causal", "document", "full", "or_masks", "padding", "prefix_lm", "shift", "sliding_window"]
