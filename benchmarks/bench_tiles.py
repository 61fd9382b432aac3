"""The measurements behind the fixed choices: tiles of flexproxy's kernels, and options of ``flex_attention``.

    python -m benchmarks.bench_tiles

bf16, B 1, Hq 32, Hkv 8, D 128, causal, stride 4, P 8, random inputs, one GPU. Columns of a row:
- part: "scores" or "masses" (their pass over all keys, with its second kernel), "sparse" (``flex_attention``)
- choice: the tile (rows, keys, steps of a split, warps, stages, TMA, registers), or the kernel options, as text
- chosen: whether flexproxy takes it
- mask, of "sparse": "listed" (the mask of ``attention``), "built" (that of ``build``, which looks membership up)
- median_ms, p10_ms, p90_ms, repeats, error (None if there is none: some choices do not fit in shared memory)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any
from unittest import mock

import typer
from torch import Tensor

import flexproxy
from benchmarks import gate
from benchmarks.contenders import config_for, flex, inputs
from benchmarks.harness import (
    Budget,
    Density,
    Out,
    Quick,
    Row,
    attempt,
    command,
    release,
    require_gpu,
    result_path,
    run_cases,
    settings_of,
    time_ms,
)
from flexproxy.ops import compat

TILES: list[tuple[Any, ...]] = [
    (128, 128, 32, 8, 2, True, 128),
    (128, 128, 32, 8, 2, True),
    (64, 128, 64, 4, 3, True, 128),
    (64, 128, 64, 4, 3, True),
    (64, 64, 64, 4, 3, True, 128),
    (128, 64, 64, 8, 3, True, 128),
    (128, 64, 64, 8, 3, True),
    (128, 64, 64, 8, 3, False),
    (128, 64, 64, 4, 3, True),
    (128, 64, 64, 4, 3, False),
    (128, 128, 32, 4, 2, False),
    (64, 64, 64, 4, 3, True),
]
_TMA = {"USE_TMA": True, "BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "IS_DIVISIBLE": True}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"IS_DIVISIBLE": True},
    *(_TMA | {"BLOCK_N": n, "num_stages": stages} for n, stages in ((128, 2), (128, 3), (64, 3))),
    _TMA | {"num_stages": 3, "ROWS_GUARANTEED_SAFE": True},
    {"BACKEND": "FLASH"},
]


def tile_rows(part: str, q: Tensor, k: Tensor, budget_ms: float) -> list[Row]:
    """The operator alone, on what ``select`` gives it, with each tile: in a whole build, noise would hide a tile."""
    from flexproxy import pipeline
    from flexproxy.ops import kernels
    from flexproxy.ops.kernels import budget, scores, tiles
    from flexproxy.ops.kernels.block_logits import Tile

    module: Any = scores if part == "scores" else budget
    operator: Callable[..., Tensor] = getattr(kernels, f"block_{part}")
    calls: list[tuple[Any, ...]] = []

    def record(*args: Any) -> Tensor:
        calls.append(args)
        return operator(*args)

    with mock.patch.object(pipeline, f"block_{part}", record):
        flexproxy.select(q, k)
    choose = getattr(tiles, f"{part}_tile")
    chosen = choose(q.dtype, q.shape[3], q.device, *([] if part == "scores" else [128]))
    rows = []
    for tile in (Tile(*values) for values in TILES):
        with mock.patch.object(module, f"{part}_tile", lambda *_, tile=tile: tile):
            timed = attempt(lambda: time_ms(lambda: operator(*calls[0]), budget_ms))
        rows.append({"part": part, "choice": str(tuple(tile)), "chosen": tile == chosen} | timed)
    return rows


def option_rows(q: Tensor, k: Tensor, v: Tensor, density: float, budget_ms: float) -> list[Row]:
    selection = flexproxy.select(q, k, config=config_for(density, q.shape[2]))
    masks = {"listed": selection.listed_block_mask(), "built": selection.block_mask()}
    rows = []
    for options in OPTIONS:
        if "BACKEND" in options and not compat.flash_backend_exists():
            continue
        for name, block_mask in masks.items():
            timed = attempt(lambda: time_ms(lambda: flex(q, k, v, block_mask, options), budget_ms))  # noqa: B023
            rows.append({"part": "sparse", "choice": str(options), "mask": name} | timed)
    return rows


def bench(
    *,
    length: Annotated[int, typer.Option(min=1, help="Tokens.")] = 131072,
    density: Density = 0.1,
    budget_ms: Budget = 100.0,
    out: Out = None,
    quick: Quick = False,
) -> None:
    settings = settings_of(locals())
    require_gpu()
    gate.check_attention(every=False)
    release()

    def measure(part: str) -> list[Row]:
        q, k, v = inputs(length)
        return option_rows(q, k, v, density, budget_ms) if part == "sparse" else tile_rows(part, q, k, budget_ms)

    run_cases(["scores", "masses", "sparse"], measure, result_path("tiles", out, quick), settings)


def main(argv: Sequence[str] | None = None) -> None:
    command(bench, argv, length=8192, budget_ms=20.0)


if __name__ == "__main__":
    main()
