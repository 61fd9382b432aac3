"""Attention under a selection: the only room that calls ``flex_attention``."""
