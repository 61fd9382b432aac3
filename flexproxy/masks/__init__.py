"""Masks that know their blocks: ordinary ``mask_mod`` functions, each with its structure attached."""

from flexproxy.masks.mods import causal, document, full, padding, prefix_lm, shift, sliding_window

__all__ = ["causal", "document", "full", "padding", "prefix_lm", "shift", "sliding_window"]
