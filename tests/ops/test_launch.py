"""The direct way to start a kernel again: taken for what was compiled, and for nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton: Any = pytest.importorskip("triton")
launching: Any = importlib.import_module("flexproxy.ops.kernels.launch")
JITFunction: Any = importlib.import_module("triton.runtime.jit").JITFunction


class Compiled:
    """What a launch returns; notes the direct ones."""

    def __init__(self, log: list[Any]) -> None:
        self.function, self.packed_metadata, self.log = object(), object(), log

    def run(self, *arguments: Any) -> None:
        self.log.append(("direct", self, arguments))


OPTIONS = {"warps", "stages", "registers"}
NAMES = ("x", "y", "z", "x_stride_b", "x_stride_h", "y_stride_b", "number", "other", "SIZE", "FLAG")


class Kernel(JITFunction):  # type: ignore[misc]
    """A kernel that is not compiled; notes the ordinary launches."""

    def __init__(self, log: list[Any], names: tuple[str, ...] = NAMES) -> None:
        self.fn, self.log, self.arg_names, self.__name__ = object(), log, names, "kernel"

    def __getitem__(self, grid: Any) -> Any:
        def ordinary(*arguments: Any, **options: Any) -> Compiled:
            self.log.append(("ordinary", grid, arguments, options))
            return Compiled(self.log)

        return ordinary


class Gpu:
    def __init__(self) -> None:
        self.device = 0

    def stream(self, device: int) -> tuple[str, int]:
        return "stream of", device


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=gpu.stream))
    monkeypatch.setattr(launching, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=driver)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpu.device)
    monkeypatch.setattr(launching, "_cached", {})
    monkeypatch.setattr(launching, "_layouts", {})
    monkeypatch.setattr(launching, "_DIRECT", True)
    return gpu


def aligned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    number = torch.Size(shape).numel()
    x = torch.zeros(number + 16, dtype=dtype)
    start = (-x.data_ptr() % 16) // x.element_size()
    return x[start : start + number].view(shape)


def descriptor(dtype: torch.dtype = torch.float16, block: tuple[int, ...] = (1, 64)) -> Any:
    return SimpleNamespace(base=torch.zeros(4, dtype=dtype), block_shape=list(block))


def arguments(**changes: Any) -> dict[str, Any]:
    given = {"x": aligned(3, 4), "y": None, "z": descriptor(), "number": 5, "other": 0.5, "SIZE": 64, "FLAG": True}
    return {**given, **changes}


def start(kernel: Any, grid: tuple[int, int, int] = (7, 2, 1), launch: Any = launching.launch, **given: Any) -> None:
    options = launching.Options(**{"warps": 8, "stages": 2} | {n: given.pop(n) for n in OPTIONS & given.keys()})
    launch(kernel, grid, options, **given)


def test_the_second_launch_is_direct(gpu: Gpu) -> None:
    """With other tensors and another grid too, and all arguments in their order, strides among them."""
    log: list[Any] = []
    kernel = Kernel(log)
    first = arguments()
    start(kernel, **first)
    numbers = (4, 1, 0, 5, 0.5, 64, True)
    pointers = (first["x"], first["y"], first["z"])
    assert log == [("ordinary", (7, 2, 1), (*pointers, *numbers), {"num_warps": 8, "num_stages": 2})]
    second = dict(reversed(arguments().items()))  # the order of names says nothing
    start(kernel, (3, 1, 4), **second)
    kind, compiled, given = log[1]
    assert kind == "direct"
    assert given[:3] == (3, 1, 4)
    assert given[3] == ("stream of", 0)
    assert given[4] is compiled.function
    assert given[5] is compiled.packed_metadata
    assert given[6:9] == (None, None, None)
    assert all(x is y for x, y in zip(given[9:12], (second[name] for name in "xyz"), strict=True))
    assert given[12:] == numbers


@pytest.mark.parametrize("described", [False, True])
def test_the_same_launch_again(described: bool, gpu: Gpu) -> None:
    """With other tensors for the first two pointers, or a descriptor of the second; all else stays."""

    class Descriptor(SimpleNamespace):
        def __init__(self, base: Tensor, shape: list[int], strides: list[int], block: list[int]) -> None:
            super().__init__(base=base, shape=shape, strides=strides, block_shape=block)

    def second() -> Any:
        k = aligned(8, 2)
        return Descriptor(k, [8, 2], [2, 1], [4, 2]) if described else k

    log: list[Any] = []
    kernel, given = Kernel(log), arguments(y=second())
    assert launching.launch(kernel, (7, 2, 1), **given) is None
    launched = launching.launch(kernel, (7, 2, 1), **given)
    q, k = aligned(3, 4), aligned(8, 2)
    launched.again(q, k)
    before, after = log[1][2], log[2][2]
    assert after[9] is q
    assert (after[10].base if described else after[10]) is k
    if described:
        assert vars(after[10]) == {"base": k, "shape": [8, 2], "strides": [2, 1], "block_shape": [4, 2]}
    assert len(before) == len(after)
    assert all(x is y or x == y for x, y in zip(before[:9] + before[11:], after[:9] + after[11:], strict=True))


def test_strides_are_those_of_the_tensors(gpu: Gpu) -> None:
    """The first dimensions of each; 0 where the size is 1, of a tensor that is not there, and of a descriptor's."""
    log: list[Any] = []
    kernel = Kernel(log)
    x = torch.zeros(3, 1, 4, 5)
    y = SimpleNamespace(base=torch.zeros(6, 7), block_shape=[1, 7])
    for _ in range(2):
        start(kernel, **arguments(x=x, y=y))
        start(kernel, **arguments(x=x.expand(3, 6, 4, 5), y=y))
        start(kernel, **arguments(x=x.transpose(0, 2), y=None))
    strides = [entry[2][-7:-4] for entry in log]
    assert strides == [(20, 0, 7), (20, 0, 7), (5, 0, 0)] * 2
    assert [entry[0] for entry in log] == ["ordinary"] * 3 + ["direct"] * 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (NAMES[1:], r"kernel: expected the arguments \['y', 'z', 'number', .*\], got \['x', 'y'"),
        ((*NAMES, "more"), r"kernel: expected the arguments .*'more'\], got"),
        (("number", *(name for name in NAMES if name != "number")), "kernel: expected pointers, their strides, then"),
        (("x", "y", "z", "y_stride_b", "x_stride_b", *NAMES[6:]), "kernel: expected pointers, their strides, then"),
        (("x", "y", "z", "v_stride_b", *NAMES[6:]), "kernel: expected pointers, their strides, then"),
    ],
)
def test_wrong_parameters(names: tuple[str, ...], message: str, gpu: Gpu) -> None:
    """Of a launch, or of a kernel: NOTE [Parameters of kernels]."""
    with pytest.raises(TypeError, match=message):
        start(Kernel([], names), **arguments())


CHANGES: dict[str, Any] = {
    "dtype": lambda: {"x": aligned(3, 4, dtype=torch.int32)},
    "alignment": lambda: {"x": aligned(14)[2:].view(3, 4)},
    "strides": lambda: {"x": aligned(4, 3).T},
    "a tensor for None": lambda: {"y": aligned(8)},
    "a tensor for a descriptor": lambda: {"z": aligned(8, dtype=torch.float16)},
    "dtype of a descriptor": lambda: {"z": descriptor(torch.bfloat16)},
    "block of a descriptor": lambda: {"z": descriptor(block=(1, 32))},
    "number": lambda: {"number": 6},
    "float": lambda: {"other": 0.25},
    "constant": lambda: {"FLAG": False},
    "warps": lambda: {"warps": 4},
    "stages": lambda: {"stages": 3},
    "registers": lambda: {"registers": 128},
}


@pytest.mark.parametrize("name", [*CHANGES, "device", "kernel"])
def test_what_differs_is_launched_anew(name: str, gpu: Gpu) -> None:
    """And then kept beside the first: both are direct the next time."""
    log: list[Any] = []
    kernels = [Kernel(log), Kernel(log)]

    def once(changed: bool) -> str:
        gpu.device = 1 if changed and name == "device" else 0
        kernel = kernels[1 if changed and name == "kernel" else 0]
        changes = CHANGES[name]() if changed and name in CHANGES else {}
        start(kernel, **arguments(**changes))
        return str(log[-1][0])

    assert [once(False), once(True), once(True), once(False)] == ["ordinary", "ordinary", "direct", "direct"]
    if name == "device":
        assert log[2][2][3] == ("stream of", 1)
    assert log[2][1] is not log[3][1], "one compiled kernel for both"


def test_no_more_is_kept_than_the_cap(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "MAX_CACHED", 4)
    log: list[Any] = []
    kernel = Kernel(log)
    for number in range(11):
        start(kernel, **arguments(number=number))
        assert len(launching._cached) <= 4
        start(kernel, **arguments(number=number))
    assert [entry[0] for entry in log] == ["ordinary", "direct"] * 11


def test_interpreted_kernels_take_the_ordinary_way(gpu: Gpu) -> None:
    log: list[Any] = []

    class Interpreted:
        __getitem__ = Kernel.__getitem__

        def __init__(self) -> None:
            self.log, self.fn, self.arg_names = log, object(), NAMES

    interpreted = Interpreted()
    for _ in range(2):
        start(interpreted, **arguments())
    assert [entry[0] for entry in log] == ["ordinary", "ordinary"]
    assert not launching._cached


@pytest.mark.parametrize(
    ("version", "direct"),
    [("3.3.1", False), ("3.4.0", True), ("3.6.0+git1234", True), ("3.8.0", True), ("3.9.0", False), ("4.0.0", False)],
)
def test_unknown_versions_take_the_ordinary_way(version: str, direct: bool, gpu: Gpu) -> None:
    """Of the version, before any launch: ``CompiledKernel.run`` may take other arguments there."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(triton, "__version__", version)
        spec = importlib.util.spec_from_file_location("launch_of_another_version", launching.__file__)
        assert spec is not None
        assert spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    assert module._DIRECT is direct
    if direct:
        return
    log: list[Any] = []
    kernel = Kernel(log)
    for _ in range(2):
        start(kernel, launch=module.launch, **arguments())
    assert [entry[0] for entry in log] == ["ordinary", "ordinary"]
    assert not module._cached


def test_run_takes_what_it_is_given() -> None:
    """The launcher of this Triton is called with nine arguments before the kernel's own, as a direct launch does."""
    if not launching._DIRECT:
        pytest.skip("this Triton is launched the ordinary way")
    text = inspect.getsource(JITFunction.run)
    call = text[text.index("kernel.run(") :].partition("*bound_args.values())")[0]
    given = [argument.strip() for argument in call.removeprefix("kernel.run(").split(",")]
    assert given[:6] == ["grid_0", "grid_1", "grid_2", "stream", "kernel.function", "kernel.packed_metadata"]
    assert len(given) == 10
    assert given[9] == ""


def test_powers() -> None:
    powers = [launching.power_of_2(n, 4, 32) for n in (0, 1, 4, 5, 8, 31, 32, 33)]
    assert powers == [4, 4, 4, 8, 8, 32, 32, 32]
