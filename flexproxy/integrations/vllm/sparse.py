"""What makes a backend of vLLM prefill sparsely: the parts of its builder and of its layers that are ours.

vLLM calls a builder once a step for all layers of a kind, and then a layer's ``forward``. Both are subclasses here of
those of a dense backend, their *parent*, whose work everything is that is not a long prefill: a step that has sparse
requests is cut into these and runs of neighbours for the parent.

NOTE [Host copies]
Lengths come from the copies that vLLM has on the host, exact for requests that are reading their prompt. Where one is
missing, the step is dense, and the log says so once. The device is never waited for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from vllm import envs
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType

from flexproxy.checks import MAX_HEAD_DIM, MIN_HEAD_DIM
from flexproxy.config import ProxyConfig
from flexproxy.integrations.common import share_of_rank
from flexproxy.integrations.vllm.layers import Heads, Plan, description, layer_index, rehearsals
from flexproxy.integrations.vllm.settings import Settings, parse
from flexproxy.integrations.vllm.step import Run, dense_runs, prefills, sparse_requests
from flexproxy.sparse.ragged import Keys, Packed, Request, attend_requests
from flexproxy.stages.proxy import head_groups

logger = init_logger(f"vllm.{__name__}")  # below vLLM's own logger, whose settings it shares

_SPLITS = "flexproxy"  # the attribute of the parent's metadata
# What a common metadata has for each request, besides its lengths; and what it keeps of its own computations.
_BY_REQUEST = ("seq_lens", "block_table_tensor", "is_prefilling", "seq_lens_cpu_upper_bound", "_seq_lens_cpu")
_FORGOTTEN = ("_num_computed_tokens_cpu", "_num_computed_tokens_cache", "_token_to_req_indices_cache")


class Split(NamedTuple):
    """A step with sparse requests.

    requests: those.
    table: the pages of every request, int ``[requests, columns]``.
    runs: the others, with the parent's metadata of each run.
    """

    requests: tuple[Request, ...]
    table: Tensor
    runs: tuple[tuple[Run, Any], ...]


class SparseBuilder:
    """For a builder of metadata; stands before its parent among the bases."""

    # A prefill must not be captured in a graph: its kernels depend on lengths. Decodes are, as in the parent.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = False

    if TYPE_CHECKING:
        vllm_config: Any
        layer_names: list[str]
        device: torch.device

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plans: dict[Plan, Heads] = {}
        if _is_derived(type(self)):
            return
        layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        ours = {name: layer for name, layer in layers.items() if isinstance(layer.impl, SparseLayer)}
        for name in self.layer_names:
            if name in ours and ours[name].impl.plan_of(ours[name]).share is not None:
                self._plans[ours[name].impl.plan] = ours[name].impl.heads_on(self.device)
        if next(iter(ours), None) in self.layer_names and get_tensor_model_parallel_rank() == 0:
            self._tell(ours)

    def _tell(self, layers: Mapping[str, Any]) -> None:
        """Log once what the layers of the model do."""
        plans = {layer_index(name): layer.impl.plan_of(layer) for name, layer in layers.items()}
        heads = {layer.impl.plan: layer.impl.heads_on(self.device) for layer in layers.values()}
        max_tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
        max_keys = self.vllm_config.model_config.max_model_len
        shortest = {plan: its.shortest(plan, max_tokens, max_keys) for plan, its in heads.items()}
        for line in description(plans, shortest):
            logger.info_once("flexproxy: %s", line)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The parent's metadata of the whole step, which carries the splits of the plans that have sparse requests."""
        # First, and for the whole: the parent learns things at its first build, and keeps a schedule for one.
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        whole = fast_build or common_prefix_len > 0 or not self._plans or common_attn_metadata.max_query_len < 2
        setattr(metadata, _SPLITS, None if whole else self._splits(common_attn_metadata))
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """As the parent's: no request is sparse in a graph."""
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        setattr(metadata, _SPLITS, None)
        return metadata

    def _splits(self, common: Any) -> dict[Plan, Split] | None:
        lengths = self._lengths(common)
        if lengths is None:
            return None
        starts, key_lengths, prefilling = lengths
        candidates = prefills(starts, key_lengths, prefilling)
        made: dict[tuple[Request, ...], Split] = {}
        splits = {}
        for plan, heads in self._plans.items():
            requests = sparse_requests(candidates, functools.partial(heads.pays, plan))
            if requests and requests not in made:
                runs = tuple((run, self._metadata_of(common, run)) for run in dense_runs(starts, requests))
                made[requests] = Split(requests, common.block_table_tensor, runs)
            if requests:
                splits[plan] = made[requests]
        return splits or None

    def _metadata_of(self, common: Any, run: Run) -> Any:
        """The parent's metadata of a run; fast, as a schedule for it would overwrite that of the whole step."""
        return super().build(0, _cut(common, run), True)  # type: ignore[misc]

    def _lengths(self, common: Any) -> tuple[list[int], list[int], list[bool]] | None:
        """Where queries start, numbers of keys, and who is reading a prompt; None where the step stays whole."""
        if common.causal is not True or _has(common, "mm_req_doc_ranges") or _has(common, "rswa_prefix_lens"):
            return None
        names = ("query_start_loc_cpu", "seq_lens_cpu_upper_bound", "is_prefilling")
        copies = [getattr(common, name, None) for name in names]
        lists: list[list[Any]] = []
        for name, copy in zip(names, copies, strict=True):
            if copy is None or copy.device.type != "cpu":
                logger.warning_once("flexproxy: steps for which vLLM has no %s on the host stay dense", name)
                return None
            lists.append(copy.tolist())
        starts, key_lengths, prefilling = lists
        return starts[: common.num_reqs + 1], key_lengths[: common.num_reqs], prefilling[: common.num_reqs]


class SparseLayer:
    """For the implementation of a layer; stands before its parent among the bases."""

    plan: Plan | None = None

    if TYPE_CHECKING:
        num_heads: int
        num_kv_heads: int
        head_size: int
        scale: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vllm_config: Any = get_current_vllm_config()
        self._settings = _settings_of(self._vllm_config)
        self._has_run = False

    def keys_of(self, layer: Any, kv_cache: Tensor, table: Tensor) -> Keys:
        """Where the keys and values of the requests are in the parent's cache."""
        raise NotImplementedError

    def heads_on(self, device: torch.device) -> Heads:
        dtype = self._vllm_config.model_config.dtype
        return Heads(self.num_heads, self.num_kv_heads, self.head_size, dtype, device)

    def plan_of(self, layer: Any) -> Plan:
        """What the layer does; worked out once.

        Raises:
            ValueError: the settings do not fit the heads.
        """
        if self.plan is None:
            config = self._settings.of(layer_index(layer.layer_name))
            why = self._why_dense(layer)
            share = None if why is not None else self._share(config)
            self.plan = Plan(config, share, self._settings.when, why)
        return self.plan

    def _share(self, config: ProxyConfig) -> ProxyConfig:
        ranks = get_tensor_model_parallel_world_size()
        kv_heads = self._vllm_config.model_config.get_total_num_kv_heads()
        share = share_of_rank(config, get_tensor_model_parallel_rank(), ranks, self.num_heads * ranks, kv_heads)
        head_groups(share, self.num_heads, self.num_kv_heads)
        return share

    def _why_dense(self, layer: Any) -> str | None:
        """Why every step of this layer is the parent's; None where long prefills are sparse."""
        parent: Any = self
        reasons = {
            "it is no causal self-attention": parent.attn_type != AttentionType.DECODER,
            "it has a sliding window": parent.sliding_window not in (None, -1, (-1, -1)),
            "it has ALiBi": parent.alibi_slopes is not None,
            "it has a softcap": bool(parent.logits_soft_cap),
            "it has attention sinks": parent.sinks is not None,
            "its cache is quantized": is_quantized_kv_cache(parent.kv_cache_dtype),
            "it shares the cache of another layer": parent.kv_sharing_target_layer_name is not None,
            f"its head dimension is {self.head_size}": not MIN_HEAD_DIM <= self.head_size <= MAX_HEAD_DIM,
            "vLLM gives it requests of its own making": _is_derived(layer.attn_backend.get_builder_cls()),
            "decode context parallelism is on": getattr(parent, "dcp_world_size", 1) > 1,
            "prefill context parallelism is on": getattr(parent, "pcp_world_size", 1) > 1,
            "results must not depend on the batch (VLLM_BATCH_INVARIANT)": bool(envs.VLLM_BATCH_INVARIANT),
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of a step, ``[tokens, Hq, D]``, written into ``output``; keys and values are in the cache."""
        parent: Any = super()
        plan = self.plan_of(layer)
        if attn_metadata is None:
            self._rehearse(plan, query)
        splits: Mapping[Plan, Split] = getattr(attn_metadata, _SPLITS, None) or {}
        split = splits.get(plan)
        if split is not None and any(extra is not None for extra in (*args, *kwargs.values())):
            asked = sorted(name for name, extra in kwargs.items() if extra is not None)
            logger.warning_once("flexproxy: steps with arguments that it does not know stay dense: %s", str(asked))
            split = None
        if split is None or plan.share is None:
            result: Tensor = parent.forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            return result
        for run, metadata in split.runs:
            its = slice(run.start, run.stop)
            parent.forward(layer, query[its], key[its], value[its], kv_cache, metadata, output[its], *args, **kwargs)
        keys = self.keys_of(layer, kv_cache, split.table)
        return self._attend(query, keys, split.requests, output, plan.share)

    def _attend(
        self, query: Tensor, keys: Keys, requests: tuple[Request, ...], output: Tensor, config: ProxyConfig
    ) -> Tensor:
        when = self._settings.when
        return attend_requests(query, keys, requests, output, config=config, scale=self.scale, when=when)

    def _rehearse(self, plan: Plan, query: Tensor) -> None:
        """In vLLM's profiling run: take the memory of the longest prefill, and compile the kernels of all lengths.

        So the cache is planned with room for it, and the first long request waits less. Once for each plan, by the
        first layer that has it.
        """
        if self._has_run or plan.share is None or not query.is_cuda:
            return
        self._has_run = True
        layers = get_layers_from_vllm_config(self._vllm_config, Attention).values()
        alike = (x.impl for x in layers if isinstance(x.impl, SparseLayer) and x.impl.plan_of(x) == plan)
        if next(alike) is not self:
            return
        max_keys, max_queries = self._vllm_config.model_config.max_model_len, query.shape[0]
        heads = self.heads_on(query.device)
        for num_queries, num_keys in rehearsals(max_queries, max_keys):
            if heads.pays(plan, num_queries, num_keys):
                keys = zeros_as_gathered(query, num_keys, self.num_kv_heads, self.head_size)
                requests = (Request(0, 0, num_queries, num_keys),)
                for _ in range(2):  # the second captures a graph, which holds memory: NOTE [Replays]
                    self._attend(query, keys, requests, torch.empty_like(query), plan.share)


def zeros_as_gathered(query: Tensor, num_keys: int, num_heads: int, head_size: int) -> Packed:
    """Keys and values of one request, laid out as ``Paged`` gathers them.

    Each in a tensor of its own: kernels are specialised to strides, and to the offset at which a tensor begins.
    """
    k, v = (query.new_zeros(num_keys, num_heads, head_size) for _ in range(2))
    return Packed(k, v, (0,))


def _settings_of(vllm_config: Any) -> Settings:
    """The server's settings.

    Raises:
        ValueError: they are misspelt, out of range, or for another model; of one line, which the log has too.
    """
    try:
        settings = parse(vllm_config.additional_config)
        shape = vllm_config.model_config.hf_text_config
        settings.check_model(shape, getattr(shape, "num_hidden_layers", 2**31))
    except ValueError as error:
        logger.error("flexproxy: %s", error)
        raise
    return settings


def _is_derived(builder: type) -> bool:
    """Whether vLLM made a builder from ours, to give it other requests than there are.

    Virtual ones, for windows by chunk, for cross-attention or for shared caches.
    """
    return builder.__module__.startswith("vllm.") and issubclass(builder, SparseBuilder)


def _has(common: Any, name: str) -> bool:
    return getattr(common, name, None) is not None


def _cut(common: Any, run: Run) -> Any:
    """The common metadata of a run of requests, as if there were no others."""
    rows, tokens = slice(run.first, run.end), slice(run.start, run.stop)
    own_starts = slice(run.first, run.end + 1)
    starts_on_host = common.query_start_loc_cpu[own_starts] - run.start
    changes = {name: getattr(common, name)[rows] for name in _BY_REQUEST if _has(common, name)}
    changes |= {name: None for name in _FORGOTTEN if _has(common, name)}
    return common.replace(
        query_start_loc=common.query_start_loc[own_starts] - run.start,
        query_start_loc_cpu=starts_on_host,
        num_reqs=run.end - run.first,
        num_actual_tokens=run.stop - run.start,
        max_query_len=int((starts_on_host[1:] - starts_on_host[:-1]).max()),
        slot_mapping=common.slot_mapping[tokens],
        positions=common.positions[tokens] if _has(common, "positions") else None,
        **changes,
    )
