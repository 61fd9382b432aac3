"""One annotated function is an operator: its schema, its calls, and what a compiler sees of it."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flexproxy
from flexproxy import ProxyConfig, masks
from flexproxy.ops import implementations, operators
from flexproxy.ops.operators import Size, operator
from tests.settings import outliers


class Pair(NamedTuple):
    """Two tensors, one of which may be missing, and a number."""

    x: Tensor
    y: Tensor | None = None
    number: int = 1

    def total(self) -> Tensor:
        return self.x if self.y is None else self.x + self.y


class Parts(NamedTuple):
    sums: Tensor
    length: Tensor


# The names begin with "mock_", so that they count for none of flexproxy's operators.
@operator(lambda a: [(a.pair.x.shape, torch.float64), ((a.size,), torch.int32)], has_kernel=False)
def mock_parts(
    members: Sequence[int],
    pair: Pair,
    size: Size,
    other: Tensor | None,
    scale: float = 2.0,
    limit: float | None = None,
    negative: bool = False,
) -> Parts:
    """Sums, scaled, and the numbers up to size."""
    total = pair.total().double() * scale * pair.number + sum(members)
    total = total if other is None else total + other
    total = total if limit is None else total.clamp(max=limit)
    return Parts(-total if negative else total, torch.arange(size, dtype=torch.int32))


@operator(lambda a: (a.x.shape[:1], a.x.dtype), has_kernel=False)
def mock_sum_of_rows(x: Tensor) -> Tensor:
    return x.sum(-1)


X = torch.arange(6.0).view(2, 3)


def schema(name: str) -> str:
    return str(getattr(torch.ops.flexproxy, name).default._schema)


def test_schema_follows_from_the_annotations() -> None:
    assert schema("mock_parts") == (
        "flexproxy::mock_parts(int[] members, Tensor pair_x, Tensor? pair_y, int pair_number, SymInt size, "
        "Tensor? other, float scale, float? limit, bool negative) -> (Tensor, Tensor)"
    )
    assert schema("mock_sum_of_rows") == "flexproxy::mock_sum_of_rows(Tensor x) -> Tensor"


CALLS: dict[str, Any] = {
    "in order": lambda x: mock_parts((1, 2), Pair(x, x, 3), x.shape[1], None, 2.0, None, False),
    "by keyword": lambda x: mock_parts(size=x.shape[1], other=x, pair=Pair(x), members=[4], limit=3.0),
    "defaults": lambda x: mock_parts((), Pair(x), x.shape[1], None),
    "both": lambda x: mock_parts([1], Pair(x, None), x.shape[1], other=x, negative=True),
    "one, by keyword": lambda x: mock_sum_of_rows(x=x),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str, traced: bool) -> None:
    """By order, by keyword and with defaults, eager and traced, with constant and open lengths: the same results."""

    call = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager", dynamic=True) if traced else CALLS[name]
    for x in (X, torch.randn(4, 5)):
        got = call(x)
        if name.startswith("one"):
            assert torch.equal(got, x.sum(-1))
            continue
        want = {
            "in order": lambda x: x.double() * 2 * 2 * 3 + 3,
            "by keyword": lambda x: (x.double() * 2 + 4 + x).clamp(max=3),
            "defaults": lambda x: x.double() * 2,
            "both": lambda x: -(x.double() * 2 + 1 + x),
        }[name](x)
        assert isinstance(got, Parts)
        torch.testing.assert_close(got.sums, want)
        assert got.length.tolist() == list(range(x.shape[1]))
    torch._dynamo.reset()


def test_torch_finds_nothing_wrong() -> None:
    """Its checks of schema, fake and tracing."""
    for flat in (((4,), X, None, 1, 3, X, 2.0, None, False), ((), X, X, 2, 0, None, 1.0, 3.0, True)):
        torch.library.opcheck(torch.ops.flexproxy.mock_parts.default, flat)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "missing a required argument: 'x'"),
        ((X, X), {}, "too many positional arguments"),
        ((X,), {"x": X}, "multiple values for argument 'x'"),
        ((), {"x": X, "z": 1}, "unexpected keyword argument 'z'"),
    ],
)
def test_wrong_calls(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        mock_sum_of_rows(*args, **kwargs)


def test_every_operator_takes_keywords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operator of the package, called by the names of its parameters, gives what it gives otherwise."""
    if torch.__version__ < "2.6":
        pytest.skip("torch 2.5 makes a BlockMask with blocks of 128 alone")
    q, k = torch.randn(1, 4, 70, 16), torch.randn(1, 2, 70, 16)
    settings: dict[str, Any] = {"block_size": 16, "min_budget": 0, "stride": 2}
    calls: dict[str, Any] = {
        "default": (masks.causal, ProxyConfig(gamma=0.8, **settings)),
        "documents": (masks.and_masks(masks.causal, masks.document(torch.arange(70) // 40)), ProxyConfig(**settings)),
        "outliers": (masks.causal, outliers(density=0.5, **settings)),
        "rows": (masks.causal, ProxyConfig(sharing="rows", **settings)),
    }

    def everything() -> list[Tensor]:
        found = []
        for mask_mod, config in calls.values():
            selection = flexproxy.select(q, k, mask_mod=mask_mod, config=config)
            found += [selection.rank, selection.count, selection.block_mask().kv_indices]
        config = calls["default"][1]
        listed = create_block_mask(masks.causal, 1, 1, 70, 70, device="cpu", BLOCK_SIZE=16)
        found.append(flexproxy.select(q, k, block_mask=listed, config=config).rank)
        return found

    by_order = everything()
    called = set()
    in_order = operators._Form.in_order

    def by_keyword(form: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        called.add(form.name)
        return in_order(form, (), dict(zip(form.names, args, strict=False)) | kwargs)

    monkeypatch.setattr(operators._Form, "in_order", by_keyword)
    assert all(torch.equal(got, want) for got, want in zip(everything(), by_order, strict=True))
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("flexproxy::")}
    assert called == {name for name in names if not name.startswith("mock_")} - {"_clone"}  # traced alone


def test_wrong_annotations() -> None:
    """What no schema can say is an error where the operator is made, and names the parameter."""

    def of_text(x: Tensor, text: str) -> Tensor:
        return x

    def of_no_tensor(number: int) -> Tensor:
        return torch.zeros(number)

    with pytest.raises(TypeError, match=r"of_text: text: expected the annotation Tensor, .* got <class 'str'>"):
        operator(lambda a: (a.x.shape, a.x.dtype))(of_text)
    with pytest.raises(TypeError, match="of_no_tensor: expected a parameter that is a Tensor"):
        operator(lambda a: ((a.number,), torch.float32))(of_no_tensor)


def test_a_kernel_takes_the_place_of_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all arguments in order, NamedTuples whole; the place of the first tensor decides."""
    given: list[Any] = []

    def launcher(*args: Any) -> Parts:
        given.append(args)
        return Parts(args[1].x, args[1].x)

    asked: list[Any] = []

    def picked(device: torch.device) -> str:
        asked.append(device)
        return "triton"

    with_kernel: Any = operator(lambda a: [(a.pair.x.shape, torch.float32)] * 2)(_renamed())
    monkeypatch.setattr(implementations, "picked", picked)
    monkeypatch.setattr(operators, "kernels", lambda: types.SimpleNamespace(OPERATORS={"mock_launched": launcher}))
    pair = Pair(X)
    assert with_kernel(2, pair=pair).sums is X
    assert given == [(2, pair, 7)]
    assert asked == [X.device]


def _renamed() -> Any:
    def mock_launched(n: int, pair: Pair, last: int = 7) -> Parts:
        raise AssertionError

    return mock_launched
