"""As much of vLLM as ``flexproxy.integrations.vllm.sparse`` imports, and a dense backend to stand on.

The names are those of vLLM 0.26 to 0.33; tests/integrations/test_vllm.py runs the real one.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_STATE: dict[str, Any] = {"config": None}
LOG: list[str] = []


class AttentionCGSupport(enum.Enum):
    UNIFORM_BATCH = 2


class AttentionType(str, enum.Enum):
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"


class Attention:
    """A layer, by what is asked of it."""

    def __init__(self, name: str, backend: Any, **settings: Any) -> None:
        self.layer_name, self.attn_backend = name, backend
        self.impl = backend.get_impl_cls()(**settings)
        _STATE["config"].layers[name] = self


class _Logger:
    def __init__(self, name: str) -> None:
        self.name = name

    def info_once(self, message: str, *values: object) -> None:
        LOG.append(message % values)

    warning_once = error = info_once


@contextmanager
def installed() -> Iterator[Any]:
    """The module ``sparse``, imported on the stand-in; both are forgotten afterwards."""
    parts: dict[str, dict[str, Any]] = {
        "": {"envs": types.SimpleNamespace(VLLM_BATCH_INVARIANT=False)},
        ".config": {
            "get_current_vllm_config": lambda: _STATE["config"],
            "get_layers_from_vllm_config": lambda config, kind, names=None: config.layers,
        },
        ".distributed": {
            "get_tensor_model_parallel_rank": lambda: _STATE["config"].rank,
            "get_tensor_model_parallel_world_size": lambda: _STATE["config"].ranks,
        },
        ".logger": {"init_logger": _Logger},
        ".model_executor": {},
        ".model_executor.layers": {},
        ".model_executor.layers.attention": {"Attention": Attention},
        ".utils": {},
        ".utils.torch_utils": {"is_quantized_kv_cache": lambda dtype: dtype.startswith("fp8")},
        ".v1": {},
        ".v1.attention": {},
        ".v1.attention.backend": {"AttentionCGSupport": AttentionCGSupport, "AttentionType": AttentionType},
    }
    modules = {f"vllm{name}": types.ModuleType(f"vllm{name}") for name in parts}
    for name, contents in parts.items():
        vars(modules[f"vllm{name}"]).update(contents)
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "vllm"}
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)
    own = "flexproxy.integrations.vllm.sparse"
    sys.modules.pop(own, None)
    LOG.clear()
    try:
        import flexproxy.integrations.vllm.sparse as sparse

        yield sparse
    finally:
        for name in (own, *modules):
            sys.modules.pop(name, None)
        sys.modules.update(before)
        _STATE["config"] = None


def use_config(settings: dict[str, Any], device: str, **changes: Any) -> Any:
    """Make a server's configuration the current one, without layers."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: dict[str, Any] = {"dtype": dtype, "max_model_len": 1024, "hf_text_config": types.SimpleNamespace()}
    model["get_total_num_kv_heads"] = lambda: 2
    _STATE["config"] = types.SimpleNamespace(
        additional_config={"flexproxy": settings},
        model_config=types.SimpleNamespace(**model),
        scheduler_config=types.SimpleNamespace(max_num_batched_tokens=512),
        layers={},
        **{"rank": 0, "ranks": 1} | changes,
    )
    return _STATE["config"]


@dataclasses.dataclass
class CommonMetadata:
    """What a builder gets: host copies and device tensors of the lengths of all requests."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: Any = True
    positions: Tensor | None = None
    is_prefilling: Tensor | None = None
    seq_lens_cpu_upper_bound: Tensor | None = None
    mm_req_doc_ranges: Any = None
    _num_computed_tokens_cache: Tensor | None = None

    def replace(self, **changes: Any) -> CommonMetadata:
        return dataclasses.replace(self, **changes)


class DenseBuilder:
    """Keeps the common metadata as it is, and the arguments of every call."""

    def __init__(self, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.layer_names, self.vllm_config, self.device = layer_names, vllm_config, device
        self.calls: list[tuple[CommonMetadata, bool]] = []

    def build(self, common_prefix_len: int, common_attn_metadata: CommonMetadata, fast_build: bool = False) -> Any:
        self.calls.append((common_attn_metadata, fast_build))
        return types.SimpleNamespace(common=common_attn_metadata)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonMetadata) -> Any:
        return self.build(0, common_attn_metadata)


class DenseLayer:
    """Dense attention of pages ``[pages, Hkv, page_size, 2 * D]``, request after request."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_size: int, **others: Any) -> None:
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.scale = head_size**-0.5
        plain: dict[str, Any] = {
            "attn_type": AttentionType.DECODER,
            "sliding_window": (-1, -1),
            "alibi_slopes": None,
            "logits_soft_cap": 0,
            "sinks": None,
            "kv_cache_dtype": "auto",
            "kv_sharing_target_layer_name": None,
        }
        for name, value in (plain | others).items():
            setattr(self, name, value)
        self.seen: list[int] = []  # queries of every call

    def forward(
        self, layer: Any, query: Tensor, key: Any, value: Any, cache: Tensor, metadata: Any, output: Tensor, **_: Any
    ) -> Tensor:
        if metadata is None:
            return output.fill_(0)
        common = metadata.common
        self.seen.append(query.shape[0])
        starts, page_size = common.query_start_loc_cpu.tolist(), cache.shape[2]
        for row, num_keys in enumerate(common.seq_lens_cpu_upper_bound.tolist()):
            rows = slice(starts[row], starts[row + 1])
            if rows.start == rows.stop:
                continue
            pages = common.block_table_tensor[row, : -(-num_keys // page_size)].long()
            tokens = cache[pages].transpose(1, 2).flatten(0, 1)[:num_keys].transpose(0, 1)
            k, v = tokens.repeat_interleave(self.num_heads // self.num_kv_heads, 0).chunk(2, -1)
            queries = rows.stop - rows.start
            mask = torch.ones(queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - queries)
            out = F.scaled_dot_product_attention(query[rows].transpose(0, 1), k, v, attn_mask=mask, scale=self.scale)
            output[rows] = out.transpose(0, 1)
        return output
