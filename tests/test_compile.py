"""Under torch.compile: the same masks as eager, no recompilation for new values, no wait for the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

import flexproxy
from flexproxy import ProxyConfig, masks, reference
from flexproxy.masks import and_masks, or_masks, sampled
from flexproxy.masks.structure import MaskMod
from flexproxy.ops import compat
from flexproxy.stages import documents
from tests.accuracy import assert_accurate, skip_unless_flex_compiles

BATCH, HEADS, KV_HEADS, LENGTH, HEAD_DIM, BLOCK = 2, 4, 2, 300, 32, 64
CONFIG = ProxyConfig.paper(num_proxies=KV_HEADS, gamma=0.6, min_budget=0, block_size=BLOCK)
OUTLIERS = replace(CONFIG, stride=1, query_stride=8, query_choice="outlier")
ROWS = replace(CONFIG, num_proxies=HEADS, query_stride=16, sharing="rows")

Lists = tuple[Tensor, Tensor, Tensor, Tensor]
Arguments = dict[str, Any]


class Inputs(NamedTuple):
    """What changes from call to call, all of it in tensors."""

    q: Tensor  # [B, Hq, Sq, D]
    k: Tensor  # [B, Hkv, Skv, D]
    v: Tensor  # [B, Hkv, Skv, D]
    document_ids: Tensor  # [B, Skv]
    attention_mask: Tensor  # [B, Skv]
    prefix_lengths: Tensor  # [B]
    window: Tensor  # []
    offset: Tensor  # [], Skv - Sq
    offsets: Tensor  # [B]
    local_heads: Tensor  # bool [Hq]


def make_inputs(device: str, seed: int = 0, num_queries: int = LENGTH, num_keys: int = LENGTH) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def integer(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    real = torch.arange(num_keys) >= integer(0, num_keys // 3, BATCH, 1)
    values = Inputs(
        q=2 * normal(BATCH, HEADS, num_queries, HEAD_DIM),
        k=normal(BATCH, KV_HEADS, num_keys, HEAD_DIM),
        v=normal(BATCH, KV_HEADS, num_keys, HEAD_DIM),
        document_ids=integer(0, 3, BATCH, num_keys).sort(-1).values,
        attention_mask=real.to(torch.int32),
        prefix_lengths=integer(1, num_keys, BATCH),
        window=integer(60, 200),
        offset=torch.full((), num_keys - num_queries),
        offsets=torch.tensor([num_keys - num_queries, max(0, num_keys - num_queries - 90 + seed)]),
        local_heads=integer(0, 2, HEADS).bool() | (torch.arange(HEADS) == seed % HEADS),
    )
    return Inputs(*(x.to(device) for x in values))


def short_inputs(device: str, seed: int = 0) -> Inputs:
    """Fewer queries than keys."""
    return make_inputs(device, seed, LENGTH - 130, LENGTH)


def closure(x: Inputs) -> Arguments:
    return {"mask_mod": lambda b, h, q, kv: (q >= kv) & ((q - kv) % 3 != 1)}


def closure_of_tensors(x: Inputs) -> Arguments:
    lengths, local = x.prefix_lengths, x.local_heads

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & ((q_idx - kv_idx < 70) | ~local[h] | (kv_idx < lengths[b]))

    return {"mask_mod": mask_mod}


def classified(x: Inputs) -> Arguments:
    length, device = x.q.shape[2], x.q.device.type
    mask_mod = and_masks(masks.causal, masks.document(x.document_ids))
    block_mask = create_block_mask(mask_mod, BATCH, None, length, length, device=device, BLOCK_SIZE=BLOCK)
    if tuple(block_mask.BLOCK_SIZE) != (BLOCK, BLOCK):
        pytest.skip("this torch's create_block_mask makes no blocks of 64")
    return {"block_mask": block_mask}


class Kind(NamedTuple):
    """A way to call flexproxy, and inputs to call it with."""

    arguments: Callable[[Inputs], Arguments]
    inputs: Callable[[str, int], Inputs] = make_inputs


KINDS: dict[str, Kind] = {
    "default": Kind(lambda x: {}),
    "default, fewer queries": Kind(lambda x: {}, short_inputs),
    "documents": Kind(lambda x: {"mask_mod": and_masks(masks.causal, masks.document(x.document_ids))}),
    "padding": Kind(lambda x: {"mask_mod": and_masks(masks.causal, masks.padding(x.attention_mask))}),
    "window": Kind(lambda x: {"mask_mod": masks.sliding_window(x.window)}),
    "window, an int": Kind(lambda x: {"mask_mod": masks.sliding_window(100)}),
    "prefix": Kind(lambda x: {"mask_mod": masks.prefix_lm(x.prefix_lengths)}),
    "window or prefix": Kind(
        lambda x: {"mask_mod": or_masks(masks.sliding_window(x.window), masks.prefix_lm(x.prefix_lengths))}
    ),
    "shift": Kind(
        lambda x: {"mask_mod": masks.shift(and_masks(masks.causal, masks.document(x.document_ids)), x.offset)},
        short_inputs,
    ),
    "shift of each sequence": Kind(lambda x: {"mask_mod": masks.shift(masks.causal, x.offsets)}, short_inputs),
    "parts shifted": Kind(
        lambda x: {"mask_mod": and_masks(masks.shift(masks.causal, x.offsets), masks.padding(x.attention_mask))},
        short_inputs,
    ),
    "not shifted": Kind(
        lambda x: {"mask_mod": and_masks(masks.full, masks.document(x.document_ids))},
        short_inputs,
    ),
    "shifts that agree": Kind(
        lambda x: {
            "mask_mod": and_masks(*(masks.shift(masks.full, n) for n in (x.offset, x.offset.expand(BATCH), 130)))
        },
        short_inputs,
    ),
    "shifts that differ": Kind(
        lambda x: {"mask_mod": and_masks(masks.shift(masks.prefix_lm(x.prefix_lengths), x.offsets), masks.causal)},
        short_inputs,
    ),
    "torch's combinators": Kind(
        lambda x: {"mask_mod": flex.and_masks(masks.causal, flex.or_masks(masks.causal, masks.full))}
    ),
    "of a function of ours": Kind(
        lambda x: {"mask_mod": and_masks(masks.shift(masks.causal, x.offsets), lambda b, h, q, kv: (q - kv) % 3 != 1)},
        short_inputs,
    ),
    "full": Kind(lambda x: {"mask_mod": masks.full}),
    "closure": Kind(closure),
    "closure of tensors": Kind(closure_of_tensors),
    "classified": Kind(classified),
    "density": Kind(
        lambda x: {"config": ProxyConfig.paper(num_proxies=KV_HEADS, density=0.5, min_budget=0, block_size=BLOCK)}
    ),
    "groups": Kind(
        lambda x: {"config": ProxyConfig.paper(groups=[0, 1, 1, 0], gamma=0.6, min_budget=0, block_size=BLOCK)}
    ),
    "budgets": Kind(
        lambda x: {
            "config": ProxyConfig.paper(
                gamma=0.6, min_budget=64, max_budget=256, sink_blocks=1, block_size=BLOCK, stride=8
            )
        }
    ),
    "another scale": Kind(lambda x: {"config": CONFIG, "scale": 0.25}),
    "outliers": Kind(lambda x: {"config": OUTLIERS}),
    "outliers, documents": Kind(lambda x: {"config": OUTLIERS, **KINDS["documents"].arguments(x)}),
    "rows": Kind(lambda x: {"config": ROWS}),
    "rows, closure of tensors": Kind(
        lambda x: {"config": replace(ROWS, density=0.4), **KINDS["closure of tensors"].arguments(x)}
    ),
    "outliers, closure of tensors": Kind(lambda x: {"config": OUTLIERS, **KINDS["closure of tensors"].arguments(x)}),
}

# create_block_mask of a mask made inside is not something that every dynamo traces.
MADE_INSIDE = sorted(KINDS.keys() - {"classified"})
# Kinds that take another way each; those with fewer queries have only one length.
LENGTHS = ["default", "window", "documents", "density"]


def complete(arguments: Arguments) -> Arguments:
    return {"config": CONFIG, **arguments}


def lists_of(mask: BlockMask) -> Lists:
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    return mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices


def attend(x: Inputs, arguments: Arguments) -> tuple[Tensor, Tensor, Lists]:
    """``build`` and ``flex_attention``, then ``attention``: the outputs of both, and the lists."""
    arguments = complete(arguments)
    mask = flexproxy.build(x.q, x.k, **arguments)
    scale = arguments.get("scale")
    out: Tensor = flex_attention(x.q, x.k, x.v, block_mask=mask, scale=scale, enable_gqa=True)
    in_one_call = flexproxy.attention(x.q, x.k, x.v, **arguments, when="always")
    assert isinstance(in_one_call, Tensor)
    return out, in_one_call, lists_of(mask)


def check_equals_eager(result: tuple[Tensor, Tensor, Lists], x: Inputs, arguments: Arguments) -> None:
    *outs, lists = result
    check_lists(lists, x, arguments)
    mask = flexproxy.build(x.q, x.k, **complete(arguments))
    for out in outs:
        check_output(out, x, mask, arguments.get("scale"))


def check_lists(lists: Lists, x: Inputs, arguments: Arguments) -> None:
    arguments = complete(arguments)
    assert flexproxy.select(x.q, x.k, **arguments).density().mean() < 1, "nothing was left out, so nothing is shown"
    for ours, eager in zip(lists, lists_of(flexproxy.build(x.q, x.k, **arguments)), strict=True):
        assert torch.equal(ours, eager)


def check_output(out: Tensor, x: Inputs, mask: BlockMask, scale: float | None = None) -> None:
    """The output is dense attention under the mask. Eager ``flex_attention`` says the same, but compiles each mask."""
    num_queries, num_keys = x.q.shape[2], x.k.shape[2]
    allowed = reference.token_mask(mask.mask_mod, BATCH, HEADS, num_queries, num_keys, x.q.device.type)
    assert_accurate(out, x.q, x.k, x.v, allowed, scale)


class CountingBackend:
    """Runs a graph as it is, and counts the graphs."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    @property
    def count(self) -> int:
        return len(self.graphs)


@functools.cache
def dynamo_traces_functions_with_attributes() -> bool:
    """Whether this torch can compile code that gives a function an attribute, as our masks do (2.5 cannot)."""

    def with_attribute(x: Tensor) -> Tensor:
        def inner() -> Tensor:
            return x

        inner.structure = 1  # type: ignore[attr-defined]
        return inner() + inner.structure  # type: ignore[attr-defined,no-any-return]

    try:
        torch.compile(with_attribute, fullgraph=True, backend="eager")(torch.zeros(1))
    except torch._dynamo.exc.TorchDynamoException:
        return False
    finally:
        torch._dynamo.reset()
    return True


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with compat.many_lengths():
        yield
    torch._dynamo.reset()


@pytest.fixture
def needs_dynamo() -> None:
    if not dynamo_traces_functions_with_attributes():
        pytest.skip("this torch's dynamo cannot trace masks")


# ------------------------------------------------------------------------------------------------ equal to eager


@pytest.mark.usefixtures("needs_dynamo")
@pytest.mark.parametrize("name", MADE_INSIDE)
def test_masks_made_inside(name: str, device: str) -> None:
    kind = KINDS[name]
    x = kind.inputs(device, 0)
    compiled = torch.compile(lambda x: attend(x, kind.arguments(x)), fullgraph=True, backend="aot_eager")
    check_equals_eager(compiled(x), x, kind.arguments(x))


@pytest.mark.usefixtures("needs_dynamo")
@pytest.mark.parametrize("name", sorted(KINDS))
def test_masks_made_outside(name: str, device: str) -> None:
    x = KINDS[name].inputs(device, 0)
    arguments = KINDS[name].arguments(x)
    compiled = torch.compile(lambda x: attend(x, arguments), fullgraph=True, backend="eager")
    check_equals_eager(compiled(x), x, arguments)


@pytest.mark.usefixtures("needs_dynamo")
@pytest.mark.parametrize("inside", [False, True])
def test_a_traced_nest_is_not_evaluated(inside: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What combined masks know of their blocks is known in a trace."""
    x = short_inputs(device)

    def nest() -> MaskMod:
        left, right = masks.document(x.document_ids), masks.padding(x.attention_mask)
        either = or_masks(masks.sliding_window(x.window), masks.prefix_lm(x.prefix_lengths))
        return masks.shift(and_masks(masks.causal, and_masks(left, right), either), x.offsets)

    def never(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("a token was evaluated")

    wanted = flexproxy.build(x.q, x.k, mask_mod=nest(), config=CONFIG)
    made = nest()
    monkeypatch.setattr(sampled, "create_mask", never)

    def build() -> Lists:
        return lists_of(flexproxy.build(x.q, x.k, mask_mod=nest() if inside else made, config=CONFIG))

    got = torch.compile(build, fullgraph=True, backend="eager")()
    for ours, eager in zip(got, lists_of(wanted), strict=True):
        assert torch.equal(ours, eager)


ON_CPU = ["default, fewer queries", "documents", "closure of tensors"]  # about ten seconds each


@pytest.mark.slow
@pytest.mark.usefixtures("needs_dynamo")
@pytest.mark.parametrize("name", MADE_INSIDE)
def test_inductor(name: str, device: str) -> None:
    skip_unless_flex_compiles(device)
    if device == "cpu" and name not in ON_CPU:
        pytest.skip("on a GPU only, to save time")
    kind = KINDS[name]
    x = kind.inputs(device, 0)
    dynamic = False if device == "cpu" else None
    compiled = torch.compile(lambda x: attend(x, kind.arguments(x)), fullgraph=True, dynamic=dynamic)
    check_equals_eager(compiled(x), x, kind.arguments(x))


@pytest.mark.usefixtures("needs_dynamo")
@pytest.mark.parametrize("name", ["default", "documents", "closure of tensors"])
def test_a_compiled_build_returns_the_mask(name: str, device: str) -> None:
    x = KINDS[name].inputs(device, 0)
    arguments = complete(KINDS[name].arguments(x))
    mask = torch.compile(flexproxy.build, fullgraph=True, backend="aot_eager")(x.q, x.k, **arguments)
    assert isinstance(mask, BlockMask)
    eager = flexproxy.build(x.q, x.k, **arguments)
    for ours, wanted in zip(lists_of(mask), lists_of(eager), strict=True):
        assert torch.equal(ours, wanted)
    check_output(flex_attention(x.q, x.k, x.v, block_mask=mask, enable_gqa=True), x, mask)
    allowed = [reference.token_mask(m.mask_mod, BATCH, HEADS, LENGTH, LENGTH, device) for m in (mask, eager)]
    assert torch.equal(*allowed)


@pytest.mark.usefixtures("needs_dynamo")
def test_a_compiled_select_returns_the_selection(device: str) -> None:
    x = make_inputs(device)

    def selected(x: Inputs) -> tuple[Tensor, ...]:
        selection = flexproxy.select(x.q, x.k, config=CONFIG)
        return selection.rank, selection.count, selection.proxy_of, selection.block_map(), selection.density()

    for ours, eager in zip(torch.compile(selected, fullgraph=True, backend="eager")(x), selected(x), strict=True):
        assert ours.dtype == eager.dtype
        assert torch.equal(ours, eager)


@pytest.mark.usefixtures("needs_dynamo")
@pytest.mark.parametrize("name", ["default", "default, fewer queries", "documents", "closure of tensors", "classified"])
@pytest.mark.parametrize("num_queries", [None, 1])
def test_dense_where_sparse_cannot_pay(name: str, num_queries: int | None, device: str) -> None:
    """``attention`` of a short sequence, and of one query, as in decoding."""
    kind = KINDS[name]
    x = kind.inputs(device, 0)
    if num_queries is not None:
        if name == "classified":
            pytest.skip("its mask is for all queries")
        x = x._replace(q=x.q[:, :, -num_queries:])
    arguments = {"config": ProxyConfig(block_size=BLOCK), **kind.arguments(x)}
    out = torch.compile(lambda x: flexproxy.attention(x.q, x.k, x.v, **arguments), fullgraph=True, backend="eager")(x)
    mask_mod = arguments["block_mask"].mask_mod if "block_mask" in arguments else arguments.get("mask_mod")
    if mask_mod is None:
        mask_mod = masks.shift(masks.causal, x.k.shape[2] - x.q.shape[2])
    allowed = reference.token_mask(mask_mod, BATCH, HEADS, x.q.shape[2], x.k.shape[2], device)
    assert_accurate(out, x.q, x.k, x.v, allowed)


@pytest.mark.usefixtures("needs_dynamo")
def test_the_choice_of_a_backend_is_traced() -> None:
    """Where FLASH is a choice, a compiled ``attention`` asks whether it is there: an answer of the trace's time."""
    compat._flash_backend_exists.cache_clear()
    traced = torch.compile(lambda x: x + compat.flash_backend_exists(), fullgraph=True, backend="eager")
    assert int(traced(torch.zeros(()))) == compat.flash_backend_exists()


@pytest.mark.usefixtures("needs_dynamo")
def test_errors_name_the_argument_when_compiling(device: str) -> None:
    """A mistake is told while tracing, too, and told as itself."""
    x = make_inputs(device)
    compiled = torch.compile(lambda x: flexproxy.build(x.q, x.k[..., :16], config=CONFIG), backend="eager")
    with pytest.raises(ValueError, match="k: expected the head dimension"):
        compiled(x)


# ------------------------------------------------------------------------------------------------ recompilation


def ten_calls(kind: Kind, device: str) -> list[Inputs]:
    return [kind.inputs(device, seed) for seed in range(10)]


@pytest.mark.usefixtures("needs_dynamo")
@pytest.mark.parametrize("name", MADE_INSIDE)
def test_new_values_do_not_recompile(name: str, device: str) -> None:
    kind, backend = KINDS[name], CountingBackend()
    compiled = torch.compile(lambda x: attend(x, kind.arguments(x)), fullgraph=True, backend=backend)
    for x in ten_calls(kind, device):
        result = compiled(x)
    check_equals_eager(result, x, kind.arguments(x))
    assert backend.count == 1


@pytest.mark.usefixtures("needs_dynamo")
@pytest.mark.parametrize("name", sorted(KINDS))
def test_new_masks_do_not_recompile(name: str, device: str) -> None:
    """Masks made anew outside, as arguments: other functions with the same code."""
    kind, backend = KINDS[name], CountingBackend()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for x in ten_calls(kind, device):
        arguments = kind.arguments(x)
        result = compiled(x, arguments)
    check_equals_eager(result, x, arguments)
    assert backend.count == 1


@pytest.mark.parametrize("name", sorted(KINDS))
def test_new_block_masks_do_not_recompile_flex_attention(name: str, device: str) -> None:
    """The call that README shows: ``build`` eager, ``flex_attention`` compiled."""
    kind, backend = KINDS[name], CountingBackend()
    compiled = torch.compile(flex_attention, fullgraph=True, backend=backend)
    for x in ten_calls(kind, device):
        mask = flexproxy.build(x.q, x.k, **complete(kind.arguments(x)))
        out = compiled(x.q, x.k, x.v, block_mask=mask, enable_gqa=True)
    check_output(out, x, mask)
    assert backend.count == 1


@pytest.mark.usefixtures("needs_dynamo")
def test_planted_python_values_do_recompile(device: str) -> None:
    """What the tests above would see: a window that is a new int in every call."""
    backend = CountingBackend()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for window, x in enumerate(ten_calls(KINDS["window"], device), 60):
        compiled(x, {"mask_mod": masks.sliding_window(window)})
    assert backend.count > 1


NEW_LENGTHS = (300, 420, 555)


@pytest.mark.usefixtures("needs_dynamo")
@pytest.mark.parametrize("name", LENGTHS)
def test_new_lengths_recompile_once(name: str, device: str) -> None:
    """A new length brings one more compilation at most: dynamic shapes, or another number of pieces to evaluate."""
    kind, backend = KINDS[name], CountingBackend()

    def build_and_attend(x: Inputs) -> tuple[Tensor, Lists]:
        arguments = complete(kind.arguments(x))
        lists = lists_of(flexproxy.build(x.q, x.k, **arguments))
        if name != "default":  # slow to trace
            return x.v, lists
        out = flexproxy.attention(x.q, x.k, x.v, **arguments, when="always")
        return out, lists

    compiled = torch.compile(build_and_attend, fullgraph=True, backend=backend)
    counts = []
    for length in NEW_LENGTHS:
        for seed in range(2):
            x = make_inputs(device, seed, length, length)
            out, lists = compiled(x)
            check_lists(lists, x, kind.arguments(x))
            if name == "default":
                check_output(out, x, flexproxy.build(x.q, x.k, config=CONFIG))
        counts.append(backend.count)
    assert counts[0] == 1
    assert all(0 <= more - fewer <= 1 for fewer, more in pairwise(counts))
    assert counts[-1] <= 2


@pytest.mark.parametrize("name", LENGTHS)
def test_new_lengths_recompile_flex_attention_once(name: str, device: str) -> None:
    kind, backend = KINDS[name], CountingBackend()
    compiled = torch.compile(flex_attention, fullgraph=True, backend=backend)
    counts = []
    for length in NEW_LENGTHS:
        for seed in range(2):
            x = make_inputs(device, seed, length, length)
            mask = flexproxy.build(x.q, x.k, **complete(kind.arguments(x)))
            out = compiled(x.q, x.k, x.v, block_mask=mask, enable_gqa=True)
            check_output(out, x, mask)
        counts.append(backend.count)
    assert counts[0] == 1
    assert counts[1:] in ([1, 1], [2, 2])


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_attention_compiles_once_for_each_length(device: str) -> None:
    """On a CPU where a mask is given; on a GPU the second length brings dynamic shapes, and there is no third time."""
    skip_unless_flex_compiles(device)
    torch._dynamo.utils.counters.clear()
    counts = []
    for length in NEW_LENGTHS:
        for seed in range(3):
            x = make_inputs(device, seed, length, length)
            out = flexproxy.attention(x.q, x.k, x.v, mask_mod=masks.causal, config=CONFIG, when="always")
            assert isinstance(out, Tensor)
            check_output(out, x, flexproxy.build(x.q, x.k, mask_mod=masks.causal, config=CONFIG))
        counts.append(compilations())
    assert counts == [1, 2, 3] if device == "cpu" else counts in ([1, 1, 1], [1, 2, 2])


# ------------------------------------------------------------------------------------------------ operators


class RecordingBackend:
    """Runs a graph, and keeps the arguments of every flexproxy operator in it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        calls = self.calls

        class Recorder(torch.fx.Interpreter):
            def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if "flexproxy" in str(target):
                    calls.append((target, args, kwargs))
                return super().call_function(target, args, kwargs)

        return lambda *args: Recorder(graph).run(*args)


def operators() -> set[str]:
    """All of the package; those of tests begin with "mock_"."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("flexproxy::")}
    return {name for name in names if not name.startswith("mock_")}


def signature(args: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(f"{x.dtype}{x.dim()}" if isinstance(x, Tensor) else type(x).__name__ for x in args)


@pytest.mark.slow
@pytest.mark.usefixtures("needs_dynamo")
def test_operators(device: str) -> None:
    """torch's own checks of schema, fake implementation and tracing, on what the kinds of call give each operator."""
    backend = RecordingBackend()
    names = ("default", "documents", "prefix", "closure of tensors", "density", "groups", "rows", "outliers, documents")
    for kind in (KINDS[name] for name in names):
        x = kind.inputs(device, 0)
        torch._dynamo.reset()
        torch.compile(lambda x, kind=kind: attend(x, kind.arguments(x)), fullgraph=True, backend=backend)(x)
    x = KINDS["default"].inputs(device, 0)
    every = ProxyConfig(gamma=1.0)

    def dense(x: Inputs) -> object:
        return flexproxy.attention(x.q, x.k, x.v, mask_mod=masks.causal, config=every)

    torch.compile(dense, fullgraph=True, backend=backend)(x)
    torch.compile(lambda x: flexproxy.select(x.q, x.k).block_map(), fullgraph=True, backend=backend)(x)
    listed = create_block_mask(masks.causal, 1, 1, LENGTH, LENGTH, device=device)
    torch.compile(lambda x: flexproxy.select(x.q, x.k, block_mask=listed).rank, fullgraph=True, backend=backend)(x)
    different = {(str(target), signature(args)): (target, args, kwargs) for target, args, kwargs in backend.calls}
    assert {name.split(".")[1] for name, _ in different} == operators()
    for target, args, kwargs in different.values():
        torch.library.opcheck(target, args, kwargs)


# ------------------------------------------------------------------------------------------------ no host reads


class NoHostReads(TorchDispatchMode):
    """Fails where a GPU would make the host wait: values read, and shapes that hang on values."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique", "bincount")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__.split(".")[0]
        reads = name.startswith(self.READS)
        if name == "index" or name.startswith("index_put"):  # by a map of bools: as many elements as are true
            reads = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
        assert not reads, f"the host waits for {func}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_build_reads_no_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "may_look", lambda x: False)  # as on a GPU
    x = KINDS[name].inputs("cpu", 0)
    arguments = complete(KINDS[name].arguments(x))
    with NoHostReads():
        flexproxy.build(x.q, x.k, **arguments)


def test_planted_host_reads_are_seen() -> None:
    x = make_inputs("cpu").document_ids
    reads: list[Callable[[], object]] = [
        lambda: x.max().item(),
        lambda: bool(x.any()),
        lambda: int(x[0, 0]),
        lambda: x[x > 0],
        lambda: x.unique(),
        lambda: x.nonzero(),
        lambda: torch.equal(x, x),
        lambda: x.masked_select(x > 0),
    ]
    for read in reads:
        with NoHostReads(), pytest.raises(AssertionError, match="the host waits"):
            read()


@pytest.fixture
def sync_is_an_error() -> Iterator[Callable[[], None]]:
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])


@on_gpu
@pytest.mark.parametrize("name", sorted(KINDS))
def test_build_never_waits_for_the_gpu(name: str, device: str, sync_is_an_error: Callable[[], None]) -> None:
    kind = KINDS[name]
    x = kind.inputs(device, 0)
    given = kind.arguments(x) if name == "classified" else None  # create_block_mask is the caller's, and not ours
    flexproxy.build(x.q, x.k, **complete(kind.arguments(x)))
    x = kind.inputs(device, 1)
    torch.cuda.synchronize()
    sync_is_an_error()
    for _ in range(2):  # captured, and replayed
        mask = flexproxy.build(x.q, x.k, **complete(kind.arguments(x) if given is None else given))
    flex_attention_lists = lists_of(mask)
    torch.cuda.set_sync_debug_mode("default")
    assert all(t.is_cuda for t in flex_attention_lists)


@on_gpu
def test_attention_never_waits_for_the_gpu(device: str, sync_is_an_error: Callable[[], None]) -> None:
    x = make_inputs(device)
    flexproxy.attention(x.q, x.k, x.v, config=CONFIG, when="always")
    torch.cuda.synchronize()
    sync_is_an_error()
    for _ in range(2):  # captured, and replayed
        flexproxy.attention(x.q, x.k, x.v, config=CONFIG, when="always")


@on_gpu
def test_planted_host_read_is_seen_on_the_gpu(device: str, sync_is_an_error: Callable[[], None]) -> None:
    x = make_inputs(device)
    sync_is_an_error()
    with pytest.raises(RuntimeError, match="synchron"):
        x.document_ids.max().item()


@on_gpu
@pytest.mark.parametrize("name", MADE_INSIDE)
def test_build_in_a_cuda_graph(name: str, device: str) -> None:
    """Captured once, then replayed with new values: what a fresh build gives."""
    kind = KINDS[name]
    x = kind.inputs(device, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            flexproxy.build(x.q, x.k, **complete(kind.arguments(x)))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = lists_of(flexproxy.build(x.q, x.k, **complete(kind.arguments(x))))
    for seed in range(1, 4):
        fresh = kind.inputs(device, seed)
        for static, value in zip(x, fresh, strict=True):
            static.copy_(value)
        graph.replay()
        wanted = lists_of(flexproxy.build(fresh.q, fresh.k, **complete(kind.arguments(fresh))))
        for ours, eager in zip(captured, wanted, strict=True):
            assert torch.equal(ours, eager)
