"""Compile every Triton kernel for GPUs that are not here: python -m tests.compile_kernels 90 80

Of one dtype and head dimension alone: python -m tests.compile_kernels 90 --only float16 64

Launchers run on CPU tensors; each launch is replaced by a compilation of the kernel for its arguments, so the results
mean nothing. The interpreter accepts much that the compiler does not.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import triton
import typer
from torch.nn.attention.flex_attention import and_masks, or_masks
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import flexproxy
from flexproxy import ProxyConfig, masks
from flexproxy.ops import implementations
from flexproxy.ops.kernels import block_logits, launch, lists, tiles
from tests.settings import outliers

POINTERS = {
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
compiled: dict[Any, int] = {}  # what was compiled: shared memory in bytes


def type_of(value: Any, specialize: bool) -> tuple[str, bool]:
    """Type in a kernel's signature, and whether its address or value counts as divisible by 16."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], True
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>", False
    if isinstance(value, float):
        return "fp32", False
    if value is None or (specialize and value == 1):
        return "constexpr", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), specialize and value % 16 == 0


def compile_for(kernel: JITFunction, capability: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    values = dict(zip(kernel.arg_names, args, strict=False)) | {
        n: v for n, v in options.items() if n in kernel.arg_names
    }
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        kind, aligned = (
            ("constexpr", False) if parameter.is_constexpr else type_of(value, not parameter.do_not_specialize)
        )
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(place,)] = value
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    launch = {name: options[name] for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    key = (kernel.fn.__name__, capability, str(signature), str(constants), str(attributes), str(launch))
    if key not in compiled:
        source = ASTSource(kernel, signature, constants, attributes)
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
        compiled[key] = result.metadata.shared


def calls(dtype: torch.dtype, head_dim: int) -> None:
    """Builds that between them launch every kernel in every form."""
    q, k = torch.zeros(2, 4, 300, head_dim, dtype=dtype), torch.zeros(2, 2, 400, head_dim, dtype=dtype)
    ids = torch.zeros(2, 400, dtype=torch.int32)
    documents = and_masks(masks.causal, masks.document(ids))
    window = or_masks(masks.sliding_window(50), masks.prefix_lm(torch.ones(2, dtype=torch.int32)))
    for mask_mod in (None, documents, or_masks(documents, masks.sliding_window(9)), window, lambda b, h, q, kv: q > kv):
        for config in (ProxyConfig(min_budget=0), outliers(min_budget=0)):
            flexproxy.build(q, k, mask_mod=mask_mod, config=config)
    for config in (
        ProxyConfig(min_budget=0, block_size=16, groups=[0, 1, 0, 1]),
        ProxyConfig(min_budget=0, block_size=512, stride=1, density=0.5),
        ProxyConfig(min_budget=0, block_size=64, stride=64, query_stride=4, sink_blocks=1),
        ProxyConfig(min_budget=0, num_proxies=4, query_stride=16, density=0.5, sharing="rows"),
        outliers(min_budget=0),
        outliers(min_budget=0, block_size=16, query_stride=2),
    ):
        flexproxy.build(q, k, config=config, scale=-1.0)
    lists.block_lists(torch.zeros(1, 1, 3, 4, dtype=torch.bool), torch.zeros(1, 1, 3, 4, dtype=torch.bool))


def main(capabilities: list[int], only: Annotated[tuple[str, int] | None, typer.Option()] = None) -> None:
    dtypes = (torch.bfloat16, torch.float32) if only is None else (getattr(torch, only[0]),)
    head_dims = (64, 80, 128, 256) if only is None else (only[1],)
    launch._DIRECT = False
    for capability in capabilities:
        block_logits.has_tma = lambda device, capability=capability: capability >= 90  # type: ignore[assignment]
        tiles.is_hopper = lambda device, capability=capability: capability == 90  # type: ignore[assignment]

        def run(
            self: JITFunction, *args: Any, grid: Any, warmup: bool, capability: int = capability, **options: Any
        ) -> None:
            compile_for(self, capability, args, options)

        JITFunction.run = run
        implementations._missing = lambda device: None  # type: ignore[assignment]
        with implementations.use("triton"):
            for dtype in dtypes:
                for head_dim in head_dims:
                    calls(dtype, head_dim)
    print(len(compiled), "kernels compiled, at most", max(compiled.values()), "bytes of shared memory")


if __name__ == "__main__":
    typer.run(main)
