"""Bad input: every message names the argument, what was expected, what came, and the remedy. And NaN is no error."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, flex_attention

import flexproxy
from flexproxy import ProxyConfig, masks
from flexproxy.masks.structure import MaskMod
from flexproxy.ops.compat import seq_lengths_of
from flexproxy.sparse import kernel as sparse_kernel
from tests.settings import outliers

# What is passed wrongly on purpose must get past the type checker.
api: Any = flexproxy
mask: Any = masks
config: Any = ProxyConfig

B, HQ, HKV, S, D = 2, 4, 2, 256, 32


@dataclass(frozen=True)
class Inputs:
    """Good arguments, for one of them to be replaced."""

    device: str
    q: Any
    k: Any
    v: Any

    def block_mask(
        self, batch: int | None = None, heads: int | None = None, num_queries: int = S, num_keys: int = S
    ) -> Any:
        return create_block_mask(masks.causal, batch, heads, num_queries, num_keys, device=self.device)

    def table(self, *shape: int, dtype: torch.dtype = torch.int64) -> Any:
        return torch.ones(shape, dtype=dtype, device=self.device)

    def rows(self, number: int) -> Any:
        """The first rows of blocks of a BlockMask, cut off as torch documents it."""
        whole = self.block_mask()
        part = whole[:, :, :number]
        part.mask_mod = whole.mask_mod
        return part

    def lists(self, block_size: tuple[int, int], *shape: int) -> Any:
        """A BlockMask made from lists ``[*shape]``, all blocks full."""
        number = torch.full(shape[:-1], shape[-1], dtype=torch.int32, device=self.device)
        index = torch.arange(shape[-1], dtype=torch.int32, device=self.device).expand(shape).contiguous()
        return BlockMask.from_kv_blocks(number, index, number, index, BLOCK_SIZE=block_size, mask_mod=masks.full)


def inputs(device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, h, S, D, generator=generator).to(device) for h in (HQ, HKV, HKV))
    return Inputs(device, q, k, v)


def ragged(device: str) -> Tensor:
    """A nested tensor of two sequences."""
    return torch.nested.nested_tensor([torch.ones(HQ, S, D, device=device), torch.ones(HQ, S - 9, D, device=device)])


class NotAMask:
    """Not callable."""


@dataclass(frozen=True)
class Bad:
    """A wrong call, and its error; ``...`` in the message stands for at least one character."""

    call: Callable[[Inputs], Any]
    error: type[Exception]
    message: str


Q, K, V = "[B, Hq, Sq, D]", "[B, Hkv, Skv, D]", "[B, Hkv, Skv, D]"

TENSORS = {
    "q is a list": Bad(lambda x: api.build([[1.0]], x.k), TypeError, f"q: expected a tensor {Q}, got list; ..."),
    "k is None": Bad(lambda x: api.build(x.q, None), TypeError, f"k: expected a tensor {K}, got NoneType; ..."),
    "q without batch": Bad(
        lambda x: api.build(x.q[0], x.k),
        ValueError,
        f"q: expected a tensor {Q}, got shape [4, 256, 32]; add the missing dimensions, ...unsqueeze(0)...",
    ),
    "k of five dimensions": Bad(
        lambda x: api.build(x.q, x.k[None]),
        ValueError,
        f"k: expected a tensor {K}, got shape [1, 2, 2, 256, 32]; ...",
    ),
    "no queries": Bad(
        lambda x: api.build(x.q[:, :, :0], x.k),
        ValueError,
        f"q: expected a tensor {Q} with no empty dimension, got shape [2, 4, 0, 32]; ...",
    ),
    "empty batch": Bad(
        lambda x: api.build(x.q[:0], x.k[:0]),
        ValueError,
        f"q: expected a tensor {Q} with no empty dimension, got shape [0, 4, 256, 32]; ...",
    ),
    "no heads": Bad(
        lambda x: api.build(x.q, x.k[:, :0]),
        ValueError,
        f"k: expected a tensor {K} with no empty dimension, got shape [2, 0, 256, 32]; ...",
    ),
    "nested q": Bad(
        lambda x: api.build(ragged(x.device), x.k),
        TypeError,
        f"q: expected a dense tensor {Q}, got a nested tensor; pad it and pass mask_mod=masks.padding(...), or pack...",
    ),
    "sparse q": Bad(
        lambda x: api.build(x.q.to_sparse(), x.k),
        TypeError,
        f"q: expected a dense tensor {Q}, got layout torch.sparse_coo; ...",
    ),
    "sparse k": Bad(
        lambda x: api.build(x.q, x.k.to_sparse()),
        TypeError,
        f"k: expected a dense tensor {K}, got layout torch.sparse_coo; ...",
    ),
    "k on another device": Bad(
        lambda x: api.build(x.q, x.k.to("meta")), ValueError, "k: expected the device ... of q, got meta; move one..."
    ),
    "dtypes mixed": Bad(
        lambda x: api.build(x.q, x.k.to(torch.bfloat16)),
        TypeError,
        "k: expected the dtype torch.float32 of q, got torch.bfloat16; convert one of them",
    ),
    "float64": Bad(
        lambda x: api.build(x.q.double(), x.k.double()),
        TypeError,
        "q: expected dtype float32, float16 or bfloat16, got torch.float64; convert it with .to(...)",
    ),
    "integers": Bad(
        lambda x: api.build(x.q.int(), x.k.int()),
        TypeError,
        "q: expected dtype float32, float16 or bfloat16, got torch.int32; convert it with .to(...)",
    ),
    "batch sizes": Bad(
        lambda x: api.build(x.q, x.k[:1]),
        ValueError,
        "k: expected the batch size 2 of q, got 1 in [1, 2, 256, 32]; ...",
    ),
    "heads that do not divide": Bad(
        lambda x: api.build(x.q[:, :3], x.k),
        ValueError,
        "q: expected a number of heads Hq that is a multiple of Hkv = 2, got 3; are q and k laid out as [B, H, S, D]?",
    ),
    "more key heads than query heads": Bad(
        lambda x: api.build(x.q[:, :1], x.k),
        ValueError,
        "q: expected a number of heads Hq that is a multiple of Hkv = 2, got 1; are q and k laid out as [B, H, S, D]?",
    ),
    "more queries than keys": Bad(
        lambda x: api.build(x.q, x.k[:, :, :200]),
        ValueError,
        "q: expected at most as many queries as keys, got Sq = 256 and Skv = 200; pass the keys of all tokens, ...",
    ),
    "small head dimension": Bad(
        lambda x: api.build(x.q[..., :15], x.k[..., :15]),
        ValueError,
        "q: expected a head dimension D from 16 to 256, got 15 in shape [2, 4, 256, 15]; is q laid out as ...",
    ),
    "large head dimension": Bad(
        lambda x: api.build(torch.zeros(1, 1, 9, 257), torch.zeros(1, 1, 9, 257)),
        ValueError,
        "q: expected a head dimension D from 16 to 256, got 257 in shape [1, 1, 9, 257]; is q laid out as ...",
    ),
    "head dimensions differ": Bad(
        lambda x: api.build(x.q, x.k[..., :16]), ValueError, "k: expected the head dimension D = 32 of q, got 16; ..."
    ),
    "select checks too": Bad(
        lambda x: api.select(x.q[0], x.k), ValueError, f"q: expected a tensor {Q}, got shape [4, 256, 32]; ..."
    ),
    "kernel_options checks too": Bad(
        lambda x: api.kernel_options(x.q, x.k[0]), ValueError, f"k: expected a tensor {K}, got shape [2, 256, 32]; ..."
    ),
    "v of other heads": Bad(
        lambda x: api.attention(x.q, x.k, x.v[:, :1]),
        ValueError,
        "v: expected Hkv, Skv = [2, 256] as in k, got [1, 256]; pass the values of the same heads and tokens",
    ),
    "v of other length": Bad(
        lambda x: api.attention(x.q, x.k, x.v[:, :, :99]),
        ValueError,
        "v: expected Hkv, Skv = [2, 256] as in k, got [2, 99]; pass the values of the same heads and tokens",
    ),
    "v of other batch size": Bad(
        lambda x: api.attention(x.q, x.k, x.v[:1]), ValueError, "v: expected the batch size 2 of q, got 1 ...; ..."
    ),
    "v of other dtype": Bad(
        lambda x: api.attention(x.q, x.k, x.v.half()),
        TypeError,
        "v: expected the dtype torch.float32 of q, got torch.float16; convert one of them",
    ),
    "v on another device": Bad(
        lambda x: api.attention(x.q, x.k, x.v.to("meta")), ValueError, "v: expected the device ..., got meta; move..."
    ),
    "v is a tuple": Bad(
        lambda x: api.attention(x.q, x.k, (x.v,)), TypeError, f"v: expected a tensor {V}, got tuple; ..."
    ),
}

FIELDS = {
    "config is a dict": Bad(
        lambda x: api.build(x.q, x.k, config={"gamma": 0.9}),
        TypeError,
        "config: expected a flexproxy.ProxyConfig or None, got dict; use for example ProxyConfig(gamma=0.9)",
    ),
    "config is the class": Bad(
        lambda x: api.build(x.q, x.k, config=ProxyConfig),
        TypeError,
        "config: expected a flexproxy.ProxyConfig or None, got type; use for example ProxyConfig(gamma=0.9)",
    ),
    "stride does not divide": Bad(
        lambda _: config(stride=3),
        ValueError,
        "stride: expected a divisor of block_size 128, got 3; use 1, 2, 4, 8 or 16",
    ),
    "stride above the block": Bad(
        lambda _: config(stride=128, block_size=64),
        ValueError,
        "stride: expected a divisor of block_size 64, got 128; use 1, 2, 4, 8 or 16",
    ),
    "query_stride does not divide": Bad(
        lambda _: config(query_stride=3),
        ValueError,
        "query_stride: expected a divisor of block_size 128, got 3; use 1, 2, 4, 8 or 16",
    ),
    "query_choice unknown": Bad(
        lambda _: config(query_choice="last"),
        ValueError,
        "query_choice: expected one of ['first', 'outlier'], got 'last'; 'first' is the paper's",
    ),
    "query_choice a list": Bad(
        lambda _: config(query_choice=["first"]),
        ValueError,
        "query_choice: expected one of ['first', 'outlier'], got ['first']; 'first' is the paper's",
    ),
    "sharing unknown": Bad(
        lambda _: config(sharing="row"),
        ValueError,
        "sharing: expected one of ['heads', 'rows'], got 'row'; 'heads' is the paper's",
    ),
    "sharing a bool": Bad(
        lambda _: config(sharing=True),
        ValueError,
        "sharing: expected one of ['heads', 'rows'], got True; 'heads' is the paper's",
    ),
    "outliers of too many": Bad(
        lambda _: config(query_choice="outlier", query_stride=256, block_size=256),
        ValueError,
        "query_stride: expected at most 128 where query_choice is 'outlier', got 256; use 8 or 16",
    ),
    "stride 0": Bad(lambda _: config(stride=0), ValueError, "stride: expected an integer of at least 1, got 0; ..."),
    "stride float": Bad(
        lambda _: config(stride=4.0),
        TypeError,
        "stride: expected an integer of at least 1, got 4.0 of type float; pass a Python int",
    ),
    "gamma 0": Bad(
        lambda _: config(gamma=0), ValueError, "gamma: expected a number in (0, 1], got 0; 1.0 keeps every block"
    ),
    "gamma NaN": Bad(
        lambda _: config(gamma=float("nan")), ValueError, "gamma: expected a number in (0, 1], got nan; 1.0 keeps..."
    ),
    "gamma in percent": Bad(
        lambda _: config(gamma=95), ValueError, "gamma: expected a number in (0, 1], got 95; 1.0 keeps every block"
    ),
    "gamma negative": Bad(
        lambda _: config(gamma=-0.1), ValueError, "gamma: expected a number in (0, 1], got -0.1; 1.0 keeps every block"
    ),
    "gamma inf": Bad(
        lambda _: config(gamma=float("inf")), ValueError, "gamma: expected a number in (0, 1], got inf; 1.0 keeps..."
    ),
    "gamma string": Bad(
        lambda _: config(gamma="0.9"),
        TypeError,
        "gamma: expected a number in (0, 1], got '0.9' of type str; pass a Python float",
    ),
    "gamma bool": Bad(
        lambda _: config(gamma=True),
        TypeError,
        "gamma: expected a number in (0, 1], got True of type bool; pass a Python float",
    ),
    "gamma tensor": Bad(
        lambda _: config(gamma=torch.tensor(0.5)),
        TypeError,
        "gamma: expected a number in (0, 1], got tensor(0.5000) of type Tensor; pass a Python float",
    ),
    "gamma None": Bad(
        lambda _: config(gamma=None),
        TypeError,
        "gamma: expected a number in (0, 1], got None of type NoneType; pass a Python float",
    ),
    "density 0": Bad(
        lambda _: config(density=0.0), ValueError, "density: expected a number in (0, 1], got 0.0; 1.0 keeps..."
    ),
    "density above 1": Bad(
        lambda _: config(density=1.5), ValueError, "density: expected a number in (0, 1], got 1.5; 1.0 keeps..."
    ),
    "density string": Bad(
        lambda _: config(density="half"), TypeError, "density: expected a number in (0, 1], got 'half' of type str; ..."
    ),
    "block_size odd": Bad(
        lambda _: config(block_size=96), ValueError, "block_size: expected a power of two, got 96; use 64 or 128"
    ),
    "block_size small": Bad(
        lambda _: config(block_size=8), ValueError, "block_size: expected an integer from 16 to 1024, got 8; ..."
    ),
    "block_size large": Bad(
        lambda _: config(block_size=2048), ValueError, "block_size: expected an integer from 16 to 1024, got 2048; ..."
    ),
    "block_size pair": Bad(
        lambda _: config(block_size=(128, 64)),
        TypeError,
        "block_size: expected an integer from 16 to 1024, got (128, 64) of type tuple; pass a Python int",
    ),
    "min_budget negative": Bad(
        lambda _: config(min_budget=-1), ValueError, "min_budget: expected an integer of at least 0, got -1; ..."
    ),
    "min_budget float": Bad(
        lambda _: config(min_budget=2e3),
        TypeError,
        "min_budget: expected an integer of at least 0, got 2000.0 of ...; ...",
    ),
    "min_budget None": Bad(
        lambda _: config(min_budget=None),
        TypeError,
        "min_budget: expected an integer of at least 0, got None of ...; ...",
    ),
    "max_budget 0": Bad(
        lambda _: config(max_budget=0), ValueError, "max_budget: expected an integer of at least 1, got 0; ..."
    ),
    "max_budget below min_budget": Bad(
        lambda _: config(max_budget=1024),
        ValueError,
        "max_budget: expected at least min_budget in whole blocks, 2048 tokens, got 1024; raise max_budget or ...",
    ),
    "max_budget below the forced blocks": Bad(
        lambda _: config(min_budget=0, max_budget=511, sink_blocks=1, local_blocks=2),
        ValueError,
        "max_budget: expected at least 512 tokens, (sink_blocks + local_blocks + 1) forced blocks x block_size, got "
        "511; raise max_budget or force fewer blocks",
    ),
    # 300 tokens are more than 2 blocks of 128 and fewer than 3: no number of blocks is within both bounds.
    "budgets that no number of blocks meets": Bad(
        lambda _: config(min_budget=300, max_budget=300), ValueError, "max_budget: expected ..., got 300; ..."
    ),
    "sink_blocks negative": Bad(
        lambda _: config(sink_blocks=-1), ValueError, "sink_blocks: expected an integer of at least 0, got -1; ..."
    ),
    "sink_blocks bool": Bad(
        lambda _: config(sink_blocks=True),
        TypeError,
        "sink_blocks: expected an integer of at least 0, got True ...; ...",
    ),
    "local_blocks 0": Bad(
        lambda _: config(local_blocks=0), ValueError, "local_blocks: expected an integer of at least 1, got 0; ..."
    ),
    "num_proxies 0": Bad(
        lambda _: config(num_proxies=0), ValueError, "num_proxies: expected an integer of at least 1, got 0; ..."
    ),
    "num_proxies string": Bad(
        lambda _: config(num_proxies="1"),
        TypeError,
        "num_proxies: expected an integer of at least 1, got '1' of type str; pass a Python int",
    ),
    "num_proxies does not fit": Bad(
        lambda x: api.build(x.q, x.k, config=config(num_proxies=3)),
        ValueError,
        "num_proxies: expected a divisor of the 2 KV heads, or a multiple of it that divides the 4 query heads, got 3; "
        "use one of [1, 2, 4], or set groups",
    ),
    "num_proxies above the heads": Bad(
        lambda x: api.build(x.q, x.k, config=config(num_proxies=8)),
        ValueError,
        "num_proxies: expected a divisor of the 2 KV heads, ..., got 8; use one of [1, 2, 4], or set groups",
    ),
    "groups with a gap": Bad(
        lambda _: config(groups=[0, 0, 2, 2]),
        ValueError,
        "groups: expected every proxy index from 0 to P - 1 to be used, got [0, 0, 2, 2], which leaves out [1]; number "
        "the proxies without gaps",
    ),
    "groups empty": Bad(
        lambda _: config(groups=[]), ValueError, "groups: expected every proxy index ..., got [], which ...; number..."
    ),
    "groups string": Bad(
        lambda _: config(groups="0011"),
        TypeError,
        "groups: expected the proxy index of every query head, for example [0, 0, 1, 1], got '0011' of type str; pass "
        "a list or tuple of ints",
    ),
    "groups tensor": Bad(
        lambda _: config(groups=torch.tensor([0, 1])),
        TypeError,
        "groups: expected the proxy index of every query head, ..., got ... of type Tensor; pass a list or ...",
    ),
    "groups of floats": Bad(
        lambda _: config(groups=[0, 1.0]),
        TypeError,
        "groups: expected an integer of at least 0, got 1.0 of type float; ...",
    ),
    "groups negative": Bad(
        lambda _: config(groups=[0, -1]), ValueError, "groups: expected an integer of at least 0, got -1; ..."
    ),
    "groups of another length": Bad(
        lambda x: api.build(x.q, x.k, config=config(groups=[0, 1, 0])),
        ValueError,
        "groups: expected the proxy index of each of the 4 query heads, got 3 of them; name one for each, or "
        "use num_proxies",
    ),
    "scale NaN": Bad(
        lambda x: api.build(x.q, x.k, scale=float("nan")),
        ValueError,
        "scale: expected a finite number, got nan; None is 1 / sqrt(D)",
    ),
    "scale inf": Bad(
        lambda x: api.build(x.q, x.k, scale=float("-inf")), ValueError, "scale: expected a finite number, got -inf; ..."
    ),
    "scale string": Bad(
        lambda x: api.build(x.q, x.k, scale="1"),
        TypeError,
        "scale: expected a number or None, got str; pass a Python float",
    ),
    "scale tensor": Bad(
        lambda x: api.build(x.q, x.k, scale=torch.tensor(1.0)),
        TypeError,
        "scale: expected a number or None, got Tensor; pass a Python float",
    ),
    "scale bool": Bad(
        lambda x: api.attention(x.q, x.k, x.v, scale=True),
        TypeError,
        "scale: expected a number or None, got bool; pass a Python float",
    ),
}

MASKS = {
    "mask_mod is a tensor": Bad(
        lambda x: api.build(x.q, x.k, mask_mod=x.table(S, S)),
        TypeError,
        "mask_mod: expected a function of (b, h, q_idx, kv_idx), got Tensor; masks are in flexproxy.masks, ...",
    ),
    "mask_mod is a BlockMask": Bad(
        lambda x: api.build(x.q, x.k, mask_mod=x.block_mask()),
        TypeError,
        "mask_mod: expected a function, got a BlockMask; pass it as block_mask=",
    ),
    "mask_mod without its parameters": Bad(
        lambda x: api.build(x.q, x.k, mask_mod=mask.padding),
        TypeError,
        "mask_mod: expected a function of (b, h, q_idx, kv_idx), got padding(attention_mask...; masks with parameters "
        "are made by a call, for example masks.sliding_window(1024)",
    ),
    "mask_mod of three arguments": Bad(
        lambda x: api.build(x.q, x.k, mask_mod=lambda h, q, kv: q >= kv),
        TypeError,
        "mask_mod: expected a function of (b, h, q_idx, kv_idx), got <lambda>(h, q, kv); masks with parameters are ...",
    ),
    # A function in C has no signature to look at.
    "mask_mod is a builtin": Bad(
        lambda x: api.build(x.q, x.k, mask_mod=torch.ge),
        TypeError,
        "mask_mod: expected a function of (b, h, q_idx, kv_idx), got ...; ...",
    ),
    "mask_mod gives floats": Bad(
        lambda x: api.build(x.q, x.k, mask_mod=lambda b, h, q, kv: (q >= kv).float()),
        TypeError,
        "mask_mod: expected ...bool..., got ...float...; ...",
    ),
    "both masks": Bad(
        lambda x: api.build(x.q, x.k, mask_mod=mask.causal, block_mask=x.block_mask()),
        ValueError,
        "mask_mod: expected None beside a block_mask, whose own mask_mod is the mask, got both; combine them with "
        "and_masks before create_block_mask, or with flexproxy.and_block_masks",
    ),
    "block_mask is a function": Bad(
        lambda x: api.build(x.q, x.k, block_mask=mask.causal),
        TypeError,
        "block_mask: expected a BlockMask, got function; pass a function as mask_mod=",
    ),
    "block_mask of another length": Bad(
        lambda x: api.build(x.q, x.k, block_mask=x.block_mask(num_queries=2 * S, num_keys=2 * S)),
        ValueError,
        "block_mask: expected a mask for Sq, Skv = (256, 256), got one for (512, 512); make it for these lengths",
    ),
    "block_mask without the cache": Bad(
        lambda x: api.build(x.q[:, :, :128], x.k, block_mask=x.block_mask(num_queries=128, num_keys=128)),
        ValueError,
        "block_mask: expected a mask for Sq, Skv = (128, 256), got one for (128, 128); make it for these lengths",
    ),
    "block_mask of another block size": Bad(
        lambda x: api.build(x.q, x.k, block_mask=x.block_mask(), config=config(block_size=64)),
        ValueError,
        "block_mask: expected blocks of 64 x 64 as in config, got 128 x 128; make it with BLOCK_SIZE=64, or set "
        "ProxyConfig(block_size=...)",
    ),
    "block_mask of oblong blocks": Bad(
        lambda x: api.build(x.q, x.k, block_mask=x.lists((128, 64), 1, 1, 2, 4)),
        ValueError,
        "block_mask: expected blocks of 128 x 128 as in config, got 128 x 64; make it with BLOCK_SIZE=128, or ...",
    ),
    "block_mask of Hkv heads": Bad(
        lambda x: api.build(x.q, x.k, block_mask=x.block_mask(heads=HKV)),
        ValueError,
        "block_mask: expected a head dimension of 1 or 4, got 2; the kernels read any other wrongly",
    ),
    "block_mask of another batch size": Bad(
        lambda x: api.build(x.q, x.k, block_mask=x.block_mask(batch=3)),
        ValueError,
        "block_mask: expected a batch dimension of 1 or 2, got 3; the kernels read any other wrongly",
    ),
    "block_mask of three dimensions": Bad(
        lambda x: api.build(x.q, x.k, block_mask=x.lists((128, 128), 1, 2, 2)),
        ValueError,
        "block_mask: expected lists [B, H, Nq, Nk] with a row for every query block, got [1, 2, 2]; slice only ...",
    ),
    # As for decoding: torch keeps the lengths of the whole, and one row would be taken for every row.
    "block_mask of one row of blocks": Bad(
        lambda x: api.build(x.q, x.k, block_mask=x.rows(1)), ValueError, "block_mask: expected ..., got ...; ..."
    ),
    "block_mask on another device": Bad(
        lambda x: api.build(x.q, x.k, block_mask=x.block_mask().to("meta")),
        ValueError,
        "block_mask: expected a mask on ..., as q, got meta; move it with .to(device)",
    ),
    "attention checks masks too": Bad(
        lambda x: api.attention(x.q, x.k, x.v, block_mask=mask.causal),
        TypeError,
        "block_mask: expected a BlockMask, got function; pass a function as mask_mod=",
    ),
    "window 0": Bad(
        lambda _: mask.sliding_window(0),
        ValueError,
        "window: expected at least 1 token, got 0; for no window use masks.causal",
    ),
    "window float": Bad(
        lambda _: mask.sliding_window(1e3),
        TypeError,
        "window: expected an int or an integer tensor, got 1000.0 of type float; ...",
    ),
    "window bool": Bad(
        lambda _: mask.sliding_window(True),
        TypeError,
        "window: expected an int or an integer tensor, got True of type bool; ...",
    ),
    "window float tensor": Bad(
        lambda x: mask.sliding_window(x.table(dtype=torch.float32)),
        TypeError,
        "window: expected an int or an integer tensor of shape [], got torch.float32 of shape []; use ...",
    ),
    "window of every sequence": Bad(
        lambda x: mask.sliding_window(x.table(B)),
        TypeError,
        "window: expected an int or an integer tensor of shape [], got torch.int64 of shape [2]; use ...",
    ),
    "document_ids float": Bad(
        lambda x: mask.document(x.table(S, dtype=torch.float32)),
        TypeError,
        "document_ids: expected a tensor of integer dtype, got torch.float32; convert it with .to(torch.int32)",
    ),
    "document_ids bool": Bad(
        lambda x: mask.document(x.table(S, dtype=torch.bool)),
        TypeError,
        "document_ids: expected a tensor of integer dtype, got torch.bool; convert it with .to(torch.int32)",
    ),
    "document_ids list": Bad(
        lambda _: mask.document([0, 0, 1]),
        TypeError,
        "document_ids: expected a tensor [S] or [B, S], got list; use torch.as_tensor",
    ),
    "document_ids of three dimensions": Bad(
        lambda x: mask.document(x.table(B, 1, S)),
        ValueError,
        "document_ids: expected shape [S] or [B, S], got [2, 1, 256]; ...",
    ),
    "document_ids shorter than the keys": Bad(
        lambda x: api.build(x.q, x.k, mask_mod=mask.document(x.table(B, S - 1))),
        ValueError,
        "document_ids: expected a value for each of the 256 keys, got 255; give the mask of all keys, cached ones ...",
    ),
    "document_ids of another batch size": Bad(
        lambda x: api.build(x.q, x.k, mask_mod=mask.document(x.table(B + 1, S))),
        ValueError,
        "document_ids: expected a batch of 2, as q, got a batch of 3; give each ...",
    ),
    "attention_mask float": Bad(
        lambda x: mask.padding(x.table(B, S, dtype=torch.float16)),
        TypeError,
        "attention_mask: expected a tensor of bool or integer dtype, got torch.float16; convert it with ...",
    ),
    "attention_mask of one dimension": Bad(
        lambda x: mask.padding(x.table(S)), ValueError, "attention_mask: expected shape [B, S], got [256]; ..."
    ),
    "attention_mask of four dimensions": Bad(
        lambda x: mask.padding(x.table(B, 1, S, S)),
        ValueError,
        "attention_mask: expected shape [B, S], got [2, 1, 256, 256]; ...",
    ),
    "attention_mask without the cache": Bad(
        lambda x: api.build(x.q[:, :, :64], x.k, mask_mod=mask.shift(mask.padding(x.table(B, 64)), S - 64)),
        ValueError,
        "attention_mask: expected a value for each of the 256 keys, got 64; give the mask of all keys, cached ones ...",
    ),
    "attention_mask of one sequence": Bad(
        lambda x: api.build(x.q, x.k, mask_mod=mask.padding(x.table(1, S))),
        ValueError,
        "attention_mask: expected a batch of 2, as q, got a batch of 1; give each ...",
    ),
    "attention_mask on another device": Bad(
        lambda x: api.build(x.q, x.k, mask_mod=mask.padding(x.table(B, S).to("meta"))),
        ValueError,
        "attention_mask: expected a tensor on ..., as q, got one on meta; move it ...",
    ),
    "prefix_lengths float": Bad(
        lambda x: mask.prefix_lm(x.table(B, dtype=torch.float32)),
        TypeError,
        "prefix_lengths: expected a tensor of integer dtype, got torch.float32; convert it with ...",
    ),
    "prefix_lengths of two dimensions": Bad(
        lambda x: mask.prefix_lm(x.table(B, 1)), ValueError, "prefix_lengths: expected shape [B], got [2, 1]; ..."
    ),
    "prefix_lengths int": Bad(
        lambda _: mask.prefix_lm(5), TypeError, "prefix_lengths: expected a tensor [B], got int; use torch.as_tensor"
    ),
    "prefix_lengths of another batch size": Bad(
        lambda x: api.build(x.q, x.k, mask_mod=mask.prefix_lm(x.table(B + 1))),
        ValueError,
        "prefix_lengths: expected a batch of 2, as q, got a batch of 3; give each ...",
    ),
    "shift of no function": Bad(
        lambda _: mask.shift(NotAMask(), 3),
        TypeError,
        "mask_mod: expected a function of (b, h, q_idx, kv_idx), got NotAMask; ...",
    ),
    "shift by a float": Bad(
        lambda _: mask.shift(mask.causal, 3.0),
        TypeError,
        "q_offset: expected an int or an integer tensor, got 3.0 of type float; ...",
    ),
    "shift by a float tensor": Bad(
        lambda x: mask.shift(mask.causal, x.table(B, dtype=torch.float32)),
        TypeError,
        "q_offset: expected a tensor of integer dtype, got torch.float32; convert it with ...",
    ),
    "shift by a matrix": Bad(
        lambda x: mask.shift(mask.causal, x.table(B, 1)),
        ValueError,
        "q_offset: expected shape [] or [B], got [2, 1]; ...",
    ),
    "shift of another batch size": Bad(
        lambda x: api.build(x.q, x.k, mask_mod=mask.shift(mask.causal, x.table(B + 1))),
        ValueError,
        "q_offset: expected a batch of 2, as q, got a batch of 3; give each ...",
    ),
    "and_block_masks of a function": Bad(
        lambda x: api.and_block_masks(mask.causal, x.block_mask()),
        TypeError,
        "a: expected a BlockMask, got function; make one with create_block_mask",
    ),
    "and_block_masks with None": Bad(
        lambda x: api.and_block_masks(x.block_mask(), None),
        TypeError,
        "b: expected a BlockMask, got NoneType; make one with create_block_mask",
    ),
    "and_block_masks of two block sizes": Bad(
        lambda x: api.and_block_masks(x.block_mask(), x.lists((64, 64), 1, 1, 4, 4)),
        ValueError,
        "b: expected the square blocks of a, (128, 128), got (64, 64); make both with the same BLOCK_SIZE",
    ),
    "and_block_masks of oblong blocks": Bad(
        lambda x: api.and_block_masks(x.lists((64, 128), 1, 1, 4, 2), x.lists((64, 128), 1, 1, 4, 2)),
        ValueError,
        "b: expected the square blocks of a, ..., got (64, 128); make both with the same BLOCK_SIZE",
    ),
    "and_block_masks of two lengths": Bad(
        lambda x: api.and_block_masks(x.block_mask(), x.block_mask(num_keys=2 * S)),
        ValueError,
        "b: expected a mask for Sq, Skv = (256, 256), as a, got (256, 512); make both for one length",
    ),
    "and_block_masks of two devices": Bad(
        lambda x: api.and_block_masks(x.block_mask(), x.block_mask().to("meta")),
        ValueError,
        "b: expected a mask on ..., as a, got meta; move it with .to(device)",
    ),
    "and_block_masks of two batch sizes": Bad(
        lambda x: api.and_block_masks(x.block_mask(batch=2), x.block_mask(batch=3)),
        ValueError,
        "b: expected a batch dimension of 2, as a, or 1, got 3; ...",
    ),
    "and_block_masks of two numbers of heads": Bad(
        lambda x: api.and_block_masks(x.block_mask(heads=4), x.block_mask(heads=2)),
        ValueError,
        "b: expected a head dimension of 4, as a, or 1, got 2; ...",
    ),
    "and_block_masks of some rows": Bad(
        lambda x: api.and_block_masks(x.block_mask(), x.rows(1)), ValueError, "b: expected ..., got ...; ..."
    ),
    "and_block_masks of some rows with all": Bad(
        lambda x: api.and_block_masks(x.rows(1), x.block_mask()), ValueError, "...: expected ..., got ...; ..."
    ),
    "and_block_masks of three dimensions": Bad(
        lambda x: api.and_block_masks(x.block_mask(), x.lists((128, 128), 1, 2, 2)),
        ValueError,
        "b: expected ...[B, H, Nq, Nk]..., got [1, 2, 2]; ...",
    ),
}

ATTENTION = {
    "score_mod is a number": Bad(
        lambda x: api.attention(x.q, x.k, x.v, score_mod=1.0),
        TypeError,
        "score_mod: expected a function of (score, b, h, q_idx, kv_idx) or None, got float; ...",
    ),
    "kernel_options is a list": Bad(
        lambda x: api.attention(x.q, x.k, x.v, kernel_options=["USE_TMA"]),
        TypeError,
        "kernel_options: expected a dict or None, got list; None takes flexproxy.kernel_options(q, k)",
    ),
    "return_lse is an int": Bad(
        lambda x: api.attention(x.q, x.k, x.v, return_lse=1), TypeError, "return_lse: expected a bool, got int; ..."
    ),
}

CPU_ATTENTION = {
    "return_lse": Bad(
        lambda x: api.attention(x.q, x.k, x.v, return_lse=True),
        ValueError,
        "return_lse: expected False on a CPU, whose kernel keeps no log-sum-exp, got True; use a GPU, or eager ...",
    ),
    "gradients of q": Bad(
        lambda x: api.attention(x.q.requires_grad_(), x.k, x.v),
        ValueError,
        "q: expected no gradients on a CPU, whose kernel has no backward pass, got a tensor that requires them; ...",
    ),
    "gradients of v": Bad(
        lambda x: api.attention(x.q, x.k, x.v.requires_grad_()),
        ValueError,
        "v: expected no gradients on a CPU, whose kernel has no backward pass, got a tensor that requires them; ...",
    ),
}

ALL = TENSORS | FIELDS | MASKS | ATTENTION


def check(bad: Bad, device: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        bad.call(inputs(device))
    pattern = ".+".join(map(re.escape, bad.message.split("...")))
    assert re.fullmatch(pattern, str(caught.value), re.DOTALL), f"\nexpected: {bad.message}\ngot:      {caught.value}"
    assert type(caught.value) is bad.error


@pytest.mark.parametrize("case", ALL)
def test_bad_input(case: str, device: str) -> None:
    """The error has the promised type, and its message the argument, what was expected, what came, and the remedy."""
    check(ALL[case], device)


@pytest.mark.parametrize("case", CPU_ATTENTION)
def test_bad_input_on_a_cpu(case: str) -> None:
    """What the CPU kernel of torch cannot do is said before it is tried."""
    check(CPU_ATTENTION[case], "cpu")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_remedy_for_gradients_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ``torch.no_grad()``, as the message advises, tensors that require gradients are no error on a CPU."""
    monkeypatch.setattr(sparse_kernel, "compiled_flex_attention", lambda *variant: flex_attention)
    x = inputs("cpu")
    settings = ProxyConfig(min_budget=128)
    want = api.attention(x.q, x.k, x.v, config=settings)
    with torch.no_grad():
        got = api.attention(x.q.requires_grad_(), x.k.requires_grad_(), x.v.requires_grad_(), config=settings)
    assert torch.equal(got, want)


def test_ragged_length_of_a_block_mask(device: str) -> None:
    """A mask for 250 tokens is not one for 256, though both have two blocks: where torch keeps the lengths."""
    block_mask = create_block_mask(masks.causal, None, None, 250, 250, device=device)
    if seq_lengths_of(block_mask) is None:
        pytest.skip("this torch keeps only the numbers of blocks")
    call = Bad(
        lambda x: api.build(x.q, x.k, block_mask=block_mask),
        ValueError,
        "block_mask: expected a mask for Sq, Skv = (256, 256), got one for (250, 250); make it for these lengths",
    )
    check(call, device)


def test_the_inputs_of_these_tests_are_good(device: str) -> None:
    """Each error above comes from the one argument that was replaced: unchanged, the call works."""
    x = inputs(device)
    mask_mods = [
        None,
        masks.document(x.table(B, S)),
        masks.padding(x.table(B, S)),
        masks.prefix_lm(x.table(B)),
        masks.shift(masks.causal, x.table(B)),
    ]
    for mask_mod in mask_mods:
        assert flexproxy.build(x.q, x.k, mask_mod=mask_mod).kv_indices.shape == (B, HQ, 2, 2)
    for block_mask in (x.block_mask(), x.block_mask(B, HQ), x.lists((128, 128), 1, 1, 2, 2)):
        assert flexproxy.build(x.q, x.k, block_mask=block_mask).kv_indices.shape == (B, HQ, 2, 2)
        assert flexproxy.and_block_masks(block_mask, x.block_mask()).kv_indices.shape[-2:] == (2, 2)
    assert api.attention(x.q, x.k, x.v).shape == x.q.shape


def test_config_is_frozen_and_keyword_only() -> None:
    """A configuration can be shared: no field changes, none is set by position, no list of the caller's is kept."""
    groups = [0, 0, 1, 1]
    settings = ProxyConfig(gamma=0.9, groups=groups)
    for name in (field.name for field in dataclasses.fields(settings)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, name, 1)
    with pytest.raises(TypeError, match="positional"):
        config(1)
    with pytest.raises(TypeError, match="gama"):
        config(gama=0.9)
    groups[0] = 7
    assert settings == ProxyConfig(gamma=0.9, groups=(0, 0, 1, 1))
    assert hash(settings) == hash(ProxyConfig(gamma=0.9, groups=(0, 0, 1, 1)))
    with pytest.raises(ValueError, match="gamma"):
        dataclasses.replace(settings, gamma=2.0)


def test_numbers_of_numpy_are_numbers() -> None:
    """In every numeric field; they are stored as Python's."""
    np = pytest.importorskip("numpy")
    plain: dict[str, Any] = {
        "num_proxies": 2, "groups": (0, 1), "gamma": 0.5, "density": 0.25, "stride": 8, "query_stride": 2,
        "block_size": 64, "min_budget": 64, "max_budget": 1024, "sink_blocks": 1, "local_blocks": 2,
    }  # fmt: skip
    given = {name: np.float32(x) if isinstance(x, float) else np.int64(x) for name, x in plain.items() if x != (0, 1)}
    settings = ProxyConfig(**given, groups=[np.int32(0), np.int64(1)])
    for name, want in plain.items():
        got = getattr(settings, name)
        assert got == want
        assert type(got) is type(want)
    assert type(ProxyConfig(gamma=np.float64(0.5)).gamma) is float
    assert all(type(index) is int for index in settings.groups or ())
    with pytest.raises(TypeError, match=r"stride: expected an integer"):
        ProxyConfig(stride=np.float64(4))
    with pytest.raises(TypeError, match=r"gamma: expected a number"):
        ProxyConfig(gamma=np.bool_(True))
    x = inputs("cpu")
    assert torch.equal(api.attention(x.q, x.k, x.v, scale=np.float32(0.5)), api.attention(x.q, x.k, x.v, scale=0.5))


# ------------------------------------------------------------------------------------------- not finite is no error

NUM_BLOCKS, BLOCK = 9, 16
LENGTH = (NUM_BLOCKS - 1) * BLOCK + 5  # a ragged last block
POISONED = 1
NOT_FINITE_CONFIGS = {
    "outliers": outliers(gamma=0.6, block_size=BLOCK, min_budget=0, query_stride=4),
    "gamma": ProxyConfig(gamma=0.6, block_size=BLOCK, min_budget=0),
    "density": ProxyConfig(density=0.5, block_size=BLOCK, min_budget=BLOCK, num_proxies=2),
    "bounds": ProxyConfig(
        gamma=0.9, block_size=BLOCK, min_budget=32, max_budget=64, sink_blocks=1, groups=(0, 1, 1, 0)
    ),
}
PLACES = ("one query", "one key", "last keys", "queries", "keys", "everything")


def poison(q: Tensor, k: Tensor, place: str, value: float) -> None:
    """Put the value into one sequence."""
    if place == "one query":
        q[POISONED, 2, LENGTH - 3, 5] = value
    elif place == "one key":
        k[POISONED, 0, 40, 7] = value
    elif place == "last keys":
        k[POISONED, :, -BLOCK:] = value
    if place in ("queries", "everything"):
        q[POISONED] = value
    if place in ("keys", "everything"):
        k[POISONED] = value


def not_finite_mask(name: str, device: str) -> MaskMod | None:
    index = torch.arange(LENGTH, device=device)
    left = (index >= torch.tensor([[0], [20], [50]], device=device)).long()
    number = torch.tensor([3, 30, 60], device=device)
    heads = torch.tensor([True, False, True, False], device=device)
    if name == "padding":
        return and_masks(masks.causal, masks.padding(left))
    if name == "documents":
        return and_masks(masks.causal, masks.document(index // 50))
    if name == "closure":
        return lambda b, h, q, kv: (q >= kv) & ((kv >= number[b]) | heads[h])
    return None


@pytest.mark.parametrize("mask_name", ["default", "padding", "documents", "closure"])
@pytest.mark.parametrize("settings", NOT_FINITE_CONFIGS)
@pytest.mark.parametrize(
    ("value", "dtype"),
    [("nan", torch.float32), ("nan", torch.float16), ("inf", torch.bfloat16), ("-inf", torch.float32)],
)
def test_not_finite_is_no_error(value: str, dtype: torch.dtype, settings: str, mask_name: str, device: str) -> None:
    """NaN and inf never crash, never give an index out of range, and leave the other sequences as they would be."""
    settings_, mask_mod = NOT_FINITE_CONFIGS[settings], not_finite_mask(mask_name, device)
    others = [b for b in range(3) if b != POISONED]
    generator = torch.Generator().manual_seed(3)
    q = (2 * torch.randn(3, 4, LENGTH, 32, generator=generator)).to(device, dtype)
    k = torch.randn(3, 2, LENGTH, 32, generator=generator).to(device, dtype)
    clean = flexproxy.select(q, k, mask_mod=mask_mod, config=settings_)
    for place in PLACES:
        bad_q, bad_k = q.clone(), k.clone()
        poison(bad_q, bad_k, place, float(value))
        assert not (bad_q.isfinite().all() and bad_k.isfinite().all())
        got = flexproxy.select(bad_q, bad_k, mask_mod=mask_mod, config=settings_)
        assert torch.equal(got.rank[others], clean.rank[others]), place
        assert torch.equal(got.count[others], clean.count[others]), place
        assert torch.equal(got.block_map()[others], clean.block_map()[others]), place

        in_order = torch.arange(NUM_BLOCKS, device=device, dtype=torch.int32).expand_as(got.rank)
        assert torch.equal(got.rank.sort(-1).values, in_order), f"{place}: not a permutation"
        assert int(got.count.min()) >= 1, place
        assert int(got.count.max()) <= NUM_BLOCKS, place
        diagonal, clean_diagonal = (x.block_map().diagonal(dim1=-2, dim2=-1) for x in (got, clean))
        assert torch.equal(diagonal, clean_diagonal), f"{place}: a query lost itself"

        block_mask = got.block_mask()
        for number, index in (
            (block_mask.kv_num_blocks, block_mask.kv_indices),
            (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
        ):
            assert number is not None
            assert index is not None
            assert int(number.min()) >= 0, place
            assert int(number.max()) <= NUM_BLOCKS, place
            assert int(index.min()) >= 0, place
            assert int(index.max()) < NUM_BLOCKS, place
            listed = torch.arange(NUM_BLOCKS, device=device) < number[..., None]
            ascends = index.diff(dim=-1) > 0
            assert bool(ascends[listed[..., 1:]].all()), f"{place}: a block is listed twice, or out of order"
