"""What is chosen without looking at values: kernel options, dense or sparse, and whether a mask fits in memory."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import re
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import flexproxy
from flexproxy import ProxyConfig, checks, masks, pipeline
from flexproxy.masks.structure import MaskMod, structure_of
from flexproxy.plan import new_plan
from tests.accuracy import cpu_kernel_exists
from tests.settings import outliers

planning: Any = importlib.import_module("flexproxy.sparse.plan")
options: Any = importlib.import_module("flexproxy.sparse.kernel_options")
SPARSE_COST = planning.SPARSE_COST

COPY_ENGINE = {"USE_TMA": True, "BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
FLASH = {"BACKEND": "FLASH"}


class OnGpu(Tensor):
    """A tensor that says it is on a GPU, and has a shape only."""

    is_cuda = True
    device = torch.device("cuda", 0)

    @staticmethod
    def __new__(cls, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Any:
        return torch.empty(1, dtype=dtype).expand(shape).as_subclass(cls)


def pair(length: int = 1024, dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    return OnGpu(2, 8, length, dim, dtype=dtype), OnGpu(2, 2, length, dim, dtype=dtype)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0), flash=False)


@pytest.fixture
def hopper_with_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0), flash=True)


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], flash: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(options.compat, "flash_backend_exists", lambda: flash)


def options_for(q: Tensor, block_size: int, num_keys: int | None = None, **changes: Any) -> dict[str, Any]:
    given = {"mask": None, "gradients": False, "membership": False, "has_score_mod": False, "lse": False} | changes
    found: dict[str, Any] = options.options_for(q, num_keys or q.shape[2], block_size=block_size, **given)
    return found


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_options_of_a_gpu(capability: tuple[int, int], flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was measured: Hopper, 16 bits, inference."""
    gpu(monkeypatch, capability, flash)
    for dtype, dim, length in itertools.product(
        (torch.float16, torch.bfloat16, torch.float32), (64, 80, 96, 128, 256), (127, 128)
    ):
        want: dict[str, Any] = {}
        if capability == (9, 0) and dtype != torch.float32 and length >= 128 and dim <= 128:
            want = FLASH if flash and dim in (64, 96, 128) else COPY_ENGINE
        assert options.kernel_options(*pair(length, dim, dtype)) == want, (dtype, dim, length)


def test_every_choice_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, flash, tensors, gradients, want, why in (
        ((9, 0), True, pair(), False, FLASH, "flash-attn-4 is installed"),
        ((9, 0), False, pair(), False, COPY_ENGINE, r'not installed \(pip install --pre "flexproxy\[flash\]"\)'),
        ((9, 0), True, pair(dim=80), False, COPY_ENGINE, "head dimensions 64, 96 and 128"),
        ((9, 0), True, pair(dim=256), False, {}, "head dimensions up to 128"),
        ((9, 0), True, pair(127), False, {}, "fewer than 128 queries"),
        ((9, 0), True, pair(dtype=torch.float32), False, {}, "float16 and bfloat16"),
        ((9, 0), True, pair(), True, {}, "gradients"),
        ((10, 0), True, pair(), False, {}, r"Hopper GPUs \(compute capability 9\.0\)"),
        ((9, 0), True, (torch.empty(1, 8, 1024, 128),), False, {}, "not a CUDA device"),
    ):
        gpu(monkeypatch, capability, flash)
        found, reason = options.fastest(tensors[0], gradients)
        assert found == want
        assert re.search(why, reason), reason


@pytest.mark.usefixtures("hopper_with_flash")
def test_torch_chooses_where_gradients_are_needed() -> None:
    q, k = pair()
    for x in (q, k):
        x.requires_grad_()
        assert options.kernel_options(q, k) == {}
        with torch.no_grad():
            assert options.kernel_options(q, k) == FLASH
        x.requires_grad_(False)
    assert options_for(q, 128, gradients=True) == {}
    assert options_for(q, 64, gradients=True)["BLOCK_M"] == 64


@pytest.mark.usefixtures("hopper")
def test_options_are_the_callers() -> None:
    """A change of them changes no later call."""
    options.kernel_options(*pair())["num_stages"] = 7
    assert options.kernel_options(*pair()) == COPY_ENGINE
    options_for(pair()[0], 128)["BLOCK_M"] = 7
    assert options.kernel_options(*pair()) == COPY_ENGINE


def test_nothing_on_a_cpu() -> None:
    q = torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16)
    assert options.kernel_options(q, q) == {}
    for block_size in (16, 64, 128, 256):
        assert options_for(q, block_size) == {}


def unknown(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


# Masks by what their functions look up: no tables, a number a sequence, a value a token, a tensor without a dimension.
NO_TABLES: dict[str, MaskMod | None] = {"default": None, "causal": masks.causal, "window": masks.sliding_window(9)}
PER_SEQUENCE: dict[str, MaskMod | None] = {
    "shift": masks.shift(masks.causal, ids(2)),
    "prefix": masks.prefix_lm(ids(2)),
}
BY_TOKEN: dict[str, MaskMod | None] = {
    "documents": masks.document(ids(1024)),
    "documents of each": masks.document(ids(2, 1024)),
    "padding": masks.padding(ids(2, 1024)),
}
NUMBER: dict[str, MaskMod | None] = {"shift by []": masks.shift(masks.causal, torch.tensor(3))}


def chosen(mask_mod: MaskMod | None, length: int = 1024, **changes: Any) -> Any:
    structure = None if mask_mod is None else structure_of(mask_mod)
    return options_for(pair(length)[0], **{"mask": structure, "block_size": 128} | changes)


@pytest.mark.usefixtures("hopper_with_flash")
def test_flash_where_its_compiler_can_read_the_mask() -> None:
    for name, mask_mod in (NO_TABLES | PER_SEQUENCE | BY_TOKEN).items():
        assert chosen(mask_mod) == FLASH, name
        assert chosen(mask_mod, membership=True) == FLASH, name
    for name, mask_mod in (NUMBER | {"unknown": unknown}).items():
        assert chosen(mask_mod) == chosen(mask_mod) | COPY_ENGINE | {"num_stages": chosen(mask_mod)["num_stages"]}
        assert "BACKEND" not in chosen(mask_mod), name
    assert "BACKEND" not in chosen(None, has_score_mod=True)
    assert "BACKEND" not in chosen(None, block_size=256)


@pytest.mark.usefixtures("hopper_with_flash")
def test_flash_where_the_unit_of_its_log_sum_exp_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for factor in (1.0, 1 / math.log(2)):
        monkeypatch.setattr(options, "flash_lse_factor", lambda device, factor=factor: factor)
        assert chosen(None, lse=True) == FLASH
    monkeypatch.setattr(options, "flash_lse_factor", lambda device: None)
    assert "BACKEND" not in chosen(None, lse=True)
    assert chosen(None) == FLASH


@pytest.mark.usefixtures("hopper")
def test_stages_by_what_a_mask_looks_up() -> None:
    """Three where shared memory has room, two where the mask reads a value of each token, or nobody knows."""
    for name, mask_mod in (NO_TABLES | PER_SEQUENCE | NUMBER).items():
        assert chosen(mask_mod)["num_stages"] == 3, name
        assert chosen(mask_mod, membership=True)["num_stages"] == 2, name
        assert chosen(mask_mod, has_score_mod=True)["num_stages"] == 2, name
    for name, mask_mod in (BY_TOKEN | {"unknown": unknown}).items():
        assert chosen(mask_mod)["num_stages"] == 2, name


@pytest.mark.usefixtures("hopper")
def test_divisible_only_where_both_lengths_are() -> None:
    assert chosen(None, 1024)["IS_DIVISIBLE"] is True
    assert "IS_DIVISIBLE" not in chosen(None, 1000)
    q = OnGpu(2, 8, 128, 128)
    assert "IS_DIVISIBLE" not in options_for(q, 128, num_keys=1000)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("block_size", [16, 32, 64, 256, 1024])
def test_tiles_divide_the_blocks(block_size: int) -> None:
    """For blocks of less than 128, also those of the backward pass; the copy engine's are for blocks of 128."""
    got = chosen(None, block_size=block_size)
    assert set(got.values()) == ({block_size} if block_size < 128 else set())
    assert len(got) == (6 if block_size < 128 else 0)


# ------------------------------------------------------------------------------------------------ dense or sparse


def is_dense(
    num_queries: int,
    num_keys: int,
    config: ProxyConfig,
    heads: int = 32,
    batch: int = 1,
    capability: tuple[int, int] | None = (9, 0),
) -> bool:
    """What ``why_dense`` says of a shape, on a GPU of this capability, or on a CPU."""
    shapes = (batch, heads, num_queries, 128), (batch, 8, num_keys, 128)
    q, k = (OnGpu(*shape) if capability else torch.empty(1, dtype=torch.bfloat16).expand(shape) for shape in shapes)
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=capability):
        return flexproxy.why_dense(q, k, config) is not None


LENGTHS = [2**n for n in range(12, 18)]


def test_dense_for_short_and_sparse_for_long() -> None:
    """With the paper's settings and 32 heads: dense at 4K, sparse from some length on, and at 128K."""
    dense = [is_dense(n, n, ProxyConfig()) for n in LENGTHS]
    assert dense[0] is True
    assert dense[-1] is False
    assert dense == sorted(dense, reverse=True), "back to dense at a greater length"


@pytest.mark.parametrize("length", LENGTHS)
def test_dense_the_more_the_more_is_kept(length: int) -> None:
    """Monotone in the density and in min_budget: what is dense stays dense where more is kept."""
    by_density = [is_dense(length, length, ProxyConfig(density=d / 20, min_budget=0)) for d in range(1, 21)]
    assert by_density == sorted(by_density)
    assert by_density[-1] is True
    by_budget = [is_dense(length, length, ProxyConfig(min_budget=n)) for n in (0, *LENGTHS)]
    assert by_budget == sorted(by_budget)
    assert by_budget[-1] is True
    with_more_work = [is_dense(length, length, ProxyConfig(), batch=b) for b in (1, 2, 8, 64)]
    assert with_more_work == sorted(with_more_work, reverse=True)


def test_dense_by_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the edge: the work saved is just that of a build, or not."""
    config = ProxyConfig(min_budget=0, density=0.5)
    flops = 4 * 32 * 128 * 2**14 * 2**14 / 2 * (1 - SPARSE_COST * 0.5)
    for factor, dense in ((1.01, True), (0.99, False)):
        monkeypatch.setattr(planning, "HOST_MS", flops * factor / 600e9)
        assert is_dense(2**14, 2**14, config) is dense
    # A chunk of queries at the end of long keys does nearly the work of a rectangle.
    saved = 4 * 32 * 128 * 2**10 * 2**17 * (1 - 2**10 / 2**18) * (1 - SPARSE_COST * 0.5) * 0.99
    monkeypatch.setattr(planning, "HOST_MS", saved / 600e9)
    assert is_dense(2**10, 2**17, config) is False


def test_a_slower_gpu_is_sparse_from_shorter_prompts_on() -> None:
    config = ProxyConfig(min_budget=512, density=0.2)

    def first(capability: tuple[int, int]) -> int:
        return next(n for n in range(1024, 2**15, 1024) if not is_dense(n, n, config, capability=capability))

    assert first((8, 0)) < first((9, 0)) == first((12, 0))  # what nobody measured counts as the fastest


@pytest.mark.usefixtures("hopper")
def test_it_says_what_it_assumed() -> None:
    said = flexproxy.why_dense(
        OnGpu(1, 32, 4096, 128), OnGpu(1, 8, 4096, 128), ProxyConfig(density=0.2, min_budget=512)
    )
    assert said == (
        "an estimate would take longer than it saves (a host that is waited for, dense attention at 600 TFLOPS)"
    )


def test_on_a_cpu_only_lengths_and_settings_count() -> None:
    sparse = ProxyConfig(min_budget=0)
    for length in (128, 256, 4096):
        assert is_dense(length, length, sparse, capability=None) is False
        assert is_dense(length, length, ProxyConfig(gamma=1.0, min_budget=0), capability=None) is True
        assert is_dense(length, length, ProxyConfig(min_budget=4096), capability=None) is True
    for length, dense in ((3000, True), (4096, True), (8192, False)):
        assert is_dense(length, length, ProxyConfig(), capability=None) is dense, (
            "the estimate, and three blocks of four"
        )
    assert is_dense(4096, 4096, ProxyConfig(density=0.8, min_budget=0), capability=None) is True
    assert is_dense(127, 2**17, sparse, capability=None) is True
    assert is_dense(1, 2**17, sparse) is True


# ------------------------------------------------------------------------------------------------ memory


def free_memory(monkeypatch: pytest.MonkeyPatch, free: float, cached: float = 0.0) -> list[str]:
    asked: list[str] = []

    def mem_get_info(device: Any) -> tuple[int, int]:
        asked.append(str(device))
        return int(free * 2**30), 80 * 2**30

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int((1 + cached) * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return asked


def check_memory(q: Tensor, k: Tensor, config: ProxyConfig, gradients: bool) -> None:
    pipeline.check_memory(q, k, new_plan(q, k, config, 1.0, gradients))


def long(length: int) -> tuple[Any, Any]:
    return OnGpu(1, 32, length, 128), OnGpu(1, 8, length, 128)


def test_memory_that_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """1M tokens and 32 heads: 18 GiB of lists and map; the message names a block size that would fit."""
    q, k = long(2**20)
    need = 32 * (2**20 / 128) ** 2 * 9 / 2**30
    assert math.isclose(need, 18)
    for free, remedy in (
        (10.0, "use block_size=256"),
        (2.0, "use block_size=512"),
        (0.9, "use block_size=1024"),
        (0.1, "use a larger block_size than 128"),
    ):
        free_memory(monkeypatch, free)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            check_memory(q, k, ProxyConfig.paper(), False)
        message = str(caught.value)
        assert message.startswith("q, k: expected the BlockMask to fit in the memory that is free, ")
        assert f"{free:.1f} GiB of cuda:0" in message
        assert "Hq = 32, Sq = 1048576, Skv = 1048576, which need 18.1 GiB with blocks of 128" in message
        assert f"; {remedy}, or give fewer sequences" in message
        if "=" in remedy:  # and it does
            check_memory(q, k, ProxyConfig.paper(block_size=int(remedy.partition("=")[2])), False)


def test_memory_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch has cached counts as free; gradients need two more lists."""
    q, k = long(2**20)
    asked = free_memory(monkeypatch, 10.0, cached=9.0)
    check_memory(q, k, ProxyConfig.paper(), False)
    assert asked == ["cuda:0"]
    with pytest.raises(torch.OutOfMemoryError, match=r"34\.1 GiB"):
        check_memory(q, k, ProxyConfig.paper(), True)
    with pytest.raises(torch.OutOfMemoryError, match=r"35\.0 GiB"):  # two proxies, every query and key
        check_memory(q, k, outliers(num_proxies=2), True)


def test_small_masks_ask_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = free_memory(monkeypatch, 0.0)
    check_memory(*long(2**17), ProxyConfig(), False)  # 0.3 GiB
    meta = torch.empty(1, device="meta")
    check_memory(meta.expand(1, 32, 2**20, 128), meta.expand(1, 8, 2**20, 128), ProxyConfig(), False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_memory(*long(2**20), ProxyConfig(), False)
    assert asked == []
    assert checks.MEMORY_WORTH_ASKING == 2**30


# ------------------------------------------------------------------------------------------------ not compiled

NOT_COMPILED = """
import torch, flexproxy
from flexproxy import ProxyConfig
from tests.accuracy import allowed_pairs, assert_accurate
generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, heads, 300, 32, generator=generator) for heads in (4, 2, 2))
config = ProxyConfig(block_size=32, min_budget=0, gamma=0.5)
with torch.no_grad(), WITH:
    out = flexproxy.attention(q, k, v, config=config)
selection = flexproxy.select(q, k, config=config)
assert float(selection.density().max()) < 0.9
kept = allowed_pairs(selection, flexproxy.masks.causal, 300, 300, 32)
assert_accurate(out, q, k, v, kept)
try:
    assert_accurate(out, q, k, v, torch.ones(300, 300).tril().bool().expand(1, 4, -1, -1))
except AssertionError:
    print("sparse")
"""


@pytest.mark.parametrize("how", ["TORCHDYNAMO_DISABLE", "force_eager"])
def test_what_is_not_compiled_is_sparse_all_the_same(how: str) -> None:
    """Eager ``flex_attention`` does not look at lists: where compilation is off, membership is in the function."""
    if not cpu_kernel_exists() or not hasattr(torch.compiler, "set_stance"):
        pytest.skip("torch 2.6 and later")
    way = "torch.compiler.set_stance('force_eager')" if how == "force_eager" else "torch.no_grad()"
    environment = os.environ | ({how: "1"} if how.isupper() else {})
    done = subprocess.run(
        [sys.executable, "-c", NOT_COMPILED.replace("WITH", way)],
        capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["sparse"]
