"""vLLM's backend for CPUs with sparse prefills: for tests, and registered by them alone."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from flexproxy.config import ProxyConfig
from flexproxy.integrations.vllm.sparse import SparseBuilder, SparseLayer
from flexproxy.sparse.ragged import Keys, Request

ATTENDED: list[tuple[int, int]] = []
"""Queries and keys of every sparse request so far, in every layer."""


def register() -> None:
    """In place of vLLM's own backend, which on a CPU is the only one that can be selected."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.Backend")


def register_if_asked() -> None:
    """For processes that vLLM starts: the parent process says what it is by its environment."""
    if "FLEXPROXY_TEST_CPU" in os.environ:
        register()


class Builder(SparseBuilder, CPUAttentionMetadataBuilder):
    pass


class Layer(SparseLayer, CPUAttentionBackendImpl):
    def keys_of(self, layer: Any, kv_cache: Tensor, table: Tensor) -> Keys:
        return _Cache(kv_cache, table, _places(self, layer, kv_cache.shape[1:]))

    def _attend(
        self, query: Tensor, keys: Keys, requests: tuple[Request, ...], output: Tensor, config: ProxyConfig
    ) -> Tensor:
        """Without compiling, which takes ten seconds for every pair of lengths."""
        ATTENDED.extend((request.num_queries, request.num_keys) for request in requests)
        with torch.compiler.set_stance("force_eager"):
            return super()._attend(query, keys, requests, output, config)


class Backend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return Layer

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return Builder


class _Cache(NamedTuple):
    """Pages whose numbers stand in the order that the kernel likes.

    places: int ``[2, page_size, Hkv, D]``, where each number of a page's keys and values is.
    """

    pages: Tensor
    table: Tensor
    places: Tensor

    def of(self, request: Request) -> tuple[Tensor, Tensor]:
        own = self.table[request.row, : -(-request.num_keys // self.places.shape[1])].long()
        numbers = self.pages[own].flatten(1)[:, self.places]  # [pages, 2, page_size, Hkv, D]
        k, v = (x.flatten(0, 1)[: request.num_keys].transpose(0, 1)[None] for x in numbers.unbind(1))
        return k, v


_KNOWN: dict[Any, Tensor] = {}


def _places(impl: Any, layer: Any, page: torch.Size) -> Tensor:
    """Found by writing a page whose every number is another, with the kernel that writes pages."""
    if page not in _KNOWN:
        kv_heads, page_size, double = page
        numbers = torch.arange(2 * page_size * kv_heads * double // 2, dtype=torch.float32)
        k, v = numbers.view(2, page_size, kv_heads, double // 2)
        cache = torch.zeros(1, *page)
        impl.do_kv_cache_update(layer, k.contiguous(), v.contiguous(), cache, torch.arange(page_size))
        _KNOWN[page] = cache.flatten().argsort().view(2, page_size, kv_heads, double // 2)
    return _KNOWN[page]
