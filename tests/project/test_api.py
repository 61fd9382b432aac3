"""The public names, their parameters and defaults."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys

import pytest

import flexproxy
from flexproxy import ProxyConfig, Selection

NAMES = {
    "": "ProxyConfig Selection and_block_masks attention build calibrate kernel_options masks plot record reference "
    "select stats why_dense",
    ".masks": "and_masks causal document full or_masks padding prefix_lm shift sliding_window",
    ".stats": "block_mass density recovered_mass",
    ".plot": "block_map calibration density ranking record save",
}
PARAMETERS = {
    "build": "q, k, *, mask_mod=None, block_mask=None, config=None, scale=None",
    "select": "q, k, *, mask_mod=None, block_mask=None, config=None, scale=None",
    "attention": "q, k, v, *, mask_mod=None, block_mask=None, config=None, scale=None, score_mod=None, "
    "kernel_options=None, return_lse=False, when='auto'",
    "why_dense": "q, k, config=None",
    "ProxyConfig.paper": "**changes",
    "kernel_options": "q, k",
    "and_block_masks": "a, b",
    "calibrate": "model, texts, *, density=None, quality=None, config=None, length=None, sequences=4, "
    "positions=512, progress=None",
    "masks.causal": "b, h, q_idx, kv_idx",
    "masks.full": "b, h, q_idx, kv_idx",
    "masks.sliding_window": "window",
    "masks.document": "document_ids",
    "masks.padding": "attention_mask",
    "masks.prefix_lm": "prefix_lengths",
    "masks.shift": "mask_mod, q_offset",
    "record": "model, *, mass=False, selections=False",
    "Selection.block_map": "self",
    "Selection.density": "self",
    "Selection.mask_mod": "self",
    "Selection.block_mask": "self",
    "Selection.summary": "self",
    "Selection.attention": "self, q, k, v, *, score_mod=None, kernel_options=None, return_lse=False",
}
FIELDS = {
    "num_proxies": None,
    "groups": None,
    "gamma": 0.95,
    "density": None,
    "stride": 4,
    "sharing": "heads",
    "query_stride": None,
    "query_choice": "first",
    "block_size": 128,
    "min_budget": 2048,
    "max_budget": None,
    "sink_blocks": 1,
    "local_blocks": 2,
    "dense_last_blocks": 1,
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names(module: str) -> None:
    """They are there, and described."""
    found = importlib.import_module(f"flexproxy{module}")
    assert sorted(found.__all__) == NAMES[module].split()
    for name in found.__all__:
        assert getattr(found, name).__doc__, name


def test_all_names_are_listed_and_reached() -> None:
    """In a fresh interpreter: ``dir`` has what is imported later too, and each name can be asked for."""
    program = """
import flexproxy
listed = dir(flexproxy)
assert listed == sorted(set(listed)), "twice, or in no order"
for name in flexproxy.__all__:
    assert name in listed, name
    assert getattr(flexproxy, name) is not None
assert flexproxy.stats.recovered_mass and flexproxy.plot.record and flexproxy.reference.attention
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    """Names, order, kinds and defaults."""
    function: object = flexproxy
    for part in name.split("."):
        function = getattr(function, part)
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    shown = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
    assert str(shown) == f"({PARAMETERS[name]})"


def test_fields() -> None:
    assert {field.name: field.default for field in dataclasses.fields(ProxyConfig)} == FIELDS
    public = " ".join(field.name for field in dataclasses.fields(Selection) if not field.name.startswith("_"))
    fields = "rank head_rank count proxy_of admissible full forced allowed block_size lengths gradients scale"
    assert public == fields
